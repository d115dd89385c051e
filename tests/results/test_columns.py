"""A column of a leaderboard is one entry: added to ``COLUMNS``, it is in every output and may be sorted by."""

from __future__ import annotations

import csv
import io
import json

import pytest
from result_records import answers, make_record

from grass_ray.results import columns
from grass_ray.results.column import Column
from grass_ray.results.columns import COLUMNS, overview_rows, sort_keys, task_column
from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.rendering import render
from grass_ray.results.rows import LeaderboardRow
from grass_ray.results.selection import Selection


def gib_hours(row: LeaderboardRow) -> float | None:
    return None if row.train_s is None else (row.peak_allocated_gib or 0.0) * row.train_s / 3600


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[LeaderboardTable]:
    added = Column(
        "gib_hours",
        "GiB h",
        gib_hours,
        form=lambda value: "-" if value is None else f"{value:.2f}",
        meaning="peak memory times training time",
        small_first=True,
    )
    monkeypatch.setattr(columns, "COLUMNS", (*COLUMNS, added))

    def trained(method: str, gib: float) -> object:
        metrics = {"memory/peak_allocated_gib": gib, "time/train_s": 1800.0}
        return make_record(method, correct={"generated": answers(9, 20)}, metrics=metrics)

    return build_leaderboard([trained("full", 3.0), trained("grass", 1.5)])  # type: ignore[list-item]


def test_an_added_column_is_in_every_output(tables: list[LeaderboardTable]) -> None:
    for format in ("table", "markdown", "html"):
        text = render(tables, format)  # type: ignore[arg-type]
        assert "0.75" in text, format
        assert "GiB" in text, format
        assert "1.50" in text, format
    assert "peak memory times training time" in render(tables, "html")
    assert {row["method"]: row["gib_hours"] for row in json.loads(render(tables, "json"))} == {
        "full": 1.5,
        "grass": 0.75,
    }
    lines = csv.DictReader(io.StringIO(render(tables, "csv")))
    assert {line["method"]: line["gib_hours"] for line in lines} == {"full": "1.5", "grass": "0.75"}
    assert {row["method"]: row["GiB h"] for row in overview_rows(tables)} == {"full": 1.5, "grass": 0.75}


def test_an_added_column_is_a_key_of_sort(tables: list[LeaderboardTable]) -> None:
    assert "gib_hours" in sort_keys()
    for reverse, expected in ((False, ["grass", "full"]), (True, ["full", "grass"])):
        (table,) = Selection(sort="gib_hours", reverse=reverse).tables(tables)
        assert [row.method for row in table.rows] == expected


def test_keys_and_headings_are_unique_and_explained() -> None:
    for values in (
        [column.key for column in COLUMNS],
        [column.name for column in COLUMNS if column.name],
        [column.mlflow or column.name for column in COLUMNS if column.mlflow or column.name],
    ):
        assert len(values) == len(set(values))
    assert [column.key for column in COLUMNS if column.name and not column.meaning] == []


def test_a_value_that_is_not_finite_is_none_and_a_dash() -> None:
    (table,) = build_leaderboard([make_record()])
    (row,) = table.rows
    broken = Column("broken", "broken", lambda row: float("nan"))
    assert (broken.raw(row), broken.value(row), broken.cell(row)) == (None, None, "-")
    assert task_column("generated").cell_with_interval(row) == "50.0 (15.0-85.0)"
