"""Whatever a store does to a run, training goes on, and in the end the store has every number once.

Against a real MLflow server behind a proxy that breaks what passes, and a real SQLite store::

    python -m pytest --slow tests/results/test_tracking_faults.py
"""

from __future__ import annotations

import logging
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_proxy import FAULTS, Proxy
from mlflow import MlflowClient
from mlflow_server import free_port, server
from result_records import make_record

from grass_ray.config import ConfigError
from grass_ray.results.connection import sqlite_path
from grass_ray.results.record import RunRecord
from grass_ray.results.store import load_records
from grass_ray.results.sync import sync_run
from grass_ray.results.tracker import Tracker

STEPS = 40
SERIES = {
    "train/loss": [(step, 3.0 / step) for step in range(1, STEPS + 1)],
    "train/lr": [(step, 0.001) for step in range(1, STEPS + 1)],
    "validation/loss": [(10, 2.0), (STEPS, 1.0)],
}
Opener = Callable[[], Tracker]


def a_record(sweep: str, *, key: str = "t1") -> RunRecord:
    record = make_record(metrics={"eval/average": 0.5, "train/loss": 3.0 / STEPS}, series=SERIES)
    return record.model_copy(update={"sweep": sweep, "sweep_id": "s1", "run_id": f"s1-{key}"})


def train(tracker: Tracker, record: RunRecord, folder: Path, between: Callable[[int], None] = lambda step: None) -> str:
    """What a run tells a tracker; ``between`` is called before each step and before the end."""
    key = record.run_id.removeprefix("s1-")
    run_id = tracker.start_trial("s1", key, record.name, {"seed": "0"}, {"seed": "0", "method.name": "grass"})
    for step in range(1, STEPS + 1):
        between(step)
        tracker.log_steps(
            run_id, [(step, {name: value for name, points in SERIES.items() for s, value in points if s == step})]
        )
    between(STEPS + 1)
    record.save(folder / "record.json")
    tracker.finish(run_id, record, folder)
    return run_id


def assert_everything_once(uri: str, experiment: str, record: RunRecord, *, runs: int = 2) -> None:
    """One run of the trial, finished, with each number once; and its sweep's."""
    client = MlflowClient(uri)
    found = list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))
    assert len(found) == runs
    (trial,) = (run for run in found if run.data.tags["trial_key"] == record.run_id.removeprefix("s1-"))
    assert (trial.info.status, trial.data.tags["status"]) == ("FINISHED", "finished")
    for name, points in record.series.items():
        history = client.get_metric_history(trial.info.run_id, name)
        assert sorted((metric.step, metric.value) for metric in history) == points, name
    assert trial.data.metrics["eval/average"] == 0.5
    assert trial.data.params["method.name"] == "grass"
    assert record in load_records(uri, experiment)


# ------------------------------------------------------------------------------------------------------------ a server


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    port = free_port()
    with server(tmp_path_factory.mktemp("server"), port), Proxy(port).running() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_whose_answers_are_broken(
    proxy: Proxy, folder: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.choose = lambda path: None
    experiment, chance, started = f"faults-{fault}", random.Random(1), time.monotonic()
    tracker, record = Tracker(proxy.uri, experiment), a_record(experiment)
    tracker.open()
    proxy.done.clear()
    if fault == "late":  # each creation of a run holds the tracker up until it gives up, and happens afterwards
        proxy.choose = lambda path: "late" if path.endswith("runs/create") and len(proxy.done) < 2 else None
    else:
        proxy.choose = lambda path: fault if chance.random() < 0.4 else None
    with caplog.at_level(logging.WARNING):
        train(tracker, record, folder, lambda step: time.sleep(0.05))
    assert time.monotonic() - started < 60, "a broken server must not hold training up"
    assert proxy.done, "no fault was injected"
    proxy.choose = lambda path: None
    assert tracker.close(wait_s=60) == tracker.lacking == 0
    if fault == "late":
        time.sleep(20)  # what was given up arrives
        tracker.finish(train_id(proxy.uri, experiment), record, folder)
    assert len([line for line in caplog.records if "training goes on" in line.getMessage()]) >= 1
    assert_everything_once(proxy.uri, experiment, record)


def train_id(uri: str, experiment: str) -> str:
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], "tags.status = 'finished'")
    return str(found[0].info.run_id)


@pytest.mark.slow
def test_a_slow_server_takes_a_tenth_of_the_time_at_most(proxy: Proxy, folder: Path) -> None:
    tracker, record = Tracker(proxy.uri, "slow"), a_record("slow")
    proxy.choose = lambda path: None
    tracker.open()
    proxy.choose = lambda path: time.sleep(1.5)
    started = time.monotonic()
    train(tracker, record, folder, lambda step: time.sleep(0.2))
    took = time.monotonic() - started
    assert took < STEPS * 0.2 + 25, f"{STEPS} steps, each told to a server that takes 1.5 s a call, took {took:.0f} s"
    proxy.choose = lambda path: None
    assert tracker.close(wait_s=60) == 0
    assert_everything_once(proxy.uri, "slow", record)


