"""Rows that training loses are counted, said, and refused where none is left."""

import pytest
from small import short_run

from grass_ray.config import ConfigError, CustomSource, DataConfig, EvaluationConfig, RunConfig
from grass_ray.tasks.evaluation import evaluate
from grass_ray.tasks.rows import Row
from grass_ray.tasks.scores import workload_metrics
from grass_ray.training.batches import Batches
from grass_ray.training.checks import check_run
from grass_ray.training.lost_rows import describe_lost_rows, find_lost_rows
from grass_ray.training.models import load_model, load_tokenizer
from grass_ray.training.run import Run

LINE = '{{"instruction": "Is it {}?", "answer": "{}"{}}}\n'


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Two good rows, three without room for an answer, one whose answer is cut, one broken."""
    rows = [
        LINE.format("so", "good", ""),
        LINE.format("long " * 80, "bad", ""),
        LINE.format("long " * 90, "good", ""),
        LINE.format("long " * 99, "good", ""),
        LINE.format("so", "good", f', "output": "{"because " * 12}the correct answer is good"'),
        LINE.format("so", "perhaps", ""),
        LINE.format("not so", "bad", ""),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(rows))
    source = CustomSource(
        name="own", answer="labels", labels=("good", "bad"), max_new_tokens=256, train=str(path), test=str(path)
    )
    data = DataConfig(suite="own", tasks=("own",), source=source, max_length_tokens=64, broken_rows="skip")
    return short_run("full", steps=1).model_copy(update={"data": data})


def test_lost_rows_are_said_before_training_and_recorded(config):
    lines = find_lost_rows(config, load_tokenizer(config.model))
    run = Run.prepare(config)
    assert run.lost_rows() == lines
    assert describe_lost_rows(run.outcome().data, 64) == lines
    assert lines == [
        "skipped   1 training rows: they could not be used",
        "dropped   3 of 6 training rows: no answer within 64 tokens; raise data.max_length_tokens",
        "cut       1 of 6 training rows at 64 tokens: the end of their answers is lost; raise data.max_length_tokens",
    ]
    enough = config.override({"data.max_length_tokens": 1000, "data.broken_rows": "skip"})
    assert find_lost_rows(enough, load_tokenizer(config.model)) == lines[:1]
    assert describe_lost_rows({}, 64) == []


def test_a_run_without_any_row_to_learn_from_is_refused_at_the_door(config):
    with pytest.raises(ConfigError, match="none of 6 training rows has an answer within 8 tokens"):
        check_run(config.override({"data.max_length_tokens": 8}))
    check_run(config)


def test_rows_without_a_response_are_dropped_and_said():
    tokenizer = load_tokenizer(short_run("full").model)
    rows = [Row(instruction=f"{n}?", input="", output=" " * n if n else "it is 0", answer="0") for n in range(4)]
    counts = Batches(rows, tokenizer, DataConfig(), batch_size=1, accumulation_steps=1, seed=0).summary()
    assert counts["train_rows_used"] == 1
    assert describe_lost_rows(counts, 256) == ["dropped   3 of 4 training rows: their output is empty"]


@pytest.mark.parametrize("scoring", ["generation", "loglikelihood"])
def test_prompts_that_the_model_has_no_room_for_are_counted(config, scoring):
    loaded = load_model(config.model)
    loaded.model.config.max_position_embeddings = 100
    results = evaluate(loaded.model, loaded.tokenizer, config.data, EvaluationConfig(scoring=scoring))
    assert results["own"].workload.prompts_cut == 3
    assert workload_metrics(results)["evaluation/prompts_cut"] == 3
    loaded.model.config.max_position_embeddings = 1024
    results = evaluate(loaded.model, loaded.tokenizer, config.data, EvaluationConfig(scoring=scoring))
    assert "evaluation/prompts_cut" not in workload_metrics(results)
