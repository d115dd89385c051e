"""The printed command line gives the record's configuration back."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from grass_ray.config import RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.results.page.commands import reproduce_command


def configured_by(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunConfig:
    """What the command line makes of the words, read from its --dry-run."""
    import grass_ray.training.checks
    import grass_ray.training.lost_rows
    from grass_ray.cli import main

    # models and data are not at hand
    monkeypatch.setattr(grass_ray.training.checks, "check_run", lambda config: None)
    monkeypatch.setattr(grass_ray.training.checks, "tokenizer_to_check", lambda model: None)
    monkeypatch.setattr(grass_ray.training.lost_rows, "find_lost_rows", lambda config, tokenizer: [])
    with pytest.raises(SystemExit) as left:
        main([*shlex.split(command)[1:], "--dry-run", "--no-memory-check"])
    said = capsys.readouterr()
    assert left.value.code == 0, said.err
    import yaml

    return RunConfig.parse(yaml.safe_load(said.out))


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_row(method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["training.steps=0"] if not METHODS[method].trains else []
    config = RunConfig(method=METHODS[method].config).override(parse(steps))
    command = reproduce_command(config.to_dict())
    assert command == f"grass-ray train {method}"
    assert configured_by(command, monkeypatch, capsys) == config


CHANGES = [
    ["seed=3", "training.steps=7", "training.batch_size=2", "evaluation.limit=5", "method.optimizer.lr=3e-05"],
    ["method.sampler.temperature=0.125", "method.optimizer.betas=[0.8, 0.95]", "evaluation.scoring=loglikelihood"],
    ["model.name=some one/odd 'name'", "model.dtype=bfloat16", "training.checkpoint_every_steps=4"],
    ["data.suite=commonsense", "data.tasks=[piqa, boolq]", "data.source={kind: hub}"],
    [
        "data.suite=reviews",
        "data.tasks=[reviews]",
        "data.source={kind: custom, name: reviews, answer: labels, labels: [good, bad], train: /a.json, test: /b.json}",
    ],
    ["data.source.train_rows=40", "data.source.seed=9", "data.max_train_rows=12"],
    ["method.sampler.num_active_layers={kind: linear, start: 4, end: 1}"],
]


@pytest.mark.parametrize("assignments", CHANGES, ids=lambda assignments: assignments[0].partition("=")[0])
def test_what_was_changed_is_said(
    assignments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(method=METHODS["grass"].config).override(parse(assignments))
    command = reproduce_command(config.to_dict())
    assert command is not None
    assert configured_by(command, monkeypatch, capsys) == config


def test_a_folder_of_data_is_the_readers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["data.suite=arithmetic", "data.tasks=[gsm8k]", f"data.source={{kind: folder, path: {tmp_path}}}"]
    config = RunConfig(method=METHODS["lora"].config).override(parse(changes))
    command = reproduce_command(config.to_dict())
    assert command == "grass-ray train lora --task gsm8k --data-dir DATA"
    assert configured_by(command.replace("DATA", str(tmp_path)), monkeypatch, capsys) == config


def test_what_this_version_cannot_read_has_no_command() -> None:
    config = RunConfig(method=METHODS["lora"].config).to_dict()
    assert reproduce_command(config | {"method": config["method"] | {"name": "gone"}}) is None
    assert reproduce_command(config | {"unheard_of": 1}) is None
