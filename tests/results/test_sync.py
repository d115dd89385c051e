"""``grass-ray sync``: what a store lacks of runs on disk is uploaded, once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from result_records import make_record
from small import short_run

from grass_ray.cli import main
from grass_ray.commands.train import train_locally
from grass_ray.config import RunConfig
from grass_ray.experiment.plan import PLAN_FILE, SweepPlan
from grass_ray.results.connection import default_tracking_uri, sqlite_path
from grass_ray.results.record import RunRecord
from grass_ray.results.store import load_records
from grass_ray.results.tracker import Tracker
from grass_ray.results.writes import final_metrics

Sync = Callable[..., tuple[int, str, str]]
SERIES = {"train/loss": [(1, 2.0), (2, 1.0)], "train/lr": [(1, 0.1), (2, 0.1)]}


@pytest.fixture
def sync(capsys: pytest.CaptureFixture[str]) -> Sync:
    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["sync", *map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(left.value.code or 0), said.out, said.err

    return call


def a_sweep(root: Path, uri: str) -> Path:
    """The folder of a sweep of three trials, of which two have a record; the plan names the store."""
    records = [
        make_record(method, metrics={"eval/average": 0.5, "train/loss": 1.0}, series=SERIES)
        for method in ("full", "lora", "grass")
    ]
    folder = root / "quickstart" / "s1"
    for record in records[:2]:
        config = RunConfig.parse(record.config)
        place = folder / config.folder
        place.mkdir(parents=True)
        record.save(place / "record.json")
        config.save(place / "config.yaml")
    plan = SweepPlan(
        name="quickstart",
        sweep_id="s1",
        question="Which learns?",
        tracking_uri=uri,
        trials=tuple(RunConfig.parse(record.config) for record in records),
    )
    (folder / PLAN_FILE).write_text(plan.to_yaml())
    return folder


def contents(uri: str) -> list[str]:
    with sqlite3.connect(sqlite_path(uri)) as database:
        return list(database.iterdump())


def test_a_store_is_rebuilt_from_disk_and_a_second_time_nothing_changes(tmp_path: Path, store: str, sync: Sync) -> None:
    uri = default_tracking_uri(tmp_path / "new")
    (tmp_path / "new").mkdir()
    sqlite_path(uri).write_bytes(sqlite_path(store).read_bytes())  # tables; migrations take seconds
    folder = a_sweep(tmp_path, uri)
    code, out, _ = sync(tmp_path)
    assert code == 0
    assert "uploaded  full-smollm2_135m-generated-s0 of s1: 4 numbers, and the files" in out
    assert "s1: 2 of 3 trials have ended" in out
    assert out.endswith("2 uploaded, 0 complete already, 0 left behind\n")
    assert sorted(load_records(uri, "quickstart"), key=str) == sorted(
        (RunRecord.load(path) for path in folder.glob("*/record.json")), key=str
    )
    before = contents(uri)
    assert sync(folder, "--quiet") == (0, "0 uploaded, 2 complete already, 0 left behind\n", "")
    assert contents(uri) == before

    third = make_record("grass", metrics={"eval/average": 0.5, "train/loss": 1.0}, series=SERIES)
    place = folder / RunConfig.parse(third.config).folder
    place.mkdir()
    third.save(place / "record.json")
    code, out, _ = sync(folder)
    assert (code, "uploaded  ranking of s1" in out) == (0, True)
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.data.tags["question"] == "Which learns?"
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} >= {"ranking.json", "leaderboard.md"}
    trial = next(run for run in runs if run.data.tags.get("method") == "grass")
    assert (trial.data.params["method.name"], trial.data.tags["folder"]) == ("grass", str(place))
    before = contents(uri)
    assert sync(folder)[1] == "0 uploaded, 3 complete already, 0 left behind\n"
    assert contents(uri) == before


def test_only_what_is_missing_is_sent(tmp_path: Path, store: str, sync: Sync) -> None:
    folder = a_sweep(tmp_path, store)
    (path, *_) = sorted(folder.glob("*/record.json"))
    record = RunRecord.load(path)
    tracker = Tracker(store, "quickstart")
    tracker.open()
    run_id = tracker.start_trial("s1", record.run_id.removeprefix("s1-"), record.name, {}, {})
    tracker.log_steps(run_id, [(1, {"train/loss": 2.0})])
    assert "3 numbers" in sync(path.parent)[1]
    history = MlflowClient(store).get_metric_history(run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == SERIES["train/loss"]


def test_what_cannot_be_uploaded_is_said(tmp_path: Path, store: str, sync: Sync) -> None:
    folder = a_sweep(tmp_path, store)
    next(folder.glob("full*/record.json")).write_text("{")
    code, out, err = sync(folder, "--tracking-uri", store)
    assert code == 1
    assert "left out: " in err
    assert out.endswith("1 left behind\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere is no folder"),
        ((".",), "no run below . has a record yet"),
        (("full", "--tracking-uri", "http://127.0.0.1:9"), "http://127.0.0.1:9 does not answer"),
    ],
)
def test_wrong_words(
    tmp_path: Path, store: str, sync: Sync, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "full":
        a_sweep(tmp_path / "full", store)
    code, _, err = sync(*words)
    assert (code, message in err) == (2, True), err


@pytest.mark.long
def test_a_real_run_is_complete_when_it_ends_and_rebuilt_when_its_store_is_lost(tmp_path: Path, sync: Sync) -> None:
    uri, folder = default_tracking_uri(tmp_path), tmp_path / "train" / "run"
    config = short_run("grass", "evaluation.limit=4")
    assert train_locally(config, output=folder, tracking_uri=uri, resume=False, dry_run=False, quiet=True) == 0
    assert sync(tmp_path)[:2] == (0, "0 uploaded, 1 complete already, 0 left behind\n")
    assert_all_of(RunRecord.load(folder / "record.json"), uri)
    other = default_tracking_uri(tmp_path / "other")
    assert sync(folder, "--tracking-uri", other)[0] == 0
    assert_all_of(RunRecord.load(folder / "record.json"), other)


def assert_all_of(record: RunRecord, uri: str) -> None:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train").experiment_id], "tags.status = 'finished'")
    final = {(metric.key, metric.step, metric.value) for metric in final_metrics(record)}  # such as the mean speed
    for name, points in record.series.items():
        history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert sorted(history) == sorted([*points, *((step, value) for key, step, value in final if key == name)]), name
    assert run.data.metrics["eval/average"] == record.metrics["eval/average"]
    assert load_records(uri, "train") == [record]
