"""A trial that loses one of its two machines, goes on alone, and grows back: the numbers stay those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
from machines import Machines
from small import REPOSITORY

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.training.run import Run

SWEEP = REPOSITORY / "tests" / "mini_sweep.py"
STEPS, CHECKPOINT_EVERY = 1000, 20
SETTINGS = (
    f"training.steps={STEPS}",
    "training.batch_size=64",  # a step of a fifth of a second: the machines come and go in the meantime
    "training.accumulation_steps=2",
    f"training.checkpoint_every_steps={CHECKPOINT_EVERY}",
)
# float32 sums in another order, which a thousand steps of Adam let grow
LOSS_TOLERANCE = 2e-3
PATIENCE_S = 300


def workers_at_checkpoints(storage: Path) -> list[int]:
    """How many workers took each step that the newest checkpoint knows of."""
    states = sorted(storage.glob("mini/*/ray/train-*/checkpoint_*/state.json"), key=lambda path: path.parent.name)
    if not states:
        return []
    try:
        return [int(count) for _, count in json.loads(states[-1].read_text())["series"]["comm/workers"]]
    except (OSError, ValueError):  # another one has taken its place
        return workers_at_checkpoints(storage)


def wait_for(storage: Path, process: subprocess.Popen[str], workers: int) -> None:
    """Until so many have worked for two checkpoints: Ray knows of the first one then, and goes on from it."""
    deadline = time.monotonic() + PATIENCE_S
    enough = [workers] * (2 * CHECKPOINT_EVERY)
    while (counts := workers_at_checkpoints(storage))[-len(enough) :] != enough:
        assert process.poll() is None, f"the sweep has ended after {counts}"
        assert time.monotonic() < deadline, f"no checkpoints of {workers} workers, but of {counts}"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_trial_goes_on_with_the_machines_that_are_left_and_takes_back_those_that_return() -> None:
    with Machines(2) as machines:
        storage = machines.folder / "results"
        command = [sys.executable, str(SWEEP), "--methods", "grass", "--no-base", "--storage-path", str(storage)]
        command += ["--workers-per-trial", "2", "--min-workers-per-trial", "1", "--cpus-per-trial", "1"]
        with (machines.folder / "driver.log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--set", *SETTINGS],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=machines.environment,
            )
            try:
                wait_for(storage, process, 2)
                assert machines.tell("lose") == 1
                wait_for(storage, process, 1)
                assert machines.tell("add") == 2
                wait_for(storage, process, 2)
                code = process.wait(timeout=900)
            finally:
                process.kill()
                process.wait()
        output = (machines.folder / "driver.log").read_text()
        assert code == 0, output
        assert "1 CPUs and 0 GPUs for each of 1 to 2 workers a trial, 1 at once" in output
        (file,) = storage.glob("mini/*/grass-*/record.json")
        record = RunRecord.load(file)

    assert record.status == "finished"
    assert [int(count) for count, _ in groupby(count for _, count in record.series["comm/workers"])] == [2, 1, 2]
    assert record.hardware.endswith(", elastic from 1"), "its speed is compared with that of its own kind only"
    assert record.layers is not None
    assert record.layers.only_active_layers_changed
    run = Run.prepare(RunConfig.parse(record.config))
    losses = [report.loss for report in run.fit()]
    assert [loss for _, loss in record.series["train/loss"]] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert record.layers.intervals == run.state.tracer.trace.intervals
