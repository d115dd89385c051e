"""The sentences above a table say what its comparisons say, and no more."""

from __future__ import annotations

from dataclasses import replace

from result_records import answers, make_record

from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.page.answer import findings
from grass_ray.results.record import RunRecord


def table_of(*records: RunRecord) -> LeaderboardTable:
    (table,) = build_leaderboard(records)
    return table


def run(method: str, right: int, **more: int) -> RunRecord:
    return make_record(method, correct={"generated": answers(right, 100)}, **more)


def test_rows_that_differ_and_rows_that_do_not() -> None:
    said = findings(table_of(run("grass", 60), run("full", 58), run("lora", 10)))
    assert said.startswith("grass has the highest accuracy, 60.0 % (95 % interval 50.2-69.1). At the 5 % level")
    assert "grass is better than lora; it cannot be told from full." in said
    assert "Compared with full fine-tuning, lora is worse; grass cannot be told from it." in said
    assert said.endswith("With one seed on a side, this holds for these runs alone, not for other seeds.")


def test_all_and_none() -> None:
    assert "grass is better than every other row." in findings(table_of(run("grass", 60), run("lora", 10)))
    assert "grass cannot be told from any other row." in findings(table_of(run("grass", 60), run("lora", 59)))


def test_full_as_the_first_row_is_not_said_twice() -> None:
    said = findings(table_of(run("full", 90), run("lora", 10)))
    assert "full is better than every other row" in said
    assert "Compared with" not in said


def test_better_than_full() -> None:
    said = findings(table_of(run("grass", 95), run("lora", 90), run("full", 10)))
    assert "Compared with full fine-tuning, grass and lora are better." in said


def test_ties_share_the_first_rank() -> None:
    said = findings(table_of(run("grass", 60), run("lisa", 60)))
    assert said.startswith("grass and lisa have the highest accuracy, 60.0 %")
    assert "grass cannot be told from any other row" in said


def test_several_seeds_speak_of_any_seed() -> None:
    records = [run(method, right, seed=seed) for method, right in (("grass", 60), ("lora", 10)) for seed in (0, 1)]
    assert "these runs" not in findings(table_of(*records))


def test_a_filter_may_leave_the_best_row_out() -> None:
    table = table_of(run("grass", 60), run("lora", 10))
    said = findings(replace(table, rows=table.rows[1:]))
    assert "highest" not in said
    assert "the best row is better than every other row" in said


def test_nothing_ranked() -> None:
    assert findings(table_of(make_record(status="failed", failure="no"))) == "No row is ranked."
    assert findings(table_of(run("grass", 60))).endswith("(95 % interval 50.2-69.1).")
