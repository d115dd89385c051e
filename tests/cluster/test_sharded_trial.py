"""A sweep whose trials shard their model over two Train workers: same numbers, and a checkpoint of whole weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small import REPOSITORY

from grass_ray.config import RunConfig
from grass_ray.results.record import CHECKPOINT_FOLDER, RunRecord
from grass_ray.training.checkpoint import load_weights
from grass_ray.training.run import Run
from grass_ray.training.weights import parameters_sha256

SWEEP = REPOSITORY / "tests" / "mini_sweep.py"
SETTINGS = ("training.accumulation_steps=2", "training.checkpoint_every_steps=4", "training.steps=9")


@pytest.mark.slow
def test_a_sharded_trial_is_the_trial_of_one_worker(tmp_path: Path) -> None:
    flags = ["--methods", "grass", "--workers-per-trial", "2", "--cpus-per-trial", "1", "--parallel", "shard"]
    command = [sys.executable, str(SWEEP), *flags, "--keep-checkpoints", "--storage-path", str(tmp_path)]
    done = subprocess.run([*command, "--set", *SETTINGS], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("mini/*/grass-*/record.json")
    record = RunRecord.load(file)
    assert (record.status, record.world_size) == ("finished", 2)
    assert record.hardware.endswith(", model sharded"), "compared with its own kind only"
    assert record.layers is not None
    assert record.layers.only_active_layers_changed

    run = Run.prepare(RunConfig.parse(record.config))
    losses = [report.loss for report in run.fit()]
    assert [loss for _, loss in record.series["train/loss"]] == pytest.approx(losses, rel=2e-5)
    run.evaluate()
    expected = {name: [example.correct for example in task.examples] for name, task in run.outcome().tasks.items()}
    assert {name: task.correct for name, task in record.tasks.items()} == expected

    model = Run.prepare(RunConfig.parse(record.config)).state.model
    load_weights(model, file.parent / CHECKPOINT_FOLDER)
    assert parameters_sha256(model) == record.weights_sha256
