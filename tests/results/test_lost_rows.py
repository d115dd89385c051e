"""Rows of data that were lost are said in every format, and that rows of a table trained on different numbers."""

from __future__ import annotations

import csv
import io
import json

from result_records import make_record

from grass_ray.config import RunConfig
from grass_ray.export.card import render_card
from grass_ray.results.columns import overview_rows
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render

LOST = "dropped 38 of 40 training rows: no answer within 256 tokens; raise data.max_length_tokens"


def with_rows(record: RunRecord, used: int, dropped: int) -> RunRecord:
    record.data |= {"train_rows_used": used, "train_rows_truncated": dropped, "train_rows_dropped": dropped}
    return record


def test_dropped_rows_are_said_in_every_format() -> None:
    tables = build_leaderboard(
        [with_rows(make_record("grass"), 2, 38), make_record("base", overrides=["training.steps=0"])]
    )
    for text in (render(tables, "table"), render(tables, "markdown").replace("\\", ""), render(tables, "html")):
        assert LOST in " ".join(text.split())
    assert "| 2! |" in render(tables, "markdown")
    row = next(row for row in json.loads(render(tables, "json")) if row["method"] == "grass")
    assert (row["train_rows"], row["train_rows_dropped"]) == (2, 38)
    line = next(csv.DictReader(io.StringIO(render(tables, "csv"))))
    assert {"train_rows", "train_rows_dropped"} <= line.keys()
    shown = {row["method"]: row["rows dropped"] for row in overview_rows(tables)}
    assert shown == {"grass": 38, "base": None}


def test_rows_are_named_where_others_lost_nothing() -> None:
    records = [
        with_rows(make_record("grass", overrides=["data.max_length_tokens=32"]), 2, 38),
        with_rows(make_record("full"), 40, 0),
        make_record("lora"),  # an old record says nothing
    ]
    (table,) = build_leaderboard(records)
    (note,) = [note for note in table.notes if "dropped" in note]
    assert note.startswith("grass: dropped 38 of 40 training rows: no answer within 32 tokens")
    assert table.budget is not None
    assert "2 rows trained on (grass)" in table.budget or "40 rows trained on (full)" in table.budget
    assert table.budget.startswith("budgets differ")


def test_nothing_is_said_where_nothing_was_lost() -> None:
    (table,) = build_leaderboard([with_rows(make_record("grass"), 40, 0), with_rows(make_record("full"), 40, 0)])
    assert not any("dropped" in note or "skipped" in note for note in table.notes)
    assert table.budget is not None
    assert table.budget.startswith("same budget")


def test_broken_rows_that_were_skipped_are_said() -> None:
    record = make_record("grass")
    record.data |= {"train_rows_empty": 4, "train_rows_truncated": 5, "train_rows_used": 37}
    record.data["train"] = {"rows_skipped": 3, "rows": 37, "rows_available": 37, "rows_sha256": "ab" * 32}
    record.tasks["generated"].protocol["test_rows_skipped"] = 2
    (table,) = build_leaderboard([record])
    assert "dropped 4 of 41 training rows: their output is empty" in table.notes
    assert any(note.startswith("cut 5 of 41 training rows at 256 tokens") for note in table.notes)
    assert "skipped 3 training rows: they could not be used" in table.notes
    assert "skipped 2 test rows of generated: they could not be used" in table.notes


def test_a_card_says_it_too() -> None:
    record = with_rows(make_record("grass"), 2, 38)
    record.data["train"] = {"rows": 40, "rows_available": 40, "description": "mine", "rows_sha256": "ab" * 32}
    assert f"- {LOST}" in render_card("mine", "model", RunConfig.parse(record.config), record)