# -------------------------------------------------------------------------------------------------------------- SQLite

HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_store_that_another_process_has_locked(new_tracker: Opener, folder: Path) -> None:
    tracker = new_tracker()
    record = a_record(tracker.experiment)
    command = [sys.executable, "-c", HOLD, str(sqlite_path(tracker.tracking_uri))]
    holders: list[subprocess.Popen[str]] = []

    def between(step: int) -> None:
        if step == 5:
            holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            assert holders[0].stdout is not None
            assert holders[0].stdout.readline() == "held\n"
        if step == 30:
            holders[0].communicate("")

    started = time.monotonic()
    train(tracker, record, folder, between)
    assert time.monotonic() - started < 60
    assert tracker.close(wait_s=30) == tracker.lacking == 0
    assert_everything_once(tracker.tracking_uri, tracker.experiment, record)


def test_an_experiment_deleted_while_a_run_is_in_it(
    new_tracker: Opener, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = new_tracker()
    record, client = a_record(tracker.experiment), MlflowClient(tracker.tracking_uri)
    experiment = client.get_experiment_by_name(tracker.experiment).experiment_id

    def between(step: int) -> None:
        if step == 10:
            client.delete_experiment(experiment)

    with caplog.at_level(logging.WARNING):
        train(tracker, record, folder, between)
        assert tracker.close() == 0
    assert tracker.lacking == 2, "its steps and its end"
    assert len([line for line in caplog.records if "refuses" in line.getMessage()]) == 2, "one line for each kind"
    with pytest.raises(ConfigError, match="mlflow experiments restore"):
        Tracker(tracker.tracking_uri, tracker.experiment).open()
    client.restore_experiment(experiment)
    later = Tracker(tracker.tracking_uri, tracker.experiment)
    later.open()
    assert sync_run(later, record, folder) == 2 * (STEPS - 9) + 2
    assert sync_run(later, record, folder) is None
    assert_everything_once(tracker.tracking_uri, tracker.experiment, record)


def test_a_parameter_longer_than_mlflow_takes(new_tracker: Opener, folder: Path) -> None:
    tracker, long = new_tracker(), "x" * 20_000
    run_id = tracker.start_trial("s1", "t1", "run", {"note": long}, {"long": long, "k" * 400: "1", "seed": "0"})
    tracker.log_steps(run_id, [(1, {"train/loss": 1.0, "m" * 400: 2.0})])
    tracker.finish(run_id, a_record(tracker.experiment).model_copy(update={"failure": long}), folder)
    assert tracker.close() == tracker.lacking == 0
    run = MlflowClient(tracker.tracking_uri).get_run(run_id)
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "0")
    assert run.data.params["long"] == "x" * 6000
    assert run.data.metrics["m" * 250] == 2.0


def test_a_backlog_has_a_limit_and_the_record_fills_the_gap(
    new_tracker: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grass_ray.results.waiting._MOST_WAITING", 20)
    tracker = new_tracker()
    record, waiting = a_record(tracker.experiment), list[int]()
    database = sqlite3.connect(sqlite_path(tracker.tracking_uri), isolation_level=None)

    def between(step: int) -> None:
        if step == 5:
            database.execute("BEGIN EXCLUSIVE")
        if step == 35:
            waiting.append(len(tracker._numbers))
            database.execute("ROLLBACK")

    train(tracker, record, folder, between)
    database.close()
    assert 20 < waiting[0] <= 20 + len(SERIES)
    assert tracker.close(wait_s=30) == 0
    assert_everything_once(tracker.tracking_uri, tracker.experiment, record)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_tracking_faults import Tracker, a_record, train
tracker = Tracker(sys.argv[1], sys.argv[2])
tracker.open()
for number in range(3):
    folder = Path(sys.argv[3], str(number))
    folder.mkdir(parents=True)
    train(tracker, a_record(sys.argv[2], key=f"t{number}"), folder)
assert tracker.close(wait_s=60) == tracker.lacking == 0
"""


@pytest.mark.slow
def test_two_sweeps_at_once_on_one_store(store: str, tmp_path: Path) -> None:
    names = [f"both-{tmp_path.name}-{number}" for number in range(2)]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, store, name, str(tmp_path / name), *sys.path]) for name in names
    ]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    for name in names:
        for number in range(3):
            assert_everything_once(store, name, a_record(name, key=f"t{number}"), runs=4)
