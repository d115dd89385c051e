"""The same configuration gives the same bits: again, in another process, and with other threads where that holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import REPOSITORY, short_run

from grass_ray.config import RunConfig
from grass_ray.execute import Action, Listener, execute
from grass_ray.training.report import StepReport
from grass_ray.training.run import Run

RUNS = {
    "grass": short_run("grass", "method.offload=lazy", "model.dtype=bfloat16"),
    "galore": short_run("galore", "data.batching=packed"),
    "lora": short_run("lora", "method.adapter.dropout=0.1", "training.accumulation_steps=2"),
    "ist": short_run("ist"),
}


def bits(config: RunConfig, threads: int = 1) -> dict[str, Any]:
    """The hash of all weights, each step's loss and norm, and every answer."""
    result = execute(config, threads=threads)
    assert result.status == "finished"
    assert result.outcome is not None
    series = {name: points for name, points in result.outcome.series.items() if name.startswith(("train/", "layers/"))}
    answers = {
        task: [(example.output, repr(example.loss)) for example in found.examples]
        for task, found in result.outcome.tasks.items()
    }
    found: dict[str, Any] = json.loads(json.dumps([result.weights_sha256, repr(series), answers]))
    return found


@pytest.mark.long
def test_twice_in_one_process_and_in_another(tmp_path: Path) -> None:
    """Resumed runs in another process are compared by ``tests/contract/test_methods.py``, for every method."""
    for name, config in RUNS.items():
        config.save(tmp_path / f"{name}.yaml")
    script = (
        "import json, sys, torch; from test_determinism import bits; from grass_ray.config import RunConfig; "
        "print(json.dumps([bits(RunConfig.from_yaml(path)) for path in sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path / f"{name}.yaml") for name in RUNS)]
    places = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "PATH": "", "HOME": str(tmp_path)}
    other = subprocess.run(command, env=places, capture_output=True, text=True, check=True, cwd=tmp_path)
    elsewhere = dict(zip(RUNS, json.loads(other.stdout.splitlines()[-1]), strict=True))
    for name, config in RUNS.items():
        once = bits(config)
        assert bits(config) == once, name
        assert elsewhere[name] == once, name


@pytest.mark.long
def test_two_threads_give_the_same_bits_every_time() -> None:
    config = short_run("grass", "evaluation.test=false", steps=2)
    assert bits(config, threads=2) == bits(config, threads=2)


class Asks(Listener):
    """Whether torch was told to be deterministic, at each step."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_step(self, run: Run, report: StepReport) -> Action:
        self.found.append(torch.are_deterministic_algorithms_enabled())
        return Action.GO


@pytest.mark.parametrize("wanted", [True, False])
def test_the_setting_holds_for_the_run_alone(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asks = Asks()
    config = short_run("grass", f"training.deterministic={str(wanted).lower()}", steps=2)
    result = execute(config, listeners=[asks])
    assert set(asks.found) == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
    assert result.weights_sha256 == execute(short_run("grass", steps=2)).weights_sha256


def test_an_operation_that_has_no_deterministic_algorithm_is_refused() -> None:
    class Odd(Listener):
        def on_step(self, run: Run, report: StepReport) -> Action:
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
            return Action.GO

    execute(short_run("grass", steps=1), listeners=[Odd()])
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        execute(short_run("grass", "training.deterministic=true", steps=1), listeners=[Odd()])
    assert not torch.are_deterministic_algorithms_enabled()


def test_configurations_of_before_keep_their_fingerprint() -> None:
    config = short_run("grass")
    old = config.to_dict()
    del old["training"]["deterministic"]
    assert RunConfig.parse(old).fingerprint == config.fingerprint
    assert config.override({"training.deterministic": True}).fingerprint != config.fingerprint
