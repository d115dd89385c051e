"""Losses of the right answer: averaged, compared question by question, in every output; ranks that prove nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from result_records import answers, make_record
from scipy.stats import ttest_rel

from grass_ray.results.columns import overview_rows, row_values
from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.overview import describe_sweep, write_summary
from grass_ray.results.page.answer import findings
from grass_ray.results.paired import collect_answers, compare_answers
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.rows import LeaderboardRow
from grass_ray.results.selection import Selection

CHANCE = np.random.default_rng(7)
EASE = CHANCE.normal(0, 1, size=200)


def trained(method: str, seed: int = 0, *, skill: float = 0.0, noise: float = 0.3) -> RunRecord:
    """A run whose right answers are more likely by ``skill``, on two hundred questions."""
    strength = EASE + skill + np.random.default_rng([seed, len(method)]).normal(0, noise, size=len(EASE))
    return make_record(
        method,
        seed=seed,
        correct={"generated": (strength > 0).tolist()},
        losses={"generated": np.log1p(np.exp(-strength)).tolist()},
        metrics={"memory/peak_allocated_gib": 1.0, "throughput/tokens_per_second": 10.0, "time/train_s": 60.0},
    )


def only_losses(record: RunRecord) -> RunRecord:
    """The run as if it had been scored by loss alone."""
    record.config["evaluation"]["scoring"] = "loss"
    for score in record.tasks.values():
        score.scoring, score.accuracy, score.correct = "loss", math.nan, [False] * score.num_examples
    return record


def by_method(*records: RunRecord) -> dict[str, LeaderboardRow]:
    return {row.method: row for row in table_of(*records).rows}


def table_of(*records: RunRecord) -> LeaderboardTable:
    (table,) = build_leaderboard(records)
    return table


def losses_of(record: RunRecord) -> list[float]:
    found = record.tasks["generated"].losses
    assert found is not None
    return found


# --------------------------------------------------------------------------------------------------------- comparisons


def test_the_loss_is_the_mean_over_tasks_of_the_means_over_seeds() -> None:
    correct = {"boolq": answers(1, 2), "piqa": answers(1, 4)}
    losses: list[dict[str, Sequence[float]]] = [
        {"boolq": [1.0, 2.0], "piqa": [0.0, 0.0, 0.0, 4.0]},
        {"boolq": [2.0, 3.0], "piqa": [0.0, 0.0, 4.0, 4.0]},
    ]
    records = [
        make_record(seed=seed, correct=correct, losses=own, suite="commonsense") for seed, own in enumerate(losses)
    ]
    row = by_method(*records)["grass"]
    assert row.task_losses == {"boolq": 2.0, "piqa": 1.5}
    assert row.loss == 1.75
    assert row.loss_std == pytest.approx(np.std([1.25, 2.25], ddof=1))


def test_a_reference_response_counts_per_token_where_there_are_no_options() -> None:
    record = make_record(correct={"generated": answers(1, 2)})
    score = record.tasks["generated"]
    score.answer_nats, score.answer_tokens = [6.0, 1.0], [3, 2]
    assert score.losses == [2.0, 0.5]
    assert by_method(record)["grass"].loss == 1.25
    score.option_nats = [0.1, 0.3]
    assert by_method(record)["grass"].loss == pytest.approx(0.2), "options first"


@pytest.mark.parametrize("broken", [None, math.nan, math.inf])
def test_no_loss_unless_every_seed_has_a_finite_one(broken: float | None) -> None:
    whole, other, full = trained("grass"), trained("grass", seed=1), trained("full")
    if broken is None:
        other.tasks["generated"].option_nats = None
    else:
        losses_of(other)[3] = broken
    rows = by_method(whole, other, full)
    assert rows["grass"].loss is None
    assert rows["full"].loss == fmean(losses_of(full))
    assert rows["full"].loss_to_best is None, "nothing to compare it with"
    assert rows["full"].to_best is not None or rows["grass"].to_best is not None, "accuracies are still compared"


def test_one_seed_is_a_paired_t_test_over_questions() -> None:
    first, second = trained("grass", skill=0.1), trained("full")
    found = compare_answers(collect_answers([first], "loss"), collect_answers([second], "loss"))
    assert found is not None
    expected = ttest_rel(losses_of(first), losses_of(second))
    interval = expected.confidence_interval()
    assert (found.test, found.covers_training) == ("paired t", False)
    assert found.value == pytest.approx(fmean(losses_of(first)) - fmean(losses_of(second)))
    assert (found.p_value, *found.limits) == pytest.approx((expected.pvalue, interval.low, interval.high))


def test_seeds_on_both_sides_cover_training_and_are_paired_by_question() -> None:
    first = [trained("grass", seed, skill=0.5) for seed in range(3)]
    second = [trained("full", seed) for seed in range(3)]
    found = compare_answers(collect_answers(first, "loss"), collect_answers(second, "loss"))
    assert found is not None
    assert (found.test, found.covers_training) == ("two-level t", True)
    assert found.high < 0, "lower is better"
    own, other = (fmean(fmean(losses_of(record)) for record in side) for side in (first, second))
    assert found.value == pytest.approx(own - other)
    for record in first:  # the order of questions is no matter
        score = record.tasks["generated"]
        score.example_ids, score.option_nats = score.example_ids[::-1], losses_of(record)[::-1]
        score.correct = score.correct[::-1]
    turned = compare_answers(collect_answers(first, "loss"), collect_answers(second, "loss"))
    assert turned is not None
    assert (turned.value, turned.p_value) == pytest.approx((found.value, found.p_value))


def test_one_question_and_equal_losses_decide_nothing() -> None:
    one = [make_record(method, correct={"generated": [True]}, losses={"generated": [0.1]}) for method in ("grass",)]
    other = [make_record("full", correct={"generated": [True]}, losses={"generated": [3.0]})]
    found = compare_answers(collect_answers(one, "loss"), collect_answers(other, "loss"))
    assert found is not None
    assert (found.value, found.p_value) == (pytest.approx(-2.9), 1.0)
    same = compare_answers(collect_answers([trained("grass")], "loss"), collect_answers([trained("grass")], "loss"))
    assert same is not None
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_equal_methods_are_seldom_told_apart_by_loss_and_unequal_ones_often(seeds: int) -> None:
    """Losses of real models are skewed: most small, some large."""
    chance = np.random.default_rng(seeds)

    def runs(method: str, ease: np.ndarray, gain: float) -> list[RunRecord]:
        found = []
        for seed in range(seeds):
            shift = chance.normal(0, 0.03) if seeds > 1 else 0.0
            losses = np.exp(ease + chance.normal(0, 0.3, size=len(ease)) + shift) - gain
            found.append(
                make_record(method, seed=seed, correct={"generated": [True] * 100}, losses={"generated": losses})
            )
        return found

    called = {0.0: 0, 0.8: 0}
    for gain in called:
        for _ in range(100):
            ease = chance.normal(0, 1, size=100)
            first, second = runs("grass", ease, gain), runs("full", ease, 0.0)
            found = compare_answers(collect_answers(first, "loss"), collect_answers(second, "loss"))
            assert found is not None
            assert (found.low <= 0 <= found.high) == (found.p_value > 0.05)
            called[gain] += found.p_value <= 0.05
    assert called[0.0] <= 11, "5 % and three standard errors"
    assert called[0.8] >= 80


def test_best_and_full_are_the_best_by_loss() -> None:
    sure = trained("lora", skill=1.0)
    sure.tasks["generated"].correct = [False] * 200  # the lowest loss, and no right answer
    sure.tasks["generated"].accuracy = 0.0
    rows = by_method(trained("full"), trained("grass", skill=0.4), sure)
    assert rows["lora"].loss_to_best is None
    assert rows["grass"].to_best is None
    assert rows["full"].loss_to_best.value == pytest.approx(rows["full"].loss - rows["lora"].loss)
    assert rows["grass"].loss_to_full.value == pytest.approx(rows["grass"].loss - rows["full"].loss)
    tested = [row.loss_to_best for row in rows.values() if row.loss_to_best is not None]
    assert max(found.p_adjusted for found in tested) == max(found.p_value for found in tested)
    assert all(found.p_adjusted >= found.p_value for found in tested), "adjusted over this column"


# ------------------------------------------------------------------------------------------------------------- outputs


@pytest.fixture
def measured() -> LeaderboardTable:
    skills = {"full": 0.5, "lora": 0.0}
    records = [trained(method, seed, skill=skill) for method, skill in skills.items() for seed in (0, 1)]
    return table_of(*records)


def test_losses_are_in_every_output_and_sort_a_table(measured: LeaderboardTable) -> None:
    full = measured.rows[0]
    cell = f"{full.loss:.3f} ±{full.loss_std:.3f}"
    for format in ("table", "markdown", "html"):
        assert cell in render([measured], format), format  # type: ignore[arg-type]
    for width in (80, 100, 120, 200):
        text = render([measured], "table", width=width)
        assert cell in text
        assert max(map(len, text.splitlines())) <= width
    values = json.loads(render([measured], "json"))[0]
    assert values["loss"] == full.loss
    assert values["task_losses"] == {"generated": full.loss}
    assert "eval/generated/loss" in render([measured], "csv").splitlines()[0]
    assert overview_rows([measured])[0]["loss"] == full.loss
    assert cell in describe_sweep("?", [measured], done=4, num_trials=4)
    for reverse, expected in ((False, ["full", "lora"]), (True, ["lora", "full"])):
        (table,) = Selection(sort="loss", reverse=reverse).tables([measured])
        assert [row.method for row in table.rows] == expected
    assert "full has the lowest loss" in findings(measured)


def test_a_table_without_losses_shows_nothing_of_them() -> None:
    table = table_of(make_record("full"), make_record("grass"))
    for format in ("table", "markdown"):
        assert "loss" not in render([table], format)  # type: ignore[arg-type]
    assert not [key for key in overview_rows([table])[0] if "loss" in key]
    assert "eval/generated/loss" not in render([table], "csv")
    assert "loss" not in findings(table)


def test_where_there_is_no_accuracy_losses_rank(tmp_path: Path) -> None:
    skills = {"grass": 0.5, "full": 0.0, "lora": 0.45}
    records = [only_losses(trained(name, seed, skill=skill)) for name, skill in skills.items() for seed in (0, 1)]
    table = table_of(*records)
    assert table.metric == "loss"
    assert [(row.method, row.rank, row.told_apart) for row in table.rows] == [
        ("grass", 1, None),
        ("lora", 2, False),
        ("full", 3, True),
    ]
    assert [row.pareto for row in table.rows] == [True, False, False]
    assert all(row.accuracy is None and row.to_best is None for row in table.rows)
    text = render([table], "markdown")
    assert "acc. %" not in text
    assert "a lower loss and less peak memory" in text
    assert findings(table).startswith("grass has the lowest loss")
    assert describe_sweep("?", [table], done=1, num_trials=1).startswith("Lowest loss: **grass**")
    write_summary(records, [table], tmp_path)
    assert (tmp_path / "ranking.png").exists()


# ------------------------------------------------------------------------------------------------------ not told apart


def test_a_rank_that_is_not_told_apart_says_so_everywhere() -> None:
    records = [
        make_record(method, correct={"generated": answers(right, 100)})
        for method, right in (("grass", 80), ("full", 78), ("lora", 20))
    ]
    table = table_of(*records)
    assert [(row.rank, row.told_apart) for row in table.rows] == [(1, None), (2, False), (3, True)]
    for format in ("table", "markdown", "html"):
        text = render([table], format)  # type: ignore[arg-type]
        assert "≈1" in text, format
        assert "not told apart from the first row" in text, format
    assert [row_values(row)["told_apart"] for row in table.rows] == [None, False, True]
    assert [row["rank"] for row in overview_rows([table])] == ["1", "≈1", "3"]
    assert "not told apart from 1 other row" in describe_sweep("?", [table], done=3, num_trials=3)


def test_nothing_is_said_where_every_row_is_told_apart() -> None:
    shares = {"grass": 80, "lora": 20}
    records = [make_record(name, correct={"generated": answers(right, 100)}) for name, right in shares.items()]
    assert "≈" not in render([table_of(*records)], "markdown")
