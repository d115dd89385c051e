"""Conversations in training and evaluation: what is learned, kept apart, and measured, against plain references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from small import short_run

from grass_ray.config import ConfigError, DataConfig, EvaluationConfig, RunConfig
from grass_ray.tasks.conversations import SIMPLE
from grass_ray.tasks.dataset_rows import find_dataset
from grass_ray.tasks.evaluation import evaluate
from grass_ray.tasks.shards import merge_shards
from grass_ray.training.checks import check_run
from grass_ray.training.lost_rows import describe_lost_rows, find_lost_rows
from grass_ray.training.models import load_model
from grass_ray.training.run import Run
from grass_ray.training.survey import survey_data


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(number: int) -> list[dict[str, str]]:
    turns = [turn("system", "Be short.")] * (number % 2)
    for step in range(1 + number % 3):
        turns += [turn("user", f"What is {number} + {step}?"), turn("assistant", f"It is {number + step}.")]
    return turns


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(24)))
    return file


def config_of(path: Path, *overrides: str, method: str = "full") -> RunConfig:
    source = find_dataset(str(path))
    data = DataConfig(suite=source.name, tasks=(source.name,), source=source)
    config = short_run(method, steps=3).model_copy(update={"data": data})
    return config.override({"evaluation.scoring": "loss", **dict(o.split("=", 1) for o in overrides)})


def reference(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[float, int, int]:
    """Nats, tokens and bytes of the assistant's turns: one forward per turn, written out from the template's text."""
    text, nats, count, size = "", 0.0, 0, 0
    for message in messages:
        text += f"### {message['role'].capitalize()}:\n"
        if message["role"] == "assistant":
            before = tokenizer(text, add_special_tokens=False)["input_ids"]
            text += message["content"] + tokenizer.eos_token
            whole = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=whole).logits[0, len(before) - 1 : -1]
            nats += float(functional.cross_entropy(logits, whole[0, len(before) :], reduction="sum"))
            count += len(logits)
            size += len(message["content"].encode())
        else:
            text += message["content"]
        text += "\n\n"
    return nats, count, size


def test_held_out_loss_is_that_of_plain_forwards(path: Path) -> None:
    config = config_of(path, "evaluation.batch_size=2").override({"data.source.test": str(path)})
    loaded = load_model(config.model)
    (result,) = evaluate(loaded.model, loaded.tokenizer, config.data, config.evaluation).values()
    assert len(result.examples) == 24
    wanted = [reference(loaded.model.eval(), loaded.tokenizer, conversation(number)) for number in range(24)]
    for example, (nats, tokens, size) in zip(result.examples, wanted, strict=True):
        assert (example.answer_tokens, example.answer_bytes) == (tokens, size)
        assert example.answer_nats == pytest.approx(nats, rel=1e-5)
    nats, tokens, size = (sum(column) for column in zip(*wanted, strict=True))
    assert result.text_loss is not None
    assert result.text_loss.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert result.text_loss.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result.text_loss.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result.loss == pytest.approx(sum(n / t for n, t, _ in wanted) / 24, rel=1e-5)
    assert math.isnan(result.accuracy)


def test_shards_of_held_out_rows_make_the_whole(path: Path) -> None:
    config = config_of(path, "evaluation.batch_size=1").override({"data.source.test": str(path)})
    loaded = load_model(config.model)

    def measure(**options: Any) -> Any:
        return evaluate(loaded.model, loaded.tokenizer, config.data, config.evaluation, **options)

    merged = merge_shards([measure(shard=(index, 3)) for index in range(3)])
    whole = measure()
    assert merged == whole
    nats = [[example.answer_nats for example in result["chats"].examples] for result in (merged, whole)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-6)
    limited = evaluate(loaded.model, loaded.tokenizer, config.data, EvaluationConfig(scoring="loss", limit=5))
    assert len(limited["chats"].examples) == 5
    assert {e.id for e in limited["chats"].examples} < {e.id for e in whole["chats"].examples}


def test_a_packed_step_has_the_loss_of_its_conversations_alone(path: Path) -> None:
    losses = {}
    for batching in ("plain", "packed"):
        run = Run.prepare(config_of(path, f"data.batching={batching}"))
        losses[batching] = [report.loss for report in run.fit()]
    assert losses["packed"] == pytest.approx(losses["plain"], rel=1e-5)
    (batch,) = run.state.batches[0]
    texts = [run.tokenizer.decode(ids) for ids in batch.documents()]
    assert len(batch.input_ids) < len(texts) == 4  # several conversations share a row
    assert all(text.startswith("### ") and text.endswith("<|end|>\n\n") for text in texts)
    learned = batch.input_ids.roll(-1, dims=1)[batch.labels != -100]
    assert torch.equal(learned, batch.labels[batch.labels != -100])
    assert int((batch.labels == run.tokenizer.eos_token_id).sum()) == sum(text.count("<|end|>") for text in texts)


def test_a_run_learns_from_conversations_and_records_what_they_were(path: Path) -> None:
    run = Run.prepare(config_of(path, "training.steps=12", "data.validation_rows=3", method="lora"))
    reports = list(run.fit())
    run.evaluate()
    outcome = run.outcome()
    assert reports[-1].loss < reports[0].loss
    for name in ("loss", "nats_per_token", "bits_per_byte", "perplexity"):
        assert outcome.metrics[f"eval/chats/{name}"] > 0
    assert "eval/chats/accuracy" not in outcome.metrics
    (file,) = outcome.data["train"]["files"]
    assert (file["name"], file["shape"], file["rows"], file["rows_held_out"]) == (str(path), "messages", 22, 2)
    protocol = outcome.tasks["chats"].protocol
    assert (protocol["rendering"], protocol["max_length_tokens"], protocol["test_rows"]) == ("chat", 256, 2)
    assert protocol["test_file"] == f"{path}, 2 held out"


def test_long_empty_and_refused_rows_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [turn("user", "Hi?"), turn("assistant", "Ho.")]} for _ in range(2)]
    rows += [{"messages": [turn("user", "long " * 99), turn("assistant", "Ho.")]}]
    rows += [{"messages": [turn("user", "Hi?"), turn("assistant", "ho " * 99)]}]
    rows += [{"messages": [turn("assistant", "Ho."), turn("user", "Hi?")]}]
    rows += [{"messages": []}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    (tmp_path / "unmarked.jinja").write_text(SIMPLE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    own = {"data.source.test": str(tmp_path / "test.jsonl"), "data.max_length_tokens": 64}
    own["data.source.chat_template"] = str(tmp_path / "unmarked.jinja")
    config = config_of(path).override({**own, "data.broken_rows": "skip"})
    tokenizer = load_model(config.model).tokenizer
    expected = [
        "skipped   1 training rows: they could not be used",
        "dropped   1 of 5 training rows: no answer within 64 tokens; raise data.max_length_tokens",
        "dropped   1 of 5 training rows: the chat template refuses them",
        "cut       1 of 5 training rows at 64 tokens: the end of their answers is lost; raise data.max_length_tokens",
    ]
    assert find_lost_rows(config, tokenizer) == expected
    run = Run.prepare(config)
    assert describe_lost_rows(run.outcome().data, 64) == expected
    with pytest.raises(ConfigError, match=r"row 6: 'messages' is empty"):
        check_run(config.override({"data.broken_rows": "refuse"}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(ConfigError, match=rf"1 of 5 rows cannot be used: row 5 of {path}: its only message of the"):
        check_run(config.override({"data.broken_rows": "refuse"}))


def test_a_survey_shows_lengths_and_what_is_learned(path: Path) -> None:
    config = config_of(path)
    survey = survey_data(config, load_model(config.model).tokenizer)
    assert sum(count for _, _, count in survey.histogram) == len(survey.lengths) == 22
    assert survey.histogram[0][0] == min(survey.lengths)
    assert "chat template: the tokenizer's own; the assistant's turns are learned (marked" in survey.rendering
    first = survey.examples[0]
    learned = [text for text, own in first.segments if own]
    said = [message["content"] for message in conversation(0) if message["role"] == "assistant"]
    assert learned[: len(said)] == [f"{text}<|end|>" for text in said]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evaluation.scoring=generation",), "the rows of chats have no right answer, so generation scoring has noth"),
        (("evaluation.scoring=loglikelihood",), "so loglikelihood scoring has nothing to compare; use evaluation.scor"),
        (("data.max_length_tokens=8",), "none of 22 training rows has an answer within 8 tokens"),
        (("data.source.chat_template=gone.jinja",), "cannot read the chat template gone.jinja: No such file"),
        (("data.source.shape=text",), "24 of 24 rows cannot be used: row 1: no 'text'; it has 'messages'"),
        (("data.source.columns.messages=dialog",), "has the columns messages, which are no shape that is known"),
        (("data.source.test=gone.jsonl",), "there is no data set gone.jsonl"),
        (("data.suite=other",), "a data set is its own suite: data.suite and data.tasks must be chats, got other"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_run(config_of(path, *overrides))
    assert message in str(error.value)
