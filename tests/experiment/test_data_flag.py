"""``--data`` in a sweep: a data set in place of tasks, for every trial, scored by its loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grass_ray.config import ConfigError, DatasetSource, EvaluationConfig, RunConfig
from grass_ray.experiment.flags import SweepOptions, choose_data, parse_options
from grass_ray.experiment.plan import plan_trials
from grass_ray.experiment.sweep import Sweep


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"row {number}"} for number in range(4)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trials(*, tasks: tuple[str, ...] = ("generated",), evaluation: Any = None, **flags: Any) -> tuple[RunConfig, ...]:
    sweep = Sweep(
        name="mini",
        question="why?",
        models=("tiny",),
        methods=("lora", "grass"),
        tasks=tasks,
        seeds=(0,),
        evaluation=evaluation,
    )
    return plan_trials(sweep, SweepOptions(**flags))[0]


def test_every_trial_has_the_data_set_by_its_absolute_path_and_is_scored_by_loss(chats: Path) -> None:
    found = trials(data="chats.jsonl", evaluation=EvaluationConfig(limit=7), set=("evaluation.forgetting=generated",))
    assert [config.method.name for config in found] == ["base", "lora", "grass"]
    for config in found:
        assert config.data.source == DatasetSource(name="chats", path=str(chats))
        assert (config.data.suite, config.data.tasks) == ("chats", ("chats",))
        assert (config.evaluation.scoring, config.evaluation.limit) == ("loss", 7)
        assert config.evaluation.forgetting == "generated"
    assert trials(tasks=("chats.jsonl",)) == trials(data="chats.jsonl")  # a sweep's file may name it as its task
    assert RunConfig.parse(found[0].to_dict()) == found[0]


def test_settings_of_the_source_reach_it(chats: Path) -> None:
    (chats.parent / "test.jsonl").write_text(chats.read_text())
    first = trials(data="chats.jsonl", set=("data.source.test=test.jsonl", "data.source.columns.text=body"))[0]
    assert isinstance(first.data.source, DatasetSource)
    assert first.data.source.test == str(chats.parent / "test.jsonl")
    assert first.data.source.columns.text == "body"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": "chats.jsonl", "data_dir": Path()}, "--data-dir . has no effect on the data set chats.jsonl"),
        ({"tasks": ("chats.jsonl", "boolq")}, "the file chats.jsonl stands alone; a run takes one file of data"),
        ({"data": "gone.jsonl"}, "there is no data set gone.jsonl in "),
        ({"data": "chats.jsonl", "set": ("data.source.seed=1",)}, "has the key 'data.source.seed'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(chats: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        trials(**flags)
    assert message in str(error.value)


def test_tasks_beside_a_data_set_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tasks boolq has no effect: --data a is a task of its own"):
        SweepOptions(tasks=("boolq",), data="a").check()


def test_the_flag_is_read_and_counts_as_a_choice_of_trials(chats: Path) -> None:
    options = parse_options("sweep.py", "why?", ["--data", "chats.jsonl"])
    assert options.data == "chats.jsonl"
    assert options.chosen() == ["--data"]
    assert choose_data((), None, "chats.jsonl")[0] == "chats"
