import json
import random
from dataclasses import asdict

import pytest
from task_parts import make_model, make_tokenizer, record, write

from grass_ray.config import DataConfig, EvaluationConfig, FolderSource
from grass_ray.tasks.evaluation import evaluate, merge_shards
from grass_ray.tasks.shards import split_by_cost


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Two tasks; the second has fewer questions than shards, a question that comes twice, and 2 or 3 options."""
    lengths = random.Random(0).sample(range(40), 7)
    boolq = [record("true" if n % 3 else "false", instruction=f"is it {'very ' * n}long?") for n in lengths]
    two, three = (
        record("answer1", instruction=f"Choose:\n\nAnswer format: {form}")
        for form in ("answer1/answer2", "answer1/answer2/answer3")
    )
    write(tmp_path / "dataset/boolq/test.json", boolq)
    write(tmp_path / "dataset/ARC-Easy/test.json", [two, three, two])
    return DataConfig(suite="commonsense", tasks=("boolq", "arc_easy"), source=FolderSource(path=str(tmp_path)))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2, "limit": 5}, {"scoring": "loglikelihood"}])
def test_merged_shards_are_the_evaluation_that_was_never_split(model, tokenizer, data, settings):
    config = EvaluationConfig(batch_size=3, **settings)
    whole = evaluate(model, tokenizer, data, config)
    for count in (1, 2, 3, 4):
        parts = [evaluate(model, tokenizer, data, config, shard=(index, count)) for index in range(count)]
        assert sum(len(part["boolq"].examples) for part in parts) == len(whole["boolq"].examples)
        assert max(len(part["boolq"].examples) for part in parts) < len(whole["boolq"].examples) or count == 1
        assert merge_shards(parts[::-1]) == whole
        for part in parts:
            for result in part.values():
                json.dumps(asdict(result))  # plain data, or workers could not gather it


def test_shards_that_do_not_belong_together_are_refused(model, tokenizer, data):
    config = EvaluationConfig(limit=4)
    first, second = (evaluate(model, tokenizer, data, config, shard=(index, 2)) for index in range(2))
    with pytest.raises(ValueError, match=r"shards \[0\] of 2"):
        merge_shards([first])
    with pytest.raises(ValueError, match=r"shards \[0, 0\] of 2"):
        merge_shards([first, first])
    other = evaluate(model, tokenizer, data, EvaluationConfig(limit=4, num_beams=2), shard=(1, 2))
    with pytest.raises(ValueError, match="different ways"):
        merge_shards([first, other])
    with pytest.raises(ValueError, match="different tasks"):
        merge_shards([first, {"boolq": second["boolq"]}])
    with pytest.raises(ValueError, match="no shards"):
        merge_shards([])


def test_shards_take_equally_long_and_lose_nothing():
    generator = random.Random(1)
    costs = [generator.lognormvariate(5, 1) for _ in range(200)]
    for count in (1, 2, 3, 7):
        shards = split_by_cost(costs, count)
        assert sorted(position for shard in shards for position in shard) == list(range(200))
        work = [sum(costs[position] for position in shard) for shard in shards]
        assert max(work) <= 1.02 * min(work)
    assert [len(shard) for shard in split_by_cost([1.0, 1.0], 3)] == [1, 1, 0]
    with pytest.raises(ValueError, match="0 shards"):
        split_by_cost(costs, 0)
