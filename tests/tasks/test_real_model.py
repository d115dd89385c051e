"""With a real small model, accuracy depends on nothing but the questions: not on batches, padding, workers or order."""

import re

import pytest
from task_parts import record, write

from grass_ray.config import ConfigError, DataConfig, EvaluationConfig, FolderSource, ModelConfig
from grass_ray.tasks.evaluation import evaluate, merge_shards
from grass_ray.training.models import load_model

pytestmark = pytest.mark.long

FORMAT = "\n\nAnswer format: answer1/answer2/answer3"
QUESTIONS = [
    ("What do bees make?", ("honey", "paper", "glass"), 1),
    ("Which of these is a planet that goes around the sun, like the Earth does?", ("a cloud", "Mars", "a lamp"), 2),
    ("Water freezes at", ("0 degrees Celsius", "50 degrees Celsius", "100 degrees Celsius"), 1),
    (
        "A farmer has a field of corn and wants to know, before the autumn, how much of it will be eaten by birds. "
        "What would help most to find out, without doing any harm to the birds or to the field?",
        ("watching the field for some days", "cutting all of the corn down", "painting the barn in another colour"),
        1,
    ),
    ("Fire is", ("cold", "wet", "hot"), 3),
    ("Which animal can fly?", ("a dog, which has four legs and a tail", "a snake", "an eagle"), 3),
]


@pytest.fixture(scope="module")
def loaded():
    try:
        return load_model(ModelConfig(name="smollm2-135m"))
    except ConfigError as absent:
        pytest.skip(str(absent))


def questions(folder, *, backwards: bool = False) -> DataConfig:
    rows = []
    for question, options, right in QUESTIONS[:: -1 if backwards else 1]:
        listed = " ".join(f"Answer{number}: {text}" for number, text in enumerate(options, start=1))
        text = f"Please choose the correct answer to the question: {question}\n\n{listed}{FORMAT}"
        rows.append(record(f"answer{right}", instruction=text))
    write(folder / "dataset/ARC-Easy/test.json", rows)
    return DataConfig(suite="commonsense", tasks=("arc_easy",), source=FolderSource(path=str(folder)))


def answers(result) -> dict[str, tuple[object, ...]]:
    """What was said to each question, numbers apart from words."""
    return {e.id: (e.extracted, e.correct, re.sub(r"-\d+\.\d+", "#", e.output)) for e in result.examples}


def numbers(result) -> dict[str, list[float]]:
    return {e.id: [float(value) for value in re.findall(r"-\d+\.\d+", e.output)] for e in result.examples}


@pytest.mark.parametrize("scoring", ["loglikelihood", "generation"])
def test_answers_depend_on_the_questions_alone(loaded, tmp_path, scoring):
    model, tokenizer = loaded.model, loaded.tokenizer
    data, auto = questions(tmp_path), EvaluationConfig(scoring=scoring)
    found = {"auto": evaluate(model, tokenizer, data, auto)["arc_easy"]}
    side = tokenizer.padding_side
    for batch_size, tokenizer.padding_side in ((1, "right"), (4, "left")):
        config = auto.model_copy(update={"batch_size": batch_size})
        found[f"{batch_size} {tokenizer.padding_side}"] = evaluate(model, tokenizer, data, config)["arc_easy"]
    tokenizer.padding_side = side
    parts = [evaluate(model, tokenizer, data, auto, shard=(worker, 3)) for worker in range(3)]
    found["3 workers"] = merge_shards(parts)["arc_easy"]
    found["backwards"] = evaluate(model, tokenizer, questions(tmp_path / "b", backwards=True), auto)["arc_easy"]
    assert [example.id for example in found["backwards"].examples] == [e.id for e in found["auto"].examples][::-1]
    assert len(set(answers(found["auto"]).values())) > 1, "the model must tell questions apart"
    for name, result in found.items():
        assert answers(result) == answers(found["auto"]), name
        assert result.accuracy == found["auto"].accuracy, name
        for question, values in numbers(result).items():
            assert values == pytest.approx(numbers(found["auto"])[question], abs=2e-3), name
