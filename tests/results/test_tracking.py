from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from result_records import make_record

from grass_ray.config import ConfigError
from grass_ray.results.connection import default_tracking_uri, metric_name
from grass_ray.results.store import load_records
from grass_ray.results.tracker import Tracker

Opener = Callable[[], Tracker]


def runs_of(tracker: Tracker) -> list:
    client = MlflowClient(tracker.tracking_uri)
    experiment = client.get_experiment_by_name(tracker.experiment)
    return list(client.search_runs([experiment.experiment_id]))


def test_a_trial_is_a_child_run_with_everything_in_it(new_tracker: Opener, folder: Path) -> None:
    tracker = new_tracker()
    sweep = tracker.start_sweep("s1", {"sweep": "quickstart"}, {"seeds": "0"})
    record = make_record(metrics={"eval/average": 0.5, "train/loss": 1.0}, series={"train/loss": [(1, 2.0), (2, 1.0)]})
    tags = {"method": "grass", "model": "tiny", "suite": "generated", "seed": "0"}
    run_id = tracker.start_trial("s1", "t1", record.name, tags, {"seed": "0", "empty": ""})
    tracker.log_steps(run_id, [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0, "train/grad_norm": math.nan})])
    tracker.finish(run_id, record, folder)
    tracker.finish_sweep(sweep)
    assert tracker.close() == 0

    client = MlflowClient(tracker.tracking_uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "grass-smollm2_135m-generated-s0"
    assert run.data.tags["mlflow.parentRunId"] == sweep
    assert run.data.tags.items() >= {**tags, "status": "finished", "world_size": "1", "git_dirty": "false"}.items()
    assert run.data.params == {"seed": "0", "empty": ""}
    assert run.data.metrics["eval/average"] == 0.5
    assert math.isnan(run.data.metrics["train/grad_norm"])
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")] == [(1, 2.0), (2, 1.0)]
    names = {item.path for item in client.list_artifacts(run_id)}
    assert names == {"config.yaml", "record.json", "examples.jsonl", "loss.png"}
    assert client.get_run(sweep).info.status == "FINISHED"
    assert load_records(tracker.tracking_uri, tracker.experiment) == [record]


@pytest.mark.parametrize(
    ("status", "expected"), [("stopped", "KILLED"), ("failed", "FAILED"), ("out_of_memory", "FAILED")]
)
def test_how_a_trial_ended_shows(new_tracker: Opener, tmp_path: Path, status: str, expected: str) -> None:
    tracker = new_tracker()
    run_id = tracker.start_trial("s1", status, "run", {}, {})
    tracker.finish(run_id, make_record(status=status, failure="the reason"), tmp_path / "never made")
    run = MlflowClient(tracker.tracking_uri).get_run(run_id)
    assert (run.info.status, run.data.tags["status"], run.data.tags["failure"]) == (expected, status, "the reason")


def test_a_new_process_finds_the_runs_of_a_dead_one(new_tracker: Opener, folder: Path) -> None:
    dead = new_tracker()
    sweep, trial = dead.start_sweep("s1", {}, {}), dead.start_trial("s1", "t1", "run", {"seed": "0"}, {"a": "1"})
    dead.log_steps(trial, [(1, {"train/loss": 3.0}), (2, {"train/loss": 2.0})])

    new = new_tracker()
    assert new.start_sweep("s1", {}, {}) == sweep
    assert new.start_trial("s1", "t1", "run", {"seed": "0"}, {"a": "changed", "b": "2"}) == trial
    new.log_steps(trial, [(2, {"train/loss": 2.0, "train/lr": 0.1}), (3, {"train/loss": 1.0})])
    new.finish(trial, make_record(), folder)
    new.finish(trial, make_record(), folder)
    client = MlflowClient(new.tracking_uri)
    assert [(m.step, m.value) for m in client.get_metric_history(trial, "train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len(client.get_metric_history(trial, "train/lr")) == 1
    assert client.get_run(trial).data.params == {"a": "1", "b": "2"}
    assert len(runs_of(new)) == 2


def test_a_finished_trial_is_open_again_when_started_again(new_tracker: Opener, folder: Path) -> None:
    tracker = new_tracker()
    trial = tracker.start_trial("s1", "t1", "run", {}, {})
    tracker.finish(trial, make_record(), folder)
    assert new_tracker().start_trial("s1", "t1", "run", {}, {}) == trial
    assert MlflowClient(tracker.tracking_uri).get_run(trial).info.status == "RUNNING"


def test_runs_without_a_sweep_share_a_parent_that_is_not_running(new_tracker: Opener) -> None:
    trials = [new_tracker().start_trial("train", key, "run", {}, {}) for key in ("t1", "t2")]
    client = MlflowClient(new_tracker().tracking_uri)
    runs = [client.get_run(trial) for trial in trials]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert [run.info.status for run in runs] == ["RUNNING", "RUNNING"]
    assert client.get_run(parent).info.status == "FINISHED"


def test_a_process_killed_before_the_sweep_run_existed(new_tracker: Opener) -> None:
    trial = new_tracker().start_trial("s1", "t1", "run", {}, {})
    sweep = new_tracker().start_sweep("s1", {}, {})
    client = MlflowClient(new_tracker().tracking_uri)
    assert client.get_run(trial).data.tags["mlflow.parentRunId"] == sweep
    assert client.get_run(sweep).info.status == "RUNNING"
    assert len(runs_of(new_tracker())) == 2


def test_more_numbers_and_params_than_fit_a_batch(new_tracker: Opener) -> None:
    tracker = new_tracker()
    trial = tracker.start_trial("s1", "t1", "run", {}, {f"p{index}": "x" for index in range(230)})
    tracker.log_steps(trial, [(step, {f"layers/p_{layer:02d}": 0.1 for layer in range(50)}) for step in range(45)])
    client = MlflowClient(tracker.tracking_uri)
    assert len(client.get_run(trial).data.params) == 230
    assert len(client.get_metric_history(trial, "layers/p_49")) == 45


@pytest.mark.parametrize(
    ("given", "expected"),
    [("eval/gsm8k/accuracy", "eval/gsm8k/accuracy"), ("a//b", "a/b"), ("../a", "a"), ("µ(x)", "__x_"), ("", "_")],
)
def test_names_mlflow_would_refuse(new_tracker: Opener, given: str, expected: str) -> None:
    tracker = new_tracker()
    trial = tracker.start_trial("s1", "t1", "run", {}, {})
    tracker.log_steps(trial, [(1, {given: 1.0})])
    assert metric_name(given) == expected
    assert MlflowClient(tracker.tracking_uri).get_run(trial).data.metrics == {expected: 1.0}


def test_a_refused_call_does_not_block_the_next(new_tracker: Opener, caplog: pytest.LogCaptureFixture) -> None:
    tracker = new_tracker()
    kept, deleted = (tracker.start_trial("s1", key, key, {}, {}) for key in ("kept", "deleted"))
    MlflowClient(tracker.tracking_uri).delete_run(deleted)
    with caplog.at_level(logging.WARNING):
        tracker.log_steps(deleted, [(1, {"train/loss": 1.0})])
    tracker.log_steps(kept, [(1, {"train/loss": 1.0})])
    assert "refuses" in caplog.text
    assert MlflowClient(tracker.tracking_uri).get_run(kept).data.metrics == {"train/loss": 1.0}


def test_a_tracker_is_plain_data(new_tracker: Opener) -> None:
    tracker = new_tracker()
    copy = pickle.loads(pickle.dumps(tracker))
    assert (copy.tracking_uri, copy.experiment) == (tracker.tracking_uri, tracker.experiment)
    copy.open()
    assert copy.start_sweep("s1", {}, {}) == tracker.start_sweep("s1", {}, {})


def test_relative_stores_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Tracker("sqlite:///here.db", "x").tracking_uri == f"sqlite:///{tmp_path}/here.db"
    assert default_tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Tracker("sqlite:///~/x.db", "x").tracking_uri == f"sqlite:///{tmp_path}/home/x.db"


def test_a_store_may_be_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "50%20 off? #1 ü"
    tracker = Tracker(default_tracking_uri(folder), "x")
    tracker.open()
    tracker.start_trial("sweep", "trial", "run", {}, {})
    assert tracker.close() == 0
    assert (folder / "mlflow.db").is_file()
    assert not [path for path in tmp_path.iterdir() if path.is_file()], "no database of another name"
    assert load_records(default_tracking_uri(folder), "x") == []


def test_artifacts_lie_under_the_given_root(store: str, tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "with space"
    tracker = Tracker(store, f"root-{tmp_path.name}", root)
    tracker.open()
    tracker.finish(tracker.start_trial("s1", "t1", "run", {}, {}), make_record(), folder)
    assert len(list(root.rglob("record.json"))) == 1
    assert len(load_records(store, tracker.experiment)) == 1


def test_an_unreachable_server_is_one_quick_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"http://\*\*\*@127.0.0.1:9 does not answer") as caught:
        Tracker("http://user:secret@127.0.0.1:9", "x").open()
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="does not answer"):
        load_records("http://127.0.0.1:9", None)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("uri", ["nonsense://place", "sqlite:////proc/no/such.db"])
def test_a_store_that_cannot_be_used(uri: str) -> None:
    with pytest.raises(ConfigError, match="cannot use the MLflow store"):
        Tracker(uri, "x").open()


def test_a_deleted_experiment_says_how_to_get_it_back(new_tracker: Opener) -> None:
    tracker = new_tracker()
    client = MlflowClient(tracker.tracking_uri)
    client.delete_experiment(client.get_experiment_by_name(tracker.experiment).experiment_id)
    with pytest.raises(ConfigError, match="mlflow experiments restore"):
        tracker.open()


def test_loading_from_what_does_not_exist(new_tracker: Opener, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown experiment 'none' in .*available: .*sweep-"):
        load_records(new_tracker().tracking_uri, "none")
    with pytest.raises(ConfigError, match="there is no MLflow store"):
        load_records(default_tracking_uri(tmp_path), None)
    assert not (tmp_path / "mlflow.db").exists()


def test_records_are_loaded_once_and_only_where_there_are_some(
    new_tracker: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = new_tracker()
    tracker.start_sweep("s1", {}, {})
    done = tracker.start_trial("s1", "done", "run", {}, {})
    tracker.finish(done, make_record("lora"), tmp_path)
    tracker.start_trial("s1", "still running", "run", {}, {})
    broken = tracker.start_trial("s1", "broken", "broken run", {}, {})
    client = MlflowClient(tracker.tracking_uri)
    client.log_text(broken, "{", "record.json")
    client.create_run(  # what a second writer might have left behind
        client.get_run(done).info.experiment_id, tags={key: client.get_run(done).data.tags[key] for key in TRIAL_TAGS}
    )
    newest = client.search_runs([client.get_run(done).info.experiment_id], max_results=1)[0].info.run_id
    client.log_text(newest, make_record("full").model_dump_json(), "record.json")
    with caplog.at_level(logging.WARNING):
        records = load_records(tracker.tracking_uri, tracker.experiment)
    assert [record.config["method"]["name"] for record in records] == ["full"]
    assert "broken run" in caplog.text


TRIAL_TAGS = ("sweep_id", "trial_key", "mlflow.parentRunId")
