"""lm-eval's own tasks in a leaderboard: averages, comparisons example by example, columns of every format, ranking."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from statistics import fmean

import pytest
from result_records import answers, make_record

from grass_ray.results.columns import overview_rows
from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.overview import describe_sweep
from grass_ray.results.page.answer import findings
from grass_ray.results.power_report import Wish, reports
from grass_ray.results.record import LmEvalScore, RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.reproduction import compare_records
from grass_ray.results.statistics import benjamini_hochberg, mcnemar
from grass_ray.tasks.lm_eval_scores import lm_eval_metrics


def score(values: Sequence[float] | None, *, metric: str = "acc", shots: int = 5) -> LmEvalScore:
    value = 12.5 if values is None else fmean(values)
    return LmEvalScore(
        metric=metric,
        value=value,
        stderr=None if values is None else 0.01,
        higher_is_better=values is not None,
        metrics={metric: value},
        example_ids=[f"{number:016x}" for number in range(40)],
        values=None if values is None else list(values),
        protocol={"num_fewshot": [shots], "config_sha256": "0" * 64},
    )


def row(method: str, tasks: Mapping[str, LmEvalScore], *, seed: int = 0, alone: bool = False) -> RunRecord:
    steps = 0 if method == "base" else 50
    overrides = [f"training.steps={steps}", f"evaluation.lm_eval.tasks=[{', '.join(tasks)}]"]
    overrides += ["evaluation.scoring=lm_eval"] * alone
    record = make_record(method, seed=seed, correct={"generated": answers(10 + seed, 20)}, overrides=overrides)
    if alone:
        record.tasks = {}
    record.lm_eval = dict(tasks)
    record.metrics = lm_eval_metrics(record.lm_eval)
    return record


def right(share: float, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [float(chance.random() < share) for _ in range(40)]


def sweep(*, alone: bool = False) -> list[RunRecord]:
    shares = {"base": 0.6, "full": 0.3, "grass": 0.55, "lora": 0.5}
    records = []
    for at, (method, share) in enumerate(shares.items()):
        tasks = {"mmlu": score(right(share, at)), "ifeval": score(right(share / 2, at + 9))}
        records.append(row(method, tasks | {"wikitext": score(None, metric="word_perplexity")}, alone=alone))
    return records


def only_table(records: Sequence[RunRecord]) -> LeaderboardTable:
    (table,) = build_leaderboard(records)
    return table


def test_rows_are_compared_with_the_untrained_model_example_by_example() -> None:
    records = sweep()
    table = only_table(records)
    rows = {own.method: own for own in table.rows}
    base = next(record for record in records if record.config["method"]["name"] == "base")
    pairs = {}
    for record in records:
        if record is base:
            continue
        name = record.config["method"]["name"]
        for task in ("mmlu", "ifeval"):
            own, theirs = ([value == 1 for value in found.lm_eval[task].values or ()] for found in (record, base))
            pairs[name, task] = mcnemar(own, theirs)
            change = rows[name].lm_eval_tasks[task].to_base
            assert change is not None
            assert change.value == pytest.approx(fmean(own) - fmean(theirs))
            assert (change.test, change.p_value) == ("exact McNemar", pairs[name, task])
    adjusted = dict(zip(pairs, benjamini_hochberg(list(pairs.values())), strict=True))
    for (name, task), p in adjusted.items():
        change = rows[name].lm_eval_tasks[task].to_base
        assert change is not None
        assert change.p_adjusted == pytest.approx(p)
    overall = rows["full"].lm_eval_to_base
    assert overall is not None
    tasks = [rows["full"].lm_eval_tasks[task].to_base for task in ("mmlu", "ifeval")]
    assert overall.value == pytest.approx(fmean(task.value for task in tasks if task is not None))
    assert rows["base"].lm_eval_to_base is None
    assert rows["base"].lm_eval == pytest.approx(fmean(base.lm_eval[task].value for task in ("mmlu", "ifeval")))
    assert rows["full"].lm_eval_tasks["wikitext"].to_base is None  # no value of single examples
    assert table.metric == "accuracy"  # the tasks of the data still rank


def test_seeds_make_it_a_test_of_both_levels() -> None:
    records = [row("base", {"mmlu": score(right(0.6, 0))})]
    records += [row("lora", {"mmlu": score(right(0.4, seed))}, seed=seed) for seed in (1, 2, 3)]
    rows = {own.method: own for own in only_table(records).rows}
    change = rows["lora"].lm_eval_tasks["mmlu"].to_base
    assert change is not None
    assert (change.test, change.seeds) == ("two-level t", (3,))
    assert change.low < change.value < change.high
    assert rows["lora"].lm_eval_std is not None


def test_metrics_between_0_and_1_are_compared_by_a_t_test_and_shown_in_percent() -> None:
    values = [random.Random(at).random() for at in range(40)]
    records = [row("base", {"f1": score([0.5] * 40)}), row("lora", {"f1": score(values)})]
    found = {own.method: own for own in only_table(records).rows}["lora"]
    assert found.lm_eval_tasks["f1"].to_base is not None
    assert found.lm_eval_tasks["f1"].to_base.test == "paired t"


def test_other_few_shot_examples_are_another_test() -> None:
    records = [row("base", {"mmlu": score(right(0.6, 0))}), row("lora", {"mmlu": score(right(0.6, 1), shots=0)})]
    tables = build_leaderboard(records)
    assert len(tables) == 2
    assert any("lm_eval:mmlu num fewshot" in note for note in tables[0].notes)


@pytest.mark.parametrize("alone", [False, True])
def test_every_format_has_them(alone: bool) -> None:
    records = sweep(alone=alone)
    tables = build_leaderboard(records)
    text = render(tables, "table", width=120)
    assert "mmlu vs base" in text
    assert "wikitext" in text
    assert "12.500" in text
    assert ("acc. %" in text) is not alone
    markdown = render(tables, "markdown")
    assert "| mmlu | mmlu vs base |" in markdown
    lines = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    assert {"lm_eval/mmlu/value", "lm_eval/mmlu/p_adjusted", "lm_eval_difference_to_base"} <= set(lines[0])
    plain = json.loads(render(tables, "json"))
    assert set(plain[0]["lm_eval_tasks"]) == {"mmlu", "ifeval", "wikitext"}
    page = render(tables, "html", records=records)
    assert "Tasks of lm-eval" in page
    shown = overview_rows(tables)
    assert {"lm-eval %", "mmlu", "mmlu vs base"} <= set(shown[0])
    power = reports(tables[0], ("lm_eval",), Wish())
    assert power[0].metric == "lm_eval"
    assert power[0].tasks == 2


def test_without_tasks_of_the_data_rows_are_ranked_by_the_average() -> None:
    table = only_table(sweep(alone=True))
    assert table.metric == "lm_eval"
    averages = [own.lm_eval or 0.0 for own in table.rows]
    assert averages == sorted(averages, reverse=True)
    assert table.rows[0].rank == 1
    assert table.title.startswith("smollm2-135m on the tasks of lm-eval, ")
    assert f"{table.rows[0].label} has the highest average of lm-eval's tasks" in findings(table)
    assert "Highest average of lm-eval's tasks: **" in describe_sweep("Which?", [table], done=4, num_trials=4)


def test_a_record_is_written_read_and_compared_with_its_rerun() -> None:
    record = row("lora", {"mmlu": score(right(0.6, 0)), "wikitext": score(None, metric="word_perplexity")})
    again = RunRecord.model_validate_json(record.model_dump_json())
    assert again == record
    checks = {check.what: check for check in compare_records(record, again)}
    assert checks["mmlu of lm-eval: every example"].agrees
    assert checks["lm_eval/mmlu/acc"].agrees
    values = again.lm_eval["mmlu"].values
    assert values is not None
    values[3] = 1 - values[3]
    check = {check.what: check for check in compare_records(record, again)}["mmlu of lm-eval: every example"]
    assert (check.agrees, check.detail) == (False, "1 of 40 differ")
