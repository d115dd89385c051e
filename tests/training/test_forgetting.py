"""What was forgotten: the loss on an unrelated text before and after training, against plain forwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from result_records import answers, make_record
from small import short_run

from grass_ray.config import ConfigError
from grass_ray.paths import with_absolute_paths
from grass_ray.results.columns import row_values
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.rendering import render
from grass_ray.tasks.unrelated import MOST_PASSAGES, generate_passages, load_unrelated
from grass_ray.training.checks import check_run
from grass_ray.training.forgetting import loss_on
from grass_ray.training.models import load_model
from grass_ray.training.run import Run

GENERATED = "evaluation.forgetting=generated"


def mean_loss(model: Any, tokenizer: Any, passages: tuple[str, ...], most: int) -> float:
    """The mean over all tokens, one passage at a time."""
    losses = []
    for passage in passages:
        ids = torch.tensor([tokenizer(passage)["input_ids"][:most]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -ids.shape[1] : -1]  # behind virtual tokens
        losses.append(functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "prefix", "grass"])
def test_losses_before_and_after_are_those_of_plain_forwards(method: str) -> None:
    run = Run.prepare(short_run(method, GENERATED, "method.optimizer.lr=0.01", steps=6))
    list(run.fit())
    run.evaluate()
    outcome = run.outcome()
    loaded = load_model(run.config.model)
    passages = generate_passages()
    before = mean_loss(loaded.model.eval(), loaded.tokenizer, passages, 768)
    after = mean_loss(run.state.model.eval(), loaded.tokenizer, passages, 768)
    metrics = outcome.metrics
    assert metrics["forgetting/loss_before"] == pytest.approx(before, rel=1e-5)
    assert metrics["forgetting/loss_after"] == pytest.approx(after, rel=1e-5)
    assert metrics["forgetting"] == metrics["forgetting/loss_after"] - metrics["forgetting/loss_before"] != 0
    assert outcome.data["forgetting"] == load_unrelated("generated").provenance


@pytest.mark.parametrize("settings", [("lora", "method.adapter.dropout=0.1"), ("prompt",), ("prefix",), ("grass",)])
def test_measuring_it_does_not_change_what_is_trained(settings: tuple[str, ...]) -> None:
    weights = []
    for overrides in ((), (GENERATED,)):
        run = Run.prepare(short_run(*settings, *overrides, steps=4))
        list(run.fit())
        weights.append(run.weights_sha256())
    assert weights[0] == weights[1]


def test_an_untrained_model_forgets_nothing_and_a_search_measures_nothing() -> None:
    run = Run.prepare(short_run("base", GENERATED, steps=0))
    run.evaluate()
    assert run.outcome().metrics["forgetting"] == 0.0
    searched = Run.prepare(short_run("full", GENERATED, "evaluation.test=false", "data.validation_rows=2"))
    searched.evaluate()
    assert "forgetting" not in searched.outcome().metrics


def test_long_passages_are_cut_and_the_mode_of_the_model_stays() -> None:
    loaded = load_model(short_run("full").model)
    text = load_unrelated("generated")
    loaded.model.train()
    found = loss_on(loaded.model, loaded.tokenizer, text, positions=20)
    assert loaded.model.training
    assert found == pytest.approx(mean_loss(loaded.model.eval(), loaded.tokenizer, text.passages, 20), rel=1e-5)


def test_generated_passages_are_many_different_and_always_the_same() -> None:
    passages = generate_passages()
    assert len(set(passages)) == MOST_PASSAGES
    generate_passages.cache_clear()
    assert generate_passages() == passages
    assert load_unrelated("generated").provenance["sha256"].startswith("418c2873")


def test_a_text_file_and_a_data_set_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("\ufeffOne.\r\nTwo.\r\n\r\n\r\nThree.\r\n".encode())
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": f"Page {n}"}) + "\n" for n in range(150)))
    book, wiki = (load_unrelated(str(tmp_path / name)) for name in ("book.txt", "wiki.jsonl"))
    assert book.passages == ("One.\nTwo.", "Three.")
    assert (len(wiki.passages), wiki.provenance["passages"]) == (100, 100)
    assert wiki.provenance["name"] == str(tmp_path / "wiki.jsonl")


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("One.")
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(short_run("full", "evaluation.forgetting=book.txt"))
    assert config.evaluation.forgetting == str(tmp_path / "book.txt")
    assert with_absolute_paths(short_run("full", GENERATED)).evaluation.forgetting == "generated"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "cannot read gone.txt: No such file or directory"),
        ("gone.jsonl", None, "there is no text evaluation.forgetting=gone.jsonl; give generated, a text file"),
        ("empty.txt", " \n", "evaluation.forgetting=empty.txt holds no text"),
        ("bytes.txt", b"One.\n\n\xff", "bytes.txt: passage 2 is not UTF-8 text"),
        (
            "chats.jsonl",
            '{"messages": []}\n',
            "chats.jsonl: 1 of 1 rows cannot be used: row 1: no 'text'; it has 'messa",
        ),
    ],
)
def test_a_text_that_cannot_be_used_is_said_before_a_model_is_loaded(
    name: str, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        check_run(short_run("full", f"evaluation.forgetting={name}"))
    assert message in str(error.value)


def test_the_leaderboard_has_a_column_where_it_was_measured() -> None:
    records = [
        make_record(method, seed=seed, correct={"generated": answers(5, 20)}, metrics={"forgetting": value + seed / 10})
        for method, value in (("full", 0.5), ("lora", 0.1))
        for seed in (0, 1)
    ]
    (table,) = build_leaderboard(records)
    found = {row.method: (row.forgetting, row.forgetting_std) for row in table.rows}
    assert found["full"] == (pytest.approx(0.55), pytest.approx(0.0707, abs=1e-3))
    text = render([table], "table")
    assert "forgot" in text
    assert "+0.550" in text
    assert row_values(table.rows[0])["forgetting"] is not None
    assert "different texts" not in text
    for record, name in zip(records, ("wiki", "wiki", "book", "book"), strict=True):
        record.data["forgetting"] = {"name": name, "sha256": name}
    text = " ".join(build_leaderboard(records)[0].all_notes)
    assert "forgot: measured on different texts, which cannot be compared: book book, wiki wiki" in text
    without = build_leaderboard([make_record("full", correct={"generated": answers(5, 20)})])
    assert "forgot" not in render(without, "table")
    assert without[0].rows[0].forgetting is None
