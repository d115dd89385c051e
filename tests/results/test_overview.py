"""What somebody who only opens MLflow sees of a sweep: its ranking as a table, as a description and as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from result_records import answers, make_record

from grass_ray.results.columns import overview_rows
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import LONGEST_NOTE, Overview, describe_sweep, draw_ranking
from grass_ray.results.record import RunRecord
from grass_ray.results.tracker import RANKING_FILE, Tracker


def records() -> list[RunRecord]:
    memory = {"memory/peak_allocated_gib": 2.0}
    return [
        make_record("grass", correct={"generated": answers(7, 10)}, metrics=memory),
        make_record("full", correct={"generated": answers(4, 10)}, metrics={"memory/peak_allocated_gib": 3.0}),
        make_record("lora", status="failed", failure="loss became nan at step 3"),
    ]


def test_the_parent_run_shows_the_ranking_and_each_update_takes_the_place_of_the_last(
    new_tracker: Callable[[], Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = new_tracker()
    sweep = tracker.start_sweep("s1", {}, {})
    overview = Overview(tracker, sweep, "Which is best?", num_trials=3, folder=tmp_path / "summary")
    overview.show(records()[1:2])
    client = MlflowClient(tracker.tracking_uri)
    assert "1 of 3 trials have ended" in client.get_run(sweep).data.tags["mlflow.note.content"]
    overview.show(records())
    assert "1 of 3" in client.get_run(sweep).data.tags["mlflow.note.content"], "too soon after the last"
    overview.update(records())

    run = client.get_run(sweep)
    note = run.data.tags["mlflow.note.content"]
    best = "Highest accuracy: **grass**, 70.0 (39.7-89.2) %, not told apart from 1 other row."
    assert note.startswith(f"{best} 3 of 3 trials have ended.\n\nWhich is best?")
    assert "| 1 | grass \\* | 70.0 | 39.7-89.2 | +30.0 | 2.00 |" in note
    assert "| - | lora | - | - | - | - | 0 | failed |" in note
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.note.content"] == note
    assert run.data.tags["best"] == "grass: 70.0 (39.7-89.2) %"
    assert run.data.metrics["sweep/best_accuracy"] == 0.7
    assert [(m.step, m.value) for m in client.get_metric_history(sweep, "sweep/finished")] == [(1, 1.0), (3, 2.0)]
    assert {item.path for item in client.list_artifacts(sweep)} >= {
        RANKING_FILE, "ranking.png", "leaderboard.md", "leaderboard.csv", "leaderboard.json",
    }  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.tracking_uri)  # load_table searches there
    table = client.load_table(run.info.experiment_id, RANKING_FILE, run_ids=[sweep])
    assert list(table["method"]) == ["grass", "full", "lora"]
    assert list(table["accuracy %"])[:2] == [70.0, 40.0]
    assert list(table["reason"])[2] == "seed 0: loss became nan at step 3"


def test_what_must_not_be_missed_is_in_the_description() -> None:
    other = make_record("grass", correct={"generated": answers(9, 10)}, overrides=["data.source.seed=7"])
    dropped = records()[1]
    dropped.data |= {"train_rows_used": 2, "train_rows_dropped": 38}
    tables = build_leaderboard([*records()[:1], dropped, other])
    note = describe_sweep("Which is best?", tables, done=3, num_trials=3)
    assert not note.startswith("Highest"), "nothing is best over two tests"
    for words in ("not to be compared with the other table", "dropped 38 of 40 training rows", "these runs alone"):
        assert words in note


def test_nothing_is_best_over_several_tests(new_tracker: Callable[[], Tracker], tmp_path: Path) -> None:
    tracker = new_tracker()
    sweep = tracker.start_sweep("s1", {}, {})
    other = make_record("lora", correct={"generated": answers(9, 10)}, overrides=["data.source.seed=7"])
    Overview(tracker, sweep, "Which?", num_trials=3, folder=tmp_path).update([*records()[:2], other])
    run = MlflowClient(tracker.tracking_uri).get_run(sweep)
    assert "best" not in run.data.tags
    assert "sweep/best_accuracy" not in run.data.metrics


def test_while_the_store_is_away_only_the_latest_ranking_waits(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "away")
    tracker.open()
    sweep = tracker.start_sweep("s1", {}, {})
    tracker._outbox._spent_s = float("inf")
    for number in (1, 2, 3):
        tracker.show_sweep(sweep, note=f"{number} trials", table=[{"n": number}])
    assert tracker.lacking == 1
    assert tracker.close() == 0
    assert MlflowClient(tracker.tracking_uri).get_run(sweep).data.tags["mlflow.note.content"] == "3 trials"


def test_a_description_of_many_rows_fits_into_a_tag_and_says_what_is_missing() -> None:
    many = [make_record("grass", overrides=[f"method.sampler.period={period}"]) for period in range(1, 201)]
    tables = build_leaderboard(many)
    note = describe_sweep("Which period?", tables, done=200, num_trials=200)
    assert len(note) <= LONGEST_NOTE
    shown = note.count("| grass (period=")
    assert shown > 20
    assert f"{200 - shown} more rows in leaderboard.md" in note
    assert len(overview_rows(tables)) == 200


def test_names_do_not_break_the_markdown() -> None:
    note = describe_sweep("a|b\nc *d*", [], done=0, num_trials=1)
    assert "a\\|b c \\*d\\*" in note


def test_no_picture_where_nothing_is_ranked(tmp_path: Path) -> None:
    assert not draw_ranking(build_leaderboard(records()[2:]), tmp_path / "ranking.png")
    assert draw_ranking(build_leaderboard(records()), tmp_path / "ranking.png")
    assert [path.name for path in tmp_path.iterdir()] == ["ranking.png"]
