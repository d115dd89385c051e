from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping

import numpy as np
import pytest
from result_records import answers, make_record

from grass_ray.config import ConfigError
from grass_ray.results.record import LmEvalScore, RunRecord
from grass_ray.results.rendering import render_comparison
from grass_ray.results.sweep_comparison import compare_sweeps


def two_sweeps() -> list[RunRecord]:
    return [
        make_record("grass", sweep_id="old", correct={"generated": answers(8, 20)}),
        make_record("grass", sweep_id="new", correct={"generated": answers(18, 20)}),
        make_record("lora", sweep_id="old", correct={"generated": answers(10, 20)}),
        make_record("lora", sweep_id="new", correct={"generated": answers(10, 20)}, overrides=["training.steps=60"]),
        make_record("full", sweep_id="old", correct={"generated": answers(10, 20)}),
        make_record("lisa", sweep_id="new", status="failed", failure="no"),
    ]


def test_differences_are_per_question() -> None:
    comparison = compare_sweeps(two_sweeps(), "old", "new")
    grass, lora = comparison.rows
    assert (grass.label, grass.first, grass.second, grass.comparison.value) == ("grass", 0.4, 0.9, pytest.approx(0.5))
    assert grass.comparison.p_value == pytest.approx(2 / 2**10)
    assert grass.comparison.p_adjusted == pytest.approx(2 * 2 / 2**10)
    assert (grass.only_first, grass.only_second, grass.questions) == (0, 10, 20)
    assert [change.example_id for change in grass.changes] == [f"question-{index}" for index in range(8, 18)]
    assert lora.comparison.value == 0
    assert lora.settings == ["training.steps: 50 -> 60"], "matched by method, since nothing else is left"
    assert (comparison.only_in_first, comparison.only_in_second) == (["full"], ["lisa"])


def test_the_same_run_on_two_sides_differs_in_nothing() -> None:
    records = [make_record("grass", sweep_id=side) for side in ("a", "b")]
    (row,) = compare_sweeps(records, "a", "b").rows
    assert (row.comparison.value, row.changes, row.settings, row.comparison.p_value) == (0, [], [], 1.0)


def test_memory_of_other_machines_is_not_compared() -> None:
    metrics = {"memory/peak_allocated_gib": 2.0, "throughput/tokens_per_second": 10.0}
    first = make_record(sweep_id="a", metrics=metrics)
    same = make_record(sweep_id="b", metrics={"memory/peak_allocated_gib": 1.0, "throughput/tokens_per_second": 15.0})
    other = make_record(sweep_id="b", metrics=metrics, hardware="GPU")
    (row,) = compare_sweeps([first, same], "a", "b").rows
    assert (row.memory_ratio, row.speed_ratio) == (0.5, 1.5)
    (row,) = compare_sweeps([first, other], "a", "b").rows
    assert (row.memory_ratio, row.speed_ratio) == (None, None)
    assert row.comparison.value == 0


def test_several_rows_of_a_method_are_not_guessed() -> None:
    records = [
        make_record(sweep_id=side, overrides=[f"method.optimizer.lr={lr}"])
        for side, rates in (("a", (0.1, 0.2)), ("b", (0.3, 0.4)))
        for lr in rates
    ]
    comparison = compare_sweeps(records, "a", "b")
    assert comparison.rows == []
    assert len(comparison.only_in_first) == len(comparison.only_in_second) == 2


def test_an_experiment_is_a_side() -> None:
    with pytest.raises(ConfigError, match="name two different sweeps"):
        compare_sweeps(two_sweeps(), "new", "new")
    with pytest.raises(
        ConfigError, match="no run belongs to the sweep or experiment 'newer'; available: new, old, qui"
    ):
        compare_sweeps(two_sweeps(), "newer", "old")
    renamed = [record.model_copy(update={"sweep": f"sweep-{record.sweep_id}"}) for record in two_sweeps()]
    assert len(compare_sweeps(renamed, "sweep-old", "new").rows) == 2


def test_every_format() -> None:
    comparison = compare_sweeps(two_sweeps(), "old", "new")
    text = render_comparison(comparison, "table")
    assert "+50.0" in text
    assert max(map(len, text.splitlines())) <= 100
    for note in ("only in A: full", "only in B: lisa", "lora is not configured alike: training.steps: 50 -> 60"):
        assert note in text
    assert "| grass | 40.0 | 90.0 | +50.0 |" in render_comparison(comparison, "markdown")
    lines = list(csv.DictReader(io.StringIO(render_comparison(comparison, "csv"))))
    assert [line["example_id"] for line in lines] == [f"question-{index}" for index in range(8, 18)]
    assert {(line["first"], line["second"]) for line in lines} == {("0.0", "1.0")}
    assert len(json.loads(render_comparison(comparison, "json"))["rows"][0]["changes"]) == 10
    assert render_comparison(comparison, "html").count("<tr>") == 3


