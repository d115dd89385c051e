from __future__ import annotations

import pytest
from result_records import answers, make_record

from grass_ray.config import ConfigError
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow
from grass_ray.results.selection import Selection, merge_records


def sweep() -> list[RunRecord]:
    def at(method: str, right: int, gib: float, **more: object) -> RunRecord:
        return make_record(
            method, correct={"generated": answers(right, 20)}, metrics={"memory/peak_allocated_gib": gib}, **more
        )

    return [
        at("full", 12, 3.0),
        at("grass", 16, 1.0),
        at("lora", 14, 2.0),
        at("lora", 10, 2.0, seed=1),
        make_record("lisa", status="failed", failure="no"),
        make_record("grass", overrides=["model.name=tiny"]),
        make_record("base", correct={"generated": answers(2, 20)}),
    ]


def shown(selection: Selection, records: list[RunRecord] | None = None) -> list[LeaderboardRow]:
    tables = selection.tables(build_leaderboard(selection.records(records or sweep())))
    return [row for table in tables for row in table.rows]


def test_everything_is_shown_by_default() -> None:
    assert len(shown(Selection())) == 6


def test_hidden_rows_change_no_number() -> None:
    whole = {row.label: row for row in shown(Selection(models=("smollm2-135m",)))}
    few = shown(Selection(models=("smollm2-135m",), methods=("lora", "grass")))
    assert [row.label for row in few] == ["grass", "lora"]
    assert all(row == whole[row.label] for row in few), "ranks and p-values are those of the whole table"
    (table,) = Selection(models=("smollm2-135m",), methods=("lora",)).tables(
        build_leaderboard(Selection(models=("smollm2-135m",)).records(sweep()))
    )
    assert any("4 of 5 rows are hidden" in note for note in table.notes)


def test_by_status() -> None:
    assert [row.method for row in shown(Selection(statuses=("failed",)))] == ["lisa"]
    assert "lisa" not in {row.method for row in shown(Selection(statuses=("finished",)))}


def test_one_seed_is_another_average_and_the_untrained_model_stays() -> None:
    rows = {row.method: row for row in shown(Selection(seeds=(1,)))}
    assert rows.keys() == {"lora"} | ({"base"} if "base" in rows else set())
    assert rows["lora"].accuracy == 0.5
    untrained = make_record("base", overrides=["training.steps=0"])
    assert {row.method for row in shown(Selection(seeds=(1,)), [*sweep(), untrained])} >= {"base", "lora"}


def test_tasks_are_averaged_alone() -> None:
    record = make_record(correct={"boolq": answers(9, 10), "piqa": answers(1, 10)}, suite="commonsense")
    (row,) = shown(Selection(tasks=("boolq",)), [record, make_record()])
    assert (row.accuracy, row.tasks) == (0.9, {"boolq": 0.9})
    assert record.tasks.keys() == {"boolq", "piqa"}, "the record itself is left alone"
    assert [row.suite for row in shown(Selection(suites=("generated",)), [record, make_record()])] == ["generated"]


@pytest.mark.parametrize(
    ("key", "reverse", "expected"),
    [
        ("peak_allocated_gib", False, ["grass", "lora", "full"]),
        ("peak_allocated_gib", True, ["full", "lora", "grass"]),
        ("accuracy", False, ["grass", "full", "lora"]),
        ("difference_to_full", False, ["grass", "lora", "full"]),
        ("method", False, ["full", "grass", "lora"]),
        ("generated", True, ["full", "lora", "grass"]),
        ("seeds", False, ["lora", "grass", "full"]),
    ],
)
def test_sorted_by_any_column(key: str, reverse: bool, expected: list[str]) -> None:
    records = [record for record in sweep()[:4] if record.config["model"]["name"] == "smollm2-135m"]
    assert [row.method for row in shown(Selection(sort=key, reverse=reverse), records)] == expected


def test_rows_without_the_value_come_last_either_way() -> None:
    for reverse in (False, True):
        rows = shown(Selection(sort="peak_allocated_gib", reverse=reverse, models=("smollm2-135m",)))
        assert {row.method for row in rows[-2:]} == {"lisa", "base"}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"suites": ("commonsens",)}, "Did you mean 'commonsense'"),
        ({"tasks": ("bool",)}, "unknown task 'bool'"),
        ({"statuses": ("oom",)}, "available: finished, partial, failed, out_of_memory, stopped"),
        ({"sort": "memory"}, "unknown column 'memory'"),
        ({"reverse": True}, "give --sort"),
    ],
)
def test_unknown_names_are_refused(choice: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", "\\(")):
        Selection(**choice).records(sweep())  # type: ignore[arg-type]


def test_a_task_of_ones_own_is_known_by_its_runs() -> None:
    own = make_record(correct={"reviews": answers(3, 4)}, suite="generated")
    own.config["data"] |= {"suite": "reviews", "tasks": ["reviews"]}
    chosen = Selection(suites=("reviews",), tasks=("reviews",), sort="reviews")
    (row,) = shown(chosen, [*sweep(), own])
    assert row.tasks == {"reviews": 0.75}
    with pytest.raises(ConfigError, match="unknown task 'reviews'"):
        chosen.records(sweep())


def test_models_and_methods_that_no_run_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown model 'tinny'; available: smollm2-135m, tiny"):
        shown(Selection(models=("tinny",)))
    with pytest.raises(ConfigError, match=r"unknown method 'gras'.*Did you mean 'grass'"):
        shown(Selection(methods=("gras",)))


def test_a_run_in_two_stores_counts_once_the_latest() -> None:
    old = make_record(correct={"generated": answers(1, 10)}, finished_at="2026-05-01T10:10:00+00:00")
    new = make_record(correct={"generated": answers(7, 10)}, finished_at="2026-05-01T10:20:00+00:00")
    other = make_record("lora")
    for stores in ([[old, other], [new]], [[new], [other, old]]):
        merged = merge_records(stores)
        assert len(merged) == 2
        assert {row.method: row.accuracy for row in shown(Selection(), merged)} == {"grass": 0.7, "lora": 0.5}


def test_a_model_folder_is_shown_and_chosen_by_its_short_name_unless_two_share_it() -> None:
    first, other, twin = (f"model.name={name}" for name in ("/home/a/mine", "/home/a/theirs", "/home/b/mine"))
    records = [make_record("full", overrides=[first]), make_record("full", overrides=[other])]
    assert [table.model for table in build_leaderboard(records)] == ["mine", "theirs"]
    assert [row.model for row in shown(Selection(models=("mine",)), records)] == ["/home/a/mine"]
    assert [row.model for row in shown(Selection(models=("/home/a/mine",)), records)] == ["/home/a/mine"]
    records.append(make_record("full", overrides=[twin]))
    assert [table.model for table in build_leaderboard(records)] == ["/home/a/mine", "theirs", "/home/b/mine"]
