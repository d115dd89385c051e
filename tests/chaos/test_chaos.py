"""A sweep on three nodes whose workers, nodes and driver are killed again and again ends as if nothing had happened.

Real Ray, real MLflow, real training; every kill is SIGKILL, of processes this test started, by their ids::

    python -m pytest --slow tests/chaos/test_chaos.py -s

GRASS_RAY_CHAOS_KILLS (20) kills, but none after GRASS_RAY_CHAOS_S (480) seconds; what was done is printed.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch
from machines import Machines
from mlflow import MlflowClient

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.training.run import Run

HERE = Path(__file__).parent
KILLS = int(os.environ.get("GRASS_RAY_CHAOS_KILLS", "20"))
FOR_S = float(os.environ.get("GRASS_RAY_CHAOS_S", "480"))
PROCESS = "ray::ImplicitFunc"  # of a trial with one worker, as Ray Tune calls it
KINDS = ("worker", "node", "worker", "driver")
STEPS_A_KILL = 30  # of each trial, so that work is left at the last kill
PATIENCE_S = 300


def trial_processes(machines: Machines) -> list[psutil.Process]:
    """Those in which trials train."""
    found = []
    for process in psutil.Process(machines.process.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if title.startswith(PROCESS):
            found.append(process)
    return found


@contextmanager
def driver(machines: Machines, storage: Path, log: IO[str], *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(HERE / "chaos_sweep.py"), "--storage-path", str(storage), "--cpus-per-trial", "1"]
    command += ["--max-failures", "1000", *flags]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=machines.environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for_training(machines: Machines, process: subprocess.Popen[str]) -> bool:
    """Whether the sweep still runs once a trial has its process."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not trial_processes(machines):
        assert time.monotonic() < deadline, "no trial trains"
        time.sleep(0.2)
    return process.poll() is None


def living(machines: Machines) -> list[psutil.Process]:
    return [process for process in trial_processes(machines) if process.is_running()]


def disturb(machines: Machines, storage: Path, log: IO[str]) -> Counter[str]:
    """Run the sweep while killing what it consists of; returns how often what was killed."""
    kinds, chance, kills = itertools.cycle(KINDS), random.Random(0), Counter[str]()
    flags: tuple[str, ...] = ("--machines", "3", "--steps", str(STEPS_A_KILL * KILLS))
    end = time.monotonic() + FOR_S
    while sum(kills.values()) < KILLS and time.monotonic() < end:
        with driver(machines, storage, log, *flags) as process:
            flags = ("--resume",)
            while sum(kills.values()) < KILLS and time.monotonic() < end:
                if not wait_for_training(machines, process):
                    return kills
                time.sleep(chance.uniform(3, 12))
                kind = next(kinds)
                if kind == "driver":
                    process.send_signal(signal.SIGKILL)
                elif kind == "node":
                    assert machines.tell("kill") == 3
                elif victims := living(machines):
                    chance.choice(victims).kill()
                else:
                    continue
                kills[kind] += 1
                print(f"kill {sum(kills.values())}: {kind}", flush=True)
                if kind == "driver":
                    break
    return kills


def records_of(storage: Path) -> list[RunRecord]:
    return [RunRecord.load(path) for path in storage.glob("chaos/*/*/record.json")]


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_has_the_numbers_of_an_undisturbed_one() -> None:
    with Machines(3) as machines:
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"
        with log_file.open("w") as log:
            kills = disturb(machines, storage, log)
            print(f"{sum(kills.values())} kills: {dict(kills)}")
            assert kills.keys() == set(KINDS), "too little time to kill each kind once"
            for _ in range(3):
                with driver(machines, storage, log, "--resume") as process:
                    code = process.wait(timeout=900)
                if code == 0:
                    break
        output = log_file.read_text()
        assert code == 0, output
        assert "joined Ray at" in output
        assert "3 machine(s)" in output

        records = records_of(storage)
        assert sorted((r.config["method"]["name"], r.config["seed"]) for r in records) == [
            ("base", 0), ("full", 0), ("grass", 0), ("lisa", 0),
        ]  # fmt: skip
        for record in records:
            assert_as_undisturbed(record)
        assert_tracked_once(storage, records)


def assert_as_undisturbed(record: RunRecord) -> None:
    """The same configuration, run here from start to end without Ray, comes to the same bits."""
    torch.set_num_threads(1)
    run = Run.prepare(RunConfig.parse(record.config))
    losses = [(report.step, report.loss) for report in run.fit()]
    run.evaluate()
    outcome = run.outcome()
    assert record.status == "finished"
    assert record.weights_sha256 == run.weights_sha256()
    assert record.series.get("train/loss", []) == losses
    assert {name: score.correct for name, score in record.tasks.items()} == {
        name: [example.correct for example in result.examples] for name, result in outcome.tasks.items()
    }
    expected = {name: value for name, value in outcome.metrics.items() if name.startswith(("eval/", "train/"))}
    assert {name: record.metrics[name] for name in expected} == expected
    assert (record.layers is None) == (outcome.layers is None)
    if record.layers is not None and outcome.layers is not None:
        assert record.layers.intervals == outcome.layers.intervals


def assert_tracked_once(storage: Path, records: list[RunRecord]) -> None:
    """One parent, one finished child a trial, every step once."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = list(client.search_runs([client.get_experiment_by_name("chaos").experiment_id]))
    children = {run.data.tags["trial_key"]: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(runs) == 1 + len(records)
    assert sorted(children) == sorted(record.run_id[-12:] for record in records)
    for record in records:
        run = children[record.run_id[-12:]]
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted((metric.step, metric.value) for metric in history) == record.series.get("train/loss", [])