def test_losses_are_compared_where_both_sides_have_them() -> None:
    chance = np.random.default_rng(0)
    losses = chance.uniform(0.5, 1.5, size=40)

    def run(side: str, gain: float) -> RunRecord:
        own = losses - gain + chance.normal(0, 0.02, size=40)
        return make_record("grass", sweep_id=side, correct={"generated": answers(20, 40)}, losses={"generated": own})

    comparison = compare_sweeps([run("old", 0.0), run("new", 0.1)], "old", "new")
    (row,) = comparison.rows
    assert row.comparison.value == 0.0
    assert row.by_loss.value == pytest.approx(row.second_loss - row.first_loss)
    assert row.by_loss.high < -0.05
    assert row.to_dict()["loss_difference"] == row.by_loss.value
    text = render_comparison(comparison, "markdown")
    assert "| loss A | loss B | loss B - A |" in text
    assert "p loss: paired t on the same questions" in text
    without = compare_sweeps([make_record(sweep_id="old"), make_record(sweep_id="new")], "old", "new")
    assert "loss" not in render_comparison(without, "markdown")


def with_benchmarks(side: str, shares: Mapping[str, float], *, alone: bool = False) -> RunRecord:
    overrides = ["evaluation.lm_eval.tasks=[mmlu, arc]"] + ["evaluation.scoring=lm_eval"] * alone
    record = make_record("grass", sweep_id=side, correct={"generated": answers(10, 20)}, overrides=overrides)
    if alone:
        record.tasks = {}
    ids = [f"{number:016x}" for number in range(40)]
    for task, share in shares.items():
        values = [float(number < 40 * share) for number in range(40)]
        record.lm_eval[task] = LmEvalScore(metric="acc", value=share, example_ids=ids, values=values)
    whole = LmEvalScore(metric="word_perplexity", value=10 + shares["mmlu"], higher_is_better=False, example_ids=ids)
    record.lm_eval["wikitext"] = whole
    return record


@pytest.mark.parametrize("alone", [False, True])
def test_lm_eval_tasks_are_compared_example_by_example(alone: bool) -> None:
    old = with_benchmarks("old", {"mmlu": 0.25, "arc": 0.5}, alone=alone)
    new = with_benchmarks("new", {"mmlu": 0.5, "arc": 0.5}, alone=alone)
    comparison = compare_sweeps([old, new], "old", "new")
    (row,) = comparison.rows
    mmlu, arc, wikitext = (row.lm_eval_tasks[task] for task in ("mmlu", "arc", "wikitext"))
    assert (mmlu.first, mmlu.second, mmlu.comparison.value) == (0.25, 0.5, 0.25)
    assert (mmlu.comparison.test, mmlu.comparison.p_value) == ("exact McNemar", 2 / 2**10)
    assert mmlu.comparison.p_adjusted == pytest.approx(2 * 2 / 2**10), "over the tasks that have one"
    assert (arc.comparison.value, arc.comparison.p_value) == (0, 1)
    assert (wikitext.second - wikitext.first, wikitext.comparison) == (0.25, None)
    assert row.lm_eval is not None
    assert (row.lm_eval.first, row.lm_eval.second, row.lm_eval.comparison.value) == (0.375, 0.5, 0.125)
    assert [(change.task, change.example_id) for change in row.changes] == [
        ("lm_eval/mmlu", f"{number:016x}") for number in range(10, 20)
    ]
    assert (row.only_first, row.only_second, row.questions) == (0, 10, 80 + 20 * (not alone))
    markdown = render_comparison(comparison, "markdown")
    assert "| grass: mmlu (acc) | 25.0 | 50.0 | +25.0 | " in markdown
    assert "| grass: wikitext (word\\_perplexity) | 10.250 | 10.500 | +0.250 | - | - | - |" in markdown
    assert "| grass: average of shares | 37.5 | 50.0 | +12.5 |" in markdown
    assert ("| A % |" in markdown) is not alone
    plain = json.loads(render_comparison(comparison, "json"))["rows"][0]
    assert plain["lm_eval_tasks"]["mmlu"]["difference"] == plain["lm_eval"]["difference"] * 2 == 0.25
    assert plain["lm_eval_tasks"]["wikitext"]["p_value"] is None
    page = render_comparison(comparison, "html")
    assert page.count("<table>") == page.count("</table>") == 2
    assert "<caption>Tasks of lm-eval</caption>" in page


def test_a_task_of_lm_eval_that_one_side_alone_has_is_left_out() -> None:
    old, new = (with_benchmarks(side, {"mmlu": 0.25, "arc": 0.5}) for side in ("old", "new"))
    del new.lm_eval["arc"]
    (row,) = compare_sweeps([old, new], "old", "new").rows
    assert list(row.lm_eval_tasks) == ["mmlu", "wikitext"]
    assert row.lm_eval.first == 0.25
