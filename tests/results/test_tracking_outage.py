from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import free_port, server
from result_records import make_record

from grass_ray.results.store import load_records
from grass_ray.results.tracker import Tracker


@pytest.mark.slow
def test_a_server_that_dies_in_mid_run_loses_nothing(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    tracker = Tracker(uri, "quickstart")
    record = make_record(metrics={"eval/average": 0.5})
    with server(tmp_path, port):
        tracker.open()
        sweep = tracker.start_sweep("s1", {}, {})
        first = tracker.start_trial("s1", "first", "first", {}, {})
        tracker.log_steps(first, [(1, {"train/loss": 3.0})])

    with caplog.at_level(logging.WARNING):
        started = time.monotonic()
        for step in (2, 3, 4):
            tracker.log_steps(first, [(step, {"train/loss": 3.0 / step})])
        second = tracker.start_trial("s1", "second", "second", {"seed": "1"}, {"a": "1"})
        tracker.log_steps(second, [(1, {"train/loss": 5.0})])
        tracker.finish(first, record, folder)
        tracker.finish(second, make_record("lora"), folder)
        tracker.finish_sweep(sweep)
        assert time.monotonic() - started < 15, "an outage must not hold training up"
    assert len([line for line in caplog.records if "training goes on" in line.getMessage()]) == 1
    assert tracker.close(wait_s=0) == 6, "the steps of a run go together"

    with server(tmp_path, port):
        assert tracker.close(wait_s=60) == 0
        client = MlflowClient(uri)
        history = [(metric.step, metric.value) for metric in client.get_metric_history(first, "train/loss")]
        assert history == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
        assert client.get_run(sweep).info.status == "FINISHED"
        runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
        assert {run.info.run_name: run.info.status for run in runs} == {
            "quickstart-s1": "FINISHED",
            "first": "FINISHED",
            "second": "FINISHED",
        }
        late = next(run for run in runs if run.info.run_name == "second")
        assert late.data.metrics == {"train/loss": 5.0}
        assert late.data.tags["mlflow.parentRunId"] == sweep
        assert sorted(r.config["method"]["name"] for r in load_records(uri, "quickstart")) == ["grass", "lora"]
