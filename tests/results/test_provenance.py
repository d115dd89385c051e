from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import pytest

from grass_ray.config import RunConfig
from grass_ray.errors import redact
from grass_ray.methods import METHODS
from grass_ray.results.provenance import (
    build_record,
    git_state,
    hardware,
    now,
    versions,
    write_examples,
    write_layer_trace,
)
from grass_ray.results.record import RunRecord
from grass_ray.tasks.scores import EvaluationResult, Example
from grass_ray.training.report import LayerTrace, RunOutcome


def outcome() -> RunOutcome:
    examples = tuple(
        Example(id=f"q{n}", prompt="2 + 2 =", target="4", output=text, extracted=found, correct=found == "4")
        for n, (text, found) in enumerate([("it is 4", "4"), ("\n“five”", None)])
    )
    layers = LayerTrace(
        num_layers=2,
        total_parameters=100,
        trainable_parameters=25,
        intervals=[(2, (1,)), (4, (0,))],
        refreshes=[(1, (math.nan, 2.0), (0.25, 0.75))],
        visits=[1, 1],
    )
    result = EvaluationResult(
        task="generated", scoring="generation", extraction="strict", examples=examples, protocol={}
    )
    return RunOutcome(
        metrics={"eval/average": 0.5, "memory/peak_allocated_gib": math.nan},
        series={"train/loss": [(1, 2.0), (2, 1.0)]},
        tasks={"generated": result},
        layers=layers,
        data={"train_rows": 10},
        model_revision="abc",
    )


def test_a_record_holds_the_run_and_survives_the_file(tmp_path: Path) -> None:
    config = RunConfig(method=METHODS["grass"].config, seed=3)
    record = build_record(
        run_id="t1",
        sweep="quickstart",
        sweep_id="s1",
        config=config,
        status="finished",
        failure=None,
        outcome=outcome(),
        started_at=now(),
    )
    record.save(tmp_path / "record.json")
    loaded = RunRecord.load(tmp_path / "record.json")
    assert loaded.name == config.name
    assert RunConfig.parse(loaded.config) == config
    assert loaded.tasks["generated"].correct == [True, False]
    assert loaded.tasks["generated"].example_ids == ["q0", "q1"]
    assert loaded.tasks["generated"].accuracy == 0.5
    assert loaded.layers is not None
    assert loaded.layers.trainable_share == 0.25
    assert loaded.layers.intervals == [(2, (1,)), (4, (0,))]
    assert math.isnan(loaded.layers.refreshes[0][1][0])
    assert math.isnan(loaded.metrics["memory/peak_allocated_gib"])
    assert loaded.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert datetime.fromisoformat(loaded.started_at) <= datetime.fromisoformat(loaded.finished_at)


def test_a_failed_run_has_a_record_without_secrets() -> None:
    record = build_record(
        run_id="t1",
        sweep="quickstart",
        sweep_id="s1",
        config=RunConfig(method=METHODS["full"].config),
        status="failed",
        failure="401 for https://me:pass@hub.example/x with hf_AbCdEfGhIjKlMnOp, Authorization: Bearer xyz",
        outcome=None,
        started_at=now(),
        hardware_name="some GPU",
        world_size=2,
    )
    assert record.failure == "401 for https://***@hub.example/x with ***, Authorization: Bearer ***"
    assert (record.hardware, record.world_size, record.tasks, record.layers) == ("some GPU", 2, {}, None)


def test_a_clock_that_was_set_back_ends_no_run_before_it_began() -> None:
    ahead = "2999-01-01T00:00:00.000+00:00"
    config = RunConfig(method=METHODS["full"].config)
    record = build_record(
        run_id="t1",
        sweep="s",
        sweep_id="s1",
        config=config,
        status="failed",
        failure="x",
        outcome=None,
        started_at=ahead,
    )
    assert record.finished_at == ahead


def test_plain_words_are_not_taken_for_secrets() -> None:
    text = "https://hub.example/a@b: gamma 40 larger than L = 30 (hf_model)"
    assert redact(text) == text


def test_examples_are_one_line_each(tmp_path: Path) -> None:
    write_examples(tmp_path / "examples.jsonl", outcome().tasks)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["extracted"] for row in rows] == ["4", None]
    assert rows[1]["output"] == "\n“five”"
    assert set(rows[0]) == {"task"} | {field.name for field in fields(Example)}


def test_the_engagement_report_is_words_and_strict_json(tmp_path: Path) -> None:
    write_layer_trace(tmp_path, None)
    assert not list(tmp_path.iterdir())
    layers = outcome().layers
    assert layers is not None
    layers.units = ["layer_00", "layer_01"]
    write_layer_trace(tmp_path, layers)
    assert (tmp_path / "engagement.txt").read_text() == layers.describe() + "\n"
    values = json.loads((tmp_path / "engagement.json").read_text(), parse_constant=pytest.fail)
    assert values["refreshes"] == [[1, [None, 2.0], [0.25, 0.75]]]
    assert values["visits"] == [1, 1]


def test_hardware_is_words_that_stay_the_same() -> None:
    assert "cores" in hardware("cpu")
    assert hardware("cpu") == hardware("cpu")


def test_versions_name_what_is_installed() -> None:
    assert versions().keys() >= {"python", "torch", "transformers", "grass_ray"}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) == (None, None)
    monkeypatch.setenv("GRASS_RAY_GIT_COMMIT", "abc123")
    assert git_state(package) == ("abc123", None), "a copy without history, told which commit it is"
    monkeypatch.delenv("GRASS_RAY_GIT_COMMIT")
    git(tmp_path, "init")
    assert git_state(package) == (None, None), "a package that the surrounding repository does not hold"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    assert git_state(package) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (package / "new.py").write_text("")
    assert git_state(package).dirty is True


@pytest.mark.parametrize("module", ["provenance", "record", "leaderboard", "rendering"])
def test_records_and_leaderboards_need_no_mlflow(module: str) -> None:
    code = f"import sys, grass_ray.results.{module}; assert not {{'mlflow', 'ray', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
