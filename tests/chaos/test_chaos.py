"""A sweep on three nodes whose workers, nodes and driver are killed again and again ends as if nothing had happened.

Real Ray, real MLflow, real training; every kill is SIGKILL, of processes this test started, by their ids::

    python -m pytest --slow tests/chaos/test_chaos.py -s

GRASS_RAY_CHAOS_KILLS (20) kills, but none after GRASS_RAY_CHAOS_S (480) seconds; what was done is printed.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch
from mlflow import MlflowClient

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.training.run import Run

HERE = Path(__file__).parent
KILLS = int(os.environ.get("GRASS_RAY_CHAOS_KILLS", "20"))
FOR_S = float(os.environ.get("GRASS_RAY_CHAOS_S", "480"))
PROCESSES = ("TrainWorker", "TrainController", "ImplicitFunc")  # of a trial: works, restarts workers, waits for both
KINDS = ("worker", "node", "worker", "driver")
STEPS_A_KILL = 30  # of each trial, so that work is left at the last kill
PATIENCE_S = 300


class Machines:
    """The cluster of three, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        self.log = (folder / "machines.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "three_machines.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        self.environment = environment | {"RAY_ADDRESS": self._answer()}

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, Path(self.log.name).read_text()
        return line

    def kill_node(self) -> None:
        """Kill one that is not the head; another takes its place."""
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        assert self._answer() == "3"

    def trial_processes(self) -> list[psutil.Process]:
        """Those in which trials train, or are driven."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if title.startswith("ray::") and any(kind in title for kind in PROCESSES):
                found.append(process)
        return found

    def close(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        self.log.close()


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
    """Whether the sweep still runs once a trial has its worker."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not any("TrainWorker" in " ".join(p.cmdline()) for p in living(machines)):
        assert time.monotonic() < deadline, "no trial trains"
        time.sleep(0.2)
    return process.poll() is None


def living(machines: Machines) -> list[psutil.Process]:
    return [process for process in machines.trial_processes() if process.is_running()]


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
                    machines.kill_node()
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
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # short: Ray's sockets lie in it
    storage = folder / "results"
    machines = Machines(folder)
    try:
        with (folder / "driver.log").open("w") as log:
            kills = disturb(machines, storage, log)
            print(f"{sum(kills.values())} kills: {dict(kills)}")
            assert kills.keys() == set(KINDS), "too little time to kill each kind once"
            for _ in range(3):
                with driver(machines, storage, log, "--resume") as process:
                    code = process.wait(timeout=900)
                if code == 0:
                    break
        output = (folder / "driver.log").read_text()
        assert code == 0, output
        assert "joined Ray at" in output
        assert "3 machine(s)" in output
    finally:
        machines.close()

    records = records_of(storage)
    assert sorted((r.config["method"]["name"], r.config["seed"]) for r in records) == [
        ("base", 0), ("full", 0), ("grass", 0), ("lisa", 0),
    ]  # fmt: skip
    for record in records:
        assert_as_undisturbed(record)
    assert_tracked_once(storage, records)
    shutil.rmtree(folder, ignore_errors=True)


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
    assert (record.layers is None) == (outcome.engagement is None)
    if record.layers is not None and outcome.engagement is not None:
        assert record.layers.intervals == outcome.engagement.intervals


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
