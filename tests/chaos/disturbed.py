"""A sweep that is disturbed while it runs: its driver, its trials' processes, and what must be true in the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import torch
from machines import Machines
from mlflow import MlflowClient

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.training.run import Run

HERE = Path(__file__).parent
PROCESS = "ray::ImplicitFunc"  # of a trial with one worker, as Ray Tune calls it
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


def hear_interrupts() -> None:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def driver(machines: Machines, storage: Path, log: IO[str], *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(HERE / "chaos_sweep.py"), "--storage-path", str(storage), "--cpus-per-trial", "1"]
    command += ["--max-failures", "1000", *flags]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, text=True, env=machines.environment, preexec_fn=hear_interrupts
    )
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


def records_of(storage: Path) -> list[RunRecord]:
    return [RunRecord.load(path) for path in storage.glob("chaos/*/*/record.json")]


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
