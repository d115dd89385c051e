"""A machine is about to be taken away: its trial saves at once, and goes on elsewhere without losing a step before."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from machines import Machines
from small import REPOSITORY

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.training.run import Run

SWEEP = REPOSITORY / "tests" / "mini_sweep.py"
SETTINGS = ("training.steps=500", "training.batch_size=64", "training.checkpoint_every_steps=null")
PATIENCE_S = 300
# where the worker is, through Ray's own state API, in a process that joins the cluster
FIND = """
import ray
from ray.util import state
ray.init(log_to_driver=False)
workers = state.list_actors(filters=[("class_name", "=", "ImplicitFunc"), ("state", "=", "ALIVE")])
print(workers[0].node_id if workers else "")
"""


def node_of_the_worker(machines: Machines) -> str:
    command = [sys.executable, "-c", FIND]
    found = subprocess.run(command, env=machines.environment, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[-1].strip()


def announce_preemption(machines: Machines, node: str) -> None:
    """As an autoscaler does when a cloud takes a machine back; it is up to it to end the machine afterwards."""
    command = [
        str(Path(sys.executable).with_name("ray")),
        "drain-node",
        "--address",
        machines.environment["RAY_ADDRESS"],
    ]
    command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
    subprocess.run([*command, "--deadline-remaining-seconds", "25"], env=machines.environment, check=True)


@pytest.mark.slow
def test_a_trial_whose_machine_is_taken_back_goes_on_from_a_checkpoint_made_just_then() -> None:
    with Machines(3, head_cpus=0) as machines:
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"
        command = [sys.executable, str(SWEEP), "--methods", "grass", "--no-base", "--cpus-per-trial", "1"]
        command += ["--storage-path", str(storage), "--set", *SETTINGS, "--max-failures", "0"]
        with log_file.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, text=True, env=machines.environment
            )
            try:
                deadline = time.monotonic() + PATIENCE_S
                while "  training  step " not in log_file.read_text():
                    assert process.poll() is None
                    assert time.monotonic() < deadline, "no trial trains"
                    time.sleep(0.5)
                announce_preemption(machines, node_of_the_worker(machines))
                code = process.wait(timeout=900)
            finally:
                process.kill()
                process.wait()
        output = log_file.read_text()
        assert code == 0, output
        (file,) = storage.glob("mini/*/grass-*/record.json")
        record = RunRecord.load(file)
    restored = [int(step) for step in re.findall(r"goes on from its checkpoint after step (\d+)", output)]
    assert len(restored) == 1
    assert restored[0] > 0, "the only checkpoint is the one made when the machine was to be taken away"
    torch.set_num_threads(1)
    run = Run.prepare(RunConfig.parse(record.config))
    losses = [(report.step, report.loss) for report in run.fit()]
    assert record.series["train/loss"] == losses
    assert record.weights_sha256 == run.weights_sha256()
