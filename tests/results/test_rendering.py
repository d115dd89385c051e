from __future__ import annotations

import csv
import io
import json
import math

import pytest
from result_records import answers, make_record

from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.rendering import render

TASKS = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


@pytest.fixture
def tables() -> list[LeaderboardTable]:
    metrics = {
        "memory/peak_allocated_gib": 12.345,
        "memory/peak_reserved_gib": 14.0,
        "memory/host_pinned_gib": math.nan,
        "throughput/tokens_per_second": 4100.0,
        "time/train_s": 90.0,
    }

    def eight(method: str, right: int, **more: object) -> object:
        return make_record(
            method, suite="commonsense", correct={task: answers(right, 100) for task in TASKS}, metrics=metrics, **more
        )

    failed = make_record("lisa", status="failed", failure="<b>a | b</b>\nsecond line", suite="commonsense")
    failed.config["data"]["tasks"] = TASKS
    return build_leaderboard([eight("grass", 60), eight("grass", 62, seed=1), eight("full", 61), failed])


def test_terminal_fits_a_hundred_columns(tables: list[LeaderboardTable]) -> None:
    text = render(tables, "table")
    assert max(map(len, text.splitlines())) <= 100
    for expected in (
        "61.0 ±1.4",
        "12.3",
        "4100",
        "1.5",
        "arc_challenge",
        "lisa: failed - seed 0: <b>a | b</b> second line",
    ):
        assert expected in text
    assert "pinned" not in text, "a column without any number"


def test_a_narrow_terminal_gets_tables_below_each_other_with_whole_numbers_and_words(
    tables: list[LeaderboardTable],
) -> None:
    text = render(tables, "table", width=60)
    assert max(map(len, text.splitlines())) <= 60
    for expected in ("61.0 ±1.4", "57.5-64.2", "12.3", "4100", "finished", "arc_challenge"):
        assert expected in text
    assert text.count("#  method") > 2


def test_markdown_is_a_table(tables: list[LeaderboardTable]) -> None:
    lines = [line for line in render(tables, "markdown").splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<b>" not in render(tables, "markdown")


def test_the_budget_is_said_in_every_readable_format(tables: list[LeaderboardTable]) -> None:
    for format in ("table", "markdown", "html"):
        assert "same budget: 50 steps, 8 rows a step" in " ".join(render(tables, format).split())  # type: ignore[arg-type]


def test_rows_that_ended_alike_share_a_line() -> None:
    records = [make_record(method, status="failed", failure="the disk is full") for method in ("full", "lora", "lisa")]
    text = render(build_leaderboard(records), "table")
    assert "full, lisa, lora: failed - seed 0: the disk is full" in text
    assert text.count("the disk is full") == 1


def test_json_is_one_flat_list(tables: list[LeaderboardTable]) -> None:
    rows = json.loads(render([*tables, *build_leaderboard([make_record()])], "json"))
    assert [row["rank"] for row in rows] == [1, 1, None, 1]
    assert rows[0]["host_pinned_gib"] is None
    assert rows[0]["tasks"]["piqa"] in (0.61, pytest.approx(0.61))


def test_csv_has_a_column_a_task(tables: list[LeaderboardTable]) -> None:
    rows = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    assert len(rows) == 3
    assert float(rows[0]["eval/piqa/accuracy"]) == pytest.approx(0.61)
    assert {row["seeds"] for row in rows} == {"0 1", "0", ""}
    assert rows[2]["failure"] == "seed 0: <b>a | b</b>\nsecond line"


@pytest.mark.parametrize(
    ("format", "expected"), [("table", "no runs yet"), ("markdown", "no runs yet"), ("json", "[]")]
)
def test_no_runs(format: str, expected: str) -> None:
    assert render([], format) == expected
    assert "no runs yet" in render([], "html")


def test_the_untrained_model_has_dashes() -> None:
    trained = make_record(metrics={"memory/peak_allocated_gib": 1.0, "throughput/tokens_per_second": 5.0})
    text = render(build_leaderboard([make_record("base"), trained]), "markdown")
    (line,) = [line for line in text.splitlines() if "| base |" in line]
    (header,) = [line for line in text.splitlines() if "method" in line]
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert (cells["acc. %"], cells["alloc. GiB"], cells["tok/s"]) == ("50.0", "-", "-")
