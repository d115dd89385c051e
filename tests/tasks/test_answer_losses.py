import math

import pytest
import torch
from task_parts import make_model, make_tokenizer, record, write

from grass_ray.config import DataConfig, EvaluationConfig, FolderSource, GeneratedSource
from grass_ray.results.provenance import _score
from grass_ray.tasks.encoding import encode_pair, encode_prompt
from grass_ray.tasks.evaluation import evaluate, merge_shards
from grass_ray.tasks.scores import score_metrics
from grass_ray.tasks.sources import load_test_rows
from grass_ray.tasks.templates import render_prompt, render_response

GENERATED = DataConfig(source=GeneratedSource(test_rows=6))
OPTIONS = ("answer1", "answer2", "answer3")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def choices(tmp_path) -> DataConfig:
    form = "\n\nAnswer format: answer1/answer2/answer3"
    rows = [record(f"answer{1 + n % 3}", instruction=f"Choose {n * n}:{form}") for n in range(7)]
    write(tmp_path / "dataset/ARC-Easy/test.json", rows)
    return DataConfig(suite="commonsense", tasks=("arc_easy",), source=FolderSource(path=str(tmp_path)))


def plain(model, tokenizer, prompt: str, answer: str, *, with_space: bool) -> tuple[float, int]:
    """Negative log-likelihood of an answer, perhaps with the white space before it, and its tokens, by one pass."""
    context, continuation = encode_pair(tokenizer, prompt, answer)
    space = len(context) - len(encode_prompt(tokenizer, prompt.rstrip())) if with_space else 0
    context, continuation = context[: len(context) - space], context[len(context) - space :] + continuation
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    pairs = zip(places, continuation, strict=True)
    return -sum(float(logits[place, token]) for place, token in pairs), len(continuation)


@pytest.mark.parametrize("scoring", ["generation", "loss"])
def test_a_number_is_judged_by_its_reference_response(model, tokenizer, scoring):
    result = evaluate(model, tokenizer, GENERATED, EvaluationConfig(scoring=scoring, batch_size=4))["generated"]
    rows = load_test_rows("generated", GENERATED).rows
    for row, example in zip(rows, result.examples, strict=True):
        nats, tokens = plain(model, tokenizer, render_prompt(row, "clean"), render_response(row), with_space=False)
        assert example.answer_nats == pytest.approx(nats, rel=1e-5)
        assert example.answer_tokens == tokens
        assert example.option_nats is None
        assert example.loss == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("scoring", ["generation", "loglikelihood", "loss"])
def test_a_choice_is_judged_by_its_share_among_the_options(model, tokenizer, choices, scoring):
    result = evaluate(model, tokenizer, choices, EvaluationConfig(scoring=scoring, batch_size=3))["arc_easy"]
    rows = load_test_rows("arc_easy", choices).rows
    for row, example in zip(rows, result.examples, strict=True):
        prompt = render_prompt(row, "clean")
        of = {
            option: plain(model, tokenizer, prompt, f"the correct answer is {option}", with_space=True)
            for option in OPTIONS
        }
        right, tokens = of[row.answer]
        whole = math.log(sum(math.exp(-nats) for nats, _ in of.values()))
        assert example.option_nats == pytest.approx(right + whole, rel=1e-4)
        assert example.answer_nats == pytest.approx(right, rel=1e-5)
        assert example.answer_tokens == tokens
        assert example.loss == example.option_nats


def test_without_answers_there_is_a_loss_and_no_accuracy(model, tokenizer, choices):
    config = EvaluationConfig(scoring="loss")
    results = evaluate(model, tokenizer, choices, config)
    metrics = score_metrics(results)
    assert set(metrics) == {"eval/arc_easy/loss", "eval/loss"}
    assert metrics["eval/loss"] == results["arc_easy"].loss
    assert math.isnan(results["arc_easy"].accuracy)
    assert not any(example.correct for example in results["arc_easy"].examples)
    score = _score(results["arc_easy"])
    assert score.losses == [example.loss for example in results["arc_easy"].examples]
    parts = [evaluate(model, tokenizer, choices, config, shard=(index, 3)) for index in range(3)]
    merged = merge_shards(parts)["arc_easy"]
    assert [e.loss for e in merged.examples] == pytest.approx(score.losses, rel=1e-5)
    assert merged == results["arc_easy"]


def test_a_reference_response_costs_what_training_on_it_costs(tokenizer):
    """The loss of a test question is that of the same row in training, but for the end token."""
    model = make_model(tokenizer)
    row = load_test_rows("generated", GENERATED).rows[0]
    context, answer = encode_pair(tokenizer, render_prompt(row, "clean"), render_response(row))
    ids, labels = torch.tensor([context + answer]), torch.tensor([[-100] * len(context) + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = float(model.eval()(input_ids=ids, labels=labels).loss)
    example = evaluate(model, tokenizer, GENERATED, EvaluationConfig(scoring="loss"))["generated"].examples[0]
    assert trained < 0.5
    assert example.loss == pytest.approx(trained, rel=1e-4)
