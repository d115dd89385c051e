from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from result_records import answers, make_record

from grass_ray.config import ConfigError
from grass_ray.results.record import RunRecord
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
