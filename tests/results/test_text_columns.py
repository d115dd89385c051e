"""Loss on held-out text in the leaderboard: ranked by it, in bits per byte and as perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from result_records import make_record

from grass_ray.results.columns import column_of, row_values, sort_keys
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render

TOKENS, BYTES = [10, 30, 20, 40], [50, 100, 90, 160]


def on_text(method: str, seed: int = 0, *, per_token: float, known: bool = True) -> RunRecord:
    """A run that was scored on four held-out rows, each with its own loss per token."""
    record = make_record(method, seed=seed)
    record.config["evaluation"]["scoring"] = "loss"
    score = record.tasks["generated"]
    score.scoring, score.accuracy, score.correct, score.option_nats = "loss", math.nan, [False] * 4, None
    score.answer_tokens = TOKENS
    score.answer_nats = [tokens * (per_token + row / 10) for row, tokens in enumerate(TOKENS)]
    score.answer_bytes = BYTES if known else None
    return record


def test_rows_are_ranked_by_loss_and_show_it_over_all_tokens_too() -> None:
    records = [on_text(method, per_token=loss) for method, loss in (("full", 2.0), ("lora", 1.5), ("base", 3.0))]
    (table,) = build_leaderboard(records)
    assert [(row.method, row.rank) for row in table.rows] == [("lora", 1), ("full", 2), ("base", 3)]
    first = table.rows[0]
    nats = sum(tokens * (1.5 + row / 10) for row, tokens in enumerate(TOKENS))
    assert first.loss == pytest.approx(1.65)  # every row counts alike
    assert first.perplexity == pytest.approx(math.exp(nats / 100))  # every token does
    assert first.bits_per_byte == pytest.approx(nats / math.log(2) / 400)
    text = render([table], "table", width=200)
    assert "bits/byte" in text
    assert f"{first.perplexity:.2f}" in text
    assert "acc. %" not in text
    assert json.loads(render([table], "json"))[0]["bits_per_byte"] == pytest.approx(first.bits_per_byte)
    assert {"bits_per_byte", "perplexity", "forgetting"} <= set(sort_keys())
    assert column_of("perplexity").small_first


def test_seeds_are_averaged_and_one_without_bytes_leaves_the_columns_out() -> None:
    (table,) = build_leaderboard([on_text("full", seed, per_token=2.0 + seed) for seed in (0, 1)])
    alone = [build_leaderboard([on_text("full", seed, per_token=2.0 + seed)])[0].rows[0] for seed in (0, 1)]
    assert table.rows[0].bits_per_byte == pytest.approx(sum(row.bits_per_byte or 0 for row in alone) / 2)
    assert table.rows[0].perplexity == pytest.approx(math.sqrt(math.prod(row.perplexity or 0 for row in alone)))
    mixed = [on_text("full", 0, per_token=2.0), on_text("full", 1, per_token=3.0, known=False)]
    (table,) = build_leaderboard(mixed)
    assert table.rows[0].bits_per_byte is None
    assert "bits/byte" not in render([table], "table", width=200)
    assert row_values(table.rows[0])["perplexity"] is None


def test_a_record_keeps_its_bytes_and_older_ones_have_none(tmp_path: Path) -> None:
    record = on_text("full", per_token=2.0)
    record.save(tmp_path / "record.json")
    assert RunRecord.load(tmp_path / "record.json").tasks["generated"].text_loss == record.tasks["generated"].text_loss
    values = json.loads((tmp_path / "record.json").read_text())
    del values["tasks"]["generated"]["answer_bytes"]
    (tmp_path / "record.json").write_text(json.dumps(values))
    older = RunRecord.load(tmp_path / "record.json")
    assert older.tasks["generated"].text_loss is None
    assert older.tasks["generated"].loss == record.tasks["generated"].loss
