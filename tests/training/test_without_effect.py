"""Settings that change nothing in a run are said before it starts: in ``train``, in a sweep's plan, in the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from small import REPOSITORY, short_run

from grass_ray.cli import main
from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.run import Run
from grass_ray.training.without_effect import settings_without_effect


def found(method: str, *overrides: str) -> list[str]:
    """The settings that are said to change nothing, by key and value."""
    config = RunConfig(method=METHODS[method].config, model=ModelConfig(name="tiny"))
    lines = settings_without_effect(config.override(parse(overrides)))
    assert all(": " in line for line in lines)
    return [line.partition(":")[0].removeprefix("method.") for line in lines]


def steps(number: int) -> str:
    return f"training.steps={number}"


@pytest.mark.parametrize("method", METHODS)
def test_a_long_run_of_any_row_has_none(method: str) -> None:
    on_purpose = ["sampler.exploration=1"] if method == "uniform" else []  # a control: it measures, and draws uniformly
    assert found(method, steps(1000)) == on_purpose
    assert found(method, steps(0)) == []


SAID = [
    ("grass", [steps(50)], ["sampler.refresh_period=100"]),
    ("grass", [steps(100)], ["sampler.refresh_period=100"]),
    ("grass", [steps(101)], []),
    ("grass-static", [steps(50)], []),
    ("grass-fresh", [steps(50)], ["sampler.refresh_period=100", "sampler.staleness=level"]),
    # draws at 0, 90 and 180: the refresh at 100 decides the last one, the one at 200 comes too late for any
    ("grass", [steps(190), "method.sampler.period=90"], []),
    ("grass", [steps(170), "method.sampler.period=90"], ["sampler.refresh_period=100"]),
    ("grass", [steps(20)], ["sampler.period=20", "sampler.refresh_period=100"]),
    (
        "grass",
        [steps(8), "training.warmup_steps=0"],
        ["sampler.period=20", "sampler.refresh_period=100", "sampler.probing_steps=10"],
    ),
    ("grass", [steps(1000), "method.sampler.exploration=1"], ["sampler.exploration=1"]),
    (
        "grass",
        [steps(1000), "method.sampler.refresh_period=null", "method.sampler.probing_steps=0"],
        ["sampler.refresh_period=null with probing_steps=0"],
    ),
    (
        "grass",
        [steps(1000), "method.sampler.temperature={kind: linear, start: 1, end: 0.1, steps: 2000}"],
        ["sampler.temperature.steps=2000"],
    ),
    ("grass", [steps(1000), "method.sampler.temperature={kind: linear, start: 1, end: 0.1}"], []),
    (
        "grass",
        [steps(300), "method.sampler.period={kind: linear, start: 400, end: 200}"],
        ["sampler.period=linear", "sampler.refresh_period=100"],
    ),
    ("lisa", [steps(20)], ["sampler.period=20"]),
    ("lisa", [steps(21)], []),
    ("badam", [steps(50)], ["sampler.period=50"]),
    ("lift", [steps(10)], []),
    ("misa", [steps(50)], []),
    ("ist", [steps(10)], ["sampler.refresh_period=10"]),
    ("ist", [steps(11)], []),
    ("galore", [steps(200)], ["optimizer.projection.refresh_period=200"]),
    ("full", [steps(5)], ["training.warmup_steps=5"]),
    ("full", [steps(6)], []),
    ("full", [steps(9), "training.checkpoint_every_steps=10"], ["training.checkpoint_every_steps=10"]),
    ("grass-static", [steps(21), "training.checkpoint_every_steps=31"], []),
    ("grass-static", [steps(21), "training.checkpoint_every_steps=32"], ["training.checkpoint_every_steps=32"]),
    ("full", [steps(9), "method.inactive_states=reset"], ["inactive_states=reset"]),
    ("full", [steps(9), "method.offload=resident"], ["offload=resident"]),
]


@pytest.mark.parametrize(("method", "overrides", "expected"), SAID)
def test_what_has_no_effect_is_said(method: str, overrides: list[str], expected: list[str]) -> None:
    assert found(method, *overrides) == expected


@pytest.mark.parametrize(("period", "number"), [(100, 50), (4, 9)])
def test_what_is_said_of_a_refresh_is_true(period: int, number: int) -> None:
    """A run whose refresh is said to change nothing draws as grass-static does, and no other."""
    drawn = {}
    for method in ("grass", "grass-static"):
        settings = [] if method == "grass-static" else [f"method.sampler.refresh_period={period}"]
        run = Run.prepare(short_run(method, "method.sampler.temperature=0.01", *settings, steps=number))
        drawn[method] = [(report.probabilities, report.active_layers) for report in run.fit()]
        layers = run.outcome().layers
        assert layers is not None
        said = [line.partition("=")[0] for line in layers.without_effect]
        assert all(f"without effect: {line}" in layers.describe() for line in layers.without_effect)
        assert said == (["method.sampler.refresh_period"] if (method, period) == ("grass", 100) else [])
    assert (drawn["grass"] == drawn["grass-static"]) == (period == 100)


def code_of(words: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_training_says_it_at_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "grass", "--model", "tiny", "--steps", "7", "--limit", "1", "--output", str(tmp_path / "run")]
    data = ["--set", "data.source.train_rows=30", "data.source.test_rows=2"]
    assert code_of([*flags, "--dry-run", *data]) == 0
    out, error = capsys.readouterr()
    assert RunConfig.parse(yaml.safe_load(out)).training.steps == 7, "stdout stays a configuration"
    assert "without effect: method.sampler.refresh_period=100: nothing is drawn after a refresh before" in error
    assert code_of([*flags, "--dry-run", "--quiet", *data]) == 0
    assert capsys.readouterr().err == ""


def test_a_sweeps_plan_says_it_with_the_methods_that_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["grass-ray"])
    words = ["--models", "tiny", "--methods", "full", "grass", "grass-fresh", "--set", "training.steps=9"]
    script = str(REPOSITORY / "sweeps/quickstart.py")
    assert code_of(["sweep", script, "--dry-run", "--storage-path", str(tmp_path), *words]) == 0
    out = capsys.readouterr().out
    assert "without effect: grass, grass-fresh: method.sampler.refresh_period=10: nothing is drawn" in out
    assert "without effect: grass-fresh: method.sampler.staleness=level" in out
    assert "full: method" not in out
