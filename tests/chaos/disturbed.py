"""A sweep that is disturbed while it runs: its driver, its trials' processes, and what must be true in the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import psutil
import torch
from mlflow import MlflowClient

from grass_ray.config import RunConfig
from grass_ray.results.record import RunRecord
from grass_ray.training.run import Run

HERE = Path(__file__).parent
SWEEP = HERE / "chaos_sweep.py"
# of a trial, as Ray calls them: of one worker, or of what waits for several; those workers; what restarts them
PROCESSES = ("ImplicitFunc", "TrainWorker", "TrainController")
PATIENCE_S = 300


class Cluster(Protocol):
    """What is asked of a cluster that a sweep runs on; see :class:`machines.Machines`."""

    environment: dict[str, str]
    enter: tuple[str, ...]

    def processes(self) -> list[psutil.Process]: ...


def trial_processes(cluster: Cluster, kinds: Sequence[str] = PROCESSES) -> list[psutil.Process]:
    """Those in which trials train, or are driven."""
    found = []
    for process in cluster.processes():
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if title.startswith("ray::") and any(kind in title for kind in kinds):
            found.append(process)
    return found


def hear_interrupts() -> None:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def driver(
    cluster: Cluster, storage: Path, log: IO[str], *flags: str, script: Path = SWEEP, max_failures: int = 1000
) -> Iterator[subprocess.Popen[str]]:
    command = [*cluster.enter, sys.executable, str(script), "--storage-path", str(storage), "--cpus-per-trial", "1"]
    command += ["--max-failures", str(max_failures), *flags]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, text=True, env=cluster.environment, preexec_fn=hear_interrupts
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(
    condition: Callable[[], bool],
    process: subprocess.Popen[str],
    what: str,
    within_s: float = PATIENCE_S,
    every_s: float = 0.2,
) -> bool:
    """Whether it came to that; not if the sweep ended before."""
    deadline = time.monotonic() + within_s
    while not (there := condition()) and process.poll() is None:
        assert time.monotonic() < deadline, what
        time.sleep(every_s)
    return there


def wait_for_training(cluster: Cluster, process: subprocess.Popen[str]) -> bool:
    """Whether the sweep still runs once a trial has its process."""
    wait_until(lambda: bool(trial_processes(cluster)), process, "no trial trains")
    return process.poll() is None


def living(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in trial_processes(cluster) if process.is_running()]


def records_of(storage: Path, sweep: str = "chaos") -> list[RunRecord]:
    return [RunRecord.load(path) for path in sorted(storage.glob(f"{sweep}/*/*/record.json"))]


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


def assert_same(record: RunRecord, other: RunRecord) -> None:
    """Two sweeps came to the same bits in this trial."""
    assert record.status == other.status == "finished"
    assert record.config == other.config
    assert record.weights_sha256 == other.weights_sha256
    for name in ("train/loss", "train/grad_norm", "validation/loss", "hparam/lr"):
        assert record.series.get(name) == other.series.get(name), name
    assert {name: score.correct for name, score in record.tasks.items()} == {
        name: score.correct for name, score in other.tasks.items()
    }
    assert (record.layers and record.layers.intervals) == (other.layers and other.layers.intervals)
    assert (record.search and record.search.lineage) == (other.search and other.search.lineage)


def assert_tracked_once(storage: Path, records: list[RunRecord]) -> None:
    """One parent, one finished child a trial, every step once."""
    histories = tracked(storage, records)
    assert histories == {record.run_id[-12:]: record.series.get("train/loss", []) for record in records}


def tracked(storage: Path, records: list[RunRecord]) -> dict[str, list[tuple[int, float]]]:
    """The loss of every step in MLflow, by trial; one parent, and one finished child a trial."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = list(client.search_runs([client.get_experiment_by_name(records[0].sweep).experiment_id]))
    children = {run.data.tags["trial_key"]: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(runs) == 1 + len(records)
    assert sorted(children) == sorted(record.run_id[-12:] for record in records)
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    found = {key: client.get_metric_history(run.info.run_id, "train/loss") for key, run in children.items()}
    return {key: sorted((metric.step, metric.value) for metric in history) for key, history in found.items()}
