"""Rows are ranked, averaged and paired only where they were tested alike, on every way by which rows meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from result_records import answers, make_record

from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.record import RunRecord, TaskScore
from grass_ray.results.rendering import render, render_comparison
from grass_ray.results.sweep_comparison import compare_sweeps

PROTOCOL = {"template": "clean", "stop": ["\n"], "max_new_tokens": 32, "lm_eval": "0.4.13", "batch_size": 8}


def asked(
    method: str, right: int = 60, *, prefix: str = "question", sha256: str | None = "a" * 64, **more: Any
) -> RunRecord:
    """A run on a hundred questions of a file."""
    record = make_record(method, correct={"generated": answers(right, 100)}, **more)
    score = record.tasks["generated"]
    score.example_ids = [f"{prefix}-{number}" for number in range(100)]
    if sha256 is not None:
        score.protocol = {**PROTOCOL, "test_sha256": sha256, "test_rows": 100}
    return record


def score_of(record: RunRecord) -> TaskScore:
    return record.tasks["generated"]


def change(record: RunRecord, **protocol: Any) -> RunRecord:
    score_of(record).protocol |= protocol
    return record


def shorter(record: RunRecord) -> RunRecord:
    record.tasks["generated"] = TaskScore(
        **{**score_of(record).model_dump(), "num_examples": 40, "accuracy": 1.0}
        | {"correct": [True] * 40, "example_ids": score_of(record).example_ids[:40]}
    )
    return record


def on_weights(record: RunRecord, sha256: str) -> RunRecord:
    return record.model_copy(update={"model_sha256": sha256})


OTHERS: dict[str, Callable[[], RunRecord]] = {
    "another file": lambda: asked("grass", 80, prefix="other", sha256="b" * 64),
    "other answers to the same prompts": lambda: asked("grass", 80, sha256="b" * 64),
    "another seed of the generated set": lambda: asked("grass", 80, overrides=["data.source.seed=7"]),
    "another template": lambda: asked("grass", 80, overrides=["data.template=published"]),
    "a shorter file": lambda: shorter(asked("grass", 80)),
    "a limit": lambda: asked("grass", 80, overrides=["evaluation.limit=100"]),
    "another extraction": lambda: asked("grass", 80, overrides=["evaluation.extraction=strict"]),
    "another stop": lambda: change(asked("grass", 80), stop=["###"]),
    "fewer tokens": lambda: change(asked("grass", 80), max_new_tokens=8),
    "rules of a later version": lambda: change(asked("grass", 80), answer_rules=2),
    "other base weights": lambda: on_weights(asked("grass", 80), "d" * 64),
}


def tables_of(*records: RunRecord) -> list[LeaderboardTable]:
    return build_leaderboard(records)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_was_not_tested_alike_is_neither_ranked_nor_paired_together(other: Callable[[], RunRecord]) -> None:
    first, second = tables = tables_of(on_weights(asked("full"), "c" * 64), on_weights_if_none(other()))
    assert [len(table.rows) for table in tables] == [1, 1]
    for row in (first.rows[0], second.rows[0]):
        assert row.rank == 1
        assert (row.to_full, row.to_best) == (None, None)
    assert first.title != second.title, "pictures and pages tell tables apart by their titles"
    rows = json.loads(render(tables, "json"))
    assert (rows[0]["test"] == rows[1]["test"]) == (other is OTHERS["other base weights"])
    assert render(tables, "html").count("<section") == 2


def on_weights_if_none(record: RunRecord) -> RunRecord:
    return record if record.model_sha256 else on_weights(record, "c" * 64)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_seeds_that_were_not_tested_alike_are_never_averaged(other: Callable[[], RunRecord]) -> None:
    later = on_weights_if_none(other())
    later.config["seed"] = 1
    rows = [row for table in tables_of(on_weights(asked("grass"), "c" * 64), later) for row in table.rows]
    assert sorted(row.seeds for row in rows) == [[0], [1]]
    assert sorted(round(row.accuracy or 0, 2) for row in rows) in ([0.6, 0.8], [0.6, 1.0])


@pytest.mark.parametrize(
    "same",
    [
        lambda: change(asked("grass", 80), batch_size=1, test_file="elsewhere.json", lm_eval="0.5"),
        lambda: asked("grass", 80, sha256=None),
        lambda: asked("grass", 80, overrides=["evaluation.batch_size=2"]),
        lambda: on_weights(asked("grass", 80), "d" * 64),
    ],
    ids=["places and batches", "an old record without hashes", "another batch size", "weights that one does not know"],
)
def test_what_changes_no_question_keeps_rows_together(same: Callable[[], RunRecord]) -> None:
    (table,) = tables_of(asked("full"), same())
    assert [row.rank for row in table.rows] == [1, 2]
    assert table.rows[0].to_full.value == pytest.approx(0.2)
    assert table.apart == ""


def test_tables_say_what_keeps_them_apart() -> None:
    tables = tables_of(asked("full"), asked("grass", 80, prefix="other", sha256="b" * 64))
    for table in tables:
        (note,) = [note for note in table.notes if note.startswith("not to be compared with the other table")]
        assert "generated test sha256 (aaaaaaaaaaaa / bbbbbbbbbbbb)" in note
        assert table.title.endswith(f"test {table.test.name})")
    assert "not to be compared" in " ".join(render(tables, "table").split())
    assert "not to be compared" in render(tables, "html")


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "stopped"])
def test_a_run_that_was_not_tested_stands_with_those_of_its_configuration(status: Any) -> None:
    lost = make_record("lora", status=status, failure="killed", overrides=["data.source.seed=7"])
    records = [asked("full"), asked("grass", 80, overrides=["data.source.seed=7"], prefix="other"), lost]
    assert [[row.method for row in table.rows] for table in build_leaderboard(records)] == [["full"], ["grass", "lora"]]


def test_a_failed_seed_stays_in_its_row() -> None:
    good = [asked("grass", seed=seed) for seed in (0, 1)]
    failed = make_record("grass", seed=2, status="failed", failure="killed")
    (table,) = build_leaderboard([*good, failed, asked("full")])
    assert {row.method: (row.seeds, row.status) for row in table.rows} == {
        "grass": ([0, 1], "partial"),
        "full": ([0], "finished"),
    }


def test_seeds_on_other_training_rows_are_other_rows_that_say_so() -> None:
    def trained_on(seed: int, rows: str) -> RunRecord:
        record = asked("grass", 60 + seed, seed=seed)
        record.data["train"] = {"rows_sha256": rows * 64}
        return record

    failed = make_record("grass", seed=3, status="failed", failure="killed")
    (table,) = build_leaderboard([trained_on(0, "a"), trained_on(1, "a"), trained_on(2, "b"), failed])
    assert {row.label: row.seeds for row in table.rows} == {
        "grass (training rows aaaaaaaa)": [0, 1],
        "grass (training rows bbbbbbbb)": [2],
    }


def test_the_order_of_records_changes_nothing() -> None:
    records = [asked("full"), asked("grass", 80), *(make() for make in OTHERS.values())]
    records.append(make_record("lora", status="failed", failure="killed"))

    def shape(records: Sequence[RunRecord]) -> list[list[tuple[str, float | None]]]:
        return sorted(sorted((row.label, row.accuracy or 0) for row in t.rows) for t in build_leaderboard(records))

    assert shape(records) == shape(records[::-1])


# ----------------------------------------------------------------------------------------------------- two sweeps


def test_two_sweeps_with_other_questions_are_not_compared_and_it_is_said() -> None:
    first = asked("grass", 60, sweep_id="a")
    for other in (
        asked("grass", 80, sweep_id="b", prefix="other", sha256="b" * 64),
        asked("grass", 80, sweep_id="b", sha256="b" * 64),
        asked("grass", 80, sweep_id="b", overrides=["data.template=published"]),
        shorter(asked("grass", 80, sweep_id="b")),
    ):
        comparison = compare_sweeps([first, other], "a", "b")
        assert comparison.rows == []
        assert (comparison.only_in_first, comparison.only_in_second) == (["grass"], ["grass"])
        (why,) = comparison.tested_otherwise
        assert why.startswith("grass was not tested alike in A and B: ")
        assert why in render_comparison(comparison, "markdown").replace("\\", "")


def test_two_sweeps_on_other_machines_are_compared_over_the_same_questions() -> None:
    records = [asked("grass", 60, sweep_id="a"), asked("grass", 80, sweep_id="b", hardware="GPU")]
    (row,) = compare_sweeps(records, "a", "b").rows
    assert row.comparison.value == pytest.approx(0.2)
    assert row.comparison.covers_training is False
    assert "these runs" in render_comparison(compare_sweeps(records, "a", "b"), "markdown")
