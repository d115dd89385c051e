"""Runs listed straight from a SQLite store are those that MLflow lists."""

from __future__ import annotations

import math
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Metric
from result_records import make_record

from grass_ray.config import ConfigError
from grass_ray.results import store
from grass_ray.results.connection import connect, default_tracking_uri, sqlite_path
from grass_ray.results.store import PARENT_TAG, load_records, tracked_runs
from grass_ray.results.tracker import Tracker

pytestmark = pytest.mark.long


def refuse(place: object) -> None:
    raise sqlite3.OperationalError("no such table")


def test_mlflow_lists_the_same_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = default_tracking_uri(tmp_path / "a %? folder")
    sqlite_path(uri).parent.mkdir()
    client = connect(uri)
    experiments = [client.create_experiment(name, (tmp_path / name).as_uri()) for name in ("one", "two", "gone")]
    for number in range(8):
        tags = {PARENT_TAG: "p", "sweep_id": "s", "trial_key": str(number % 6)}
        if number == 3:
            del tags[PARENT_TAG]
        elif number != 5:
            tags["status"] = "finished"
        run = client.create_run(
            experiments[number % 3], start_time=1000 * (8 - number), tags=tags, run_name=f"r{number}"
        )
        values = {"eval/average": 0.1 * number, "eval/loss": math.nan, "train/loss": 2.0}
        moment = [Metric(key, value, 1, 0) for key, value in values.items()]
        client.log_batch(run.info.run_id, metrics=moment if number != 4 else [])
        if number == 1:
            client.delete_run(run.info.run_id)
    client.delete_experiment(experiments[2])
    with monkeypatch.context() as without_mlflow:
        without_mlflow.setattr(store, "connect", refuse)
        listed = tracked_runs(uri)
    assert [run.name for run in listed] == ["r7", "r0", "r4"]
    monkeypatch.setattr(store, "open_store", refuse)
    assert repr(tracked_runs(uri)) == repr(listed), "a NaN is not equal to itself"


def test_records_are_those_that_mlflow_finds(
    new_tracker: Callable[[], Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = new_tracker()
    uri = tracker.tracking_uri
    for seed in (0, 1):
        record = make_record("grass", seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            tracker.finish(tracker.start_trial("s", str(seed), f"r{seed}", {}, {}), record, Path(folder))
    tracker.start_sweep("s", {}, {})
    connect(uri).create_experiment("another")

    def read() -> tuple[list[str], str]:
        found = [record.model_dump_json() for record in load_records(uri)]
        assert found == [record.model_dump_json() for record in load_records(uri, tracker.experiment)]
        assert load_records(uri, "another") == []
        with pytest.raises(ConfigError) as refused:
            load_records(uri, "none")
        return found, str(refused.value)

    with monkeypatch.context() as without_mlflow:
        without_mlflow.setattr(store, "connect", refuse)
        found = read()
    assert len(found[0]) == 2
    monkeypatch.setattr(store, "open_store", refuse)
    assert read() == found
