"""Reading records and files back out of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from result_records import make_history, make_record, make_series

from grass_ray.config import ConfigError
from grass_ray.results.columns import row_values
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.store import download, is_run_id, iter_records, load_records, run_folder, upload
from grass_ray.results.tracker import Tracker

Opener = Callable[[], Tracker]


def with_speed(method: str) -> dict[str, list[tuple[int, float]]]:
    series = make_series(len(method), 1.0, steps=30)
    return series | {"throughput/tokens_per_second": [(step, 100.0 + step) for step, _ in series["time/step_s"]]}


def test_records_without_their_steps_make_the_same_leaderboard(new_tracker: Opener, tmp_path: Path) -> None:
    tracker = new_tracker()
    for method in ("full", "grass"):
        record = make_record(method, series=with_speed(method), layers=make_history(num_layers=4, steps=30))
        tracker.finish(tracker.start_trial("s1", method, "run", {}, {}), record, tmp_path)
    whole = load_records(tracker.tracking_uri, tracker.experiment)
    slim = load_records(tracker.tracking_uri, tracker.experiment, series=False)
    assert len(whole[0].series["train/loss"]) == 30
    assert {name: len(points) for name, points in slim[0].series.items()} == {"step/tokens": 1}
    for one, other in zip(build_leaderboard(whole)[0].rows, build_leaderboard(slim)[0].rows, strict=True):
        assert one.train_tokens
        assert row_values(one) == row_values(other)


def test_equal_questions_of_many_runs_are_in_memory_once(new_tracker: Opener, tmp_path: Path) -> None:
    tracker = new_tracker()
    for method in ("full", "grass"):
        tracker.finish(tracker.start_trial("s1", method, "run", {}, {}), make_record(method), tmp_path)
    first, second = iter_records(tracker.tracking_uri, tracker.experiment)
    for one, other in zip(first.tasks["generated"].example_ids, second.tasks["generated"].example_ids, strict=True):
        assert one is other


def test_a_runs_files_and_folder_are_found_by_its_id(new_tracker: Opener, folder: Path, tmp_path: Path) -> None:
    tracker = new_tracker()
    run_id = tracker.start_trial("s1", "t1", "run", {"folder": str(folder)}, {})
    tracker.finish(run_id, make_record(), folder)
    assert is_run_id(run_id)
    found = download(tracker.tracking_uri, run_id, ("record.json", "examples.jsonl", "nothing.txt"), tmp_path)
    assert found.keys() == {"record.json", "examples.jsonl"}
    assert run_folder(tracker.tracking_uri, run_id) == str(folder)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    upload(tracker.tracking_uri, run_id, tmp_path / "model", "model")
    assert [item.path for item in MlflowClient(tracker.tracking_uri).list_artifacts(run_id, "model")] == [
        "model/config.json"
    ]


def test_what_is_not_there_is_one_message(new_tracker: Opener, tmp_path: Path) -> None:
    tracker = new_tracker()
    with pytest.raises(ConfigError, match="there is no run 0000"):
        run_folder(tracker.tracking_uri, "0" * 32)
    with pytest.raises(ConfigError, match="there is no MLflow store"):
        download(f"sqlite:///{tmp_path}/none.db", "0" * 32, ("record.json",), tmp_path)
    with pytest.raises(ConfigError, match="does not say where its files are"):
        run_folder(tracker.tracking_uri, tracker.start_trial("s1", "t1", "run", {}, {}))
    assert not is_run_id("grass_ray_results/train/run")
