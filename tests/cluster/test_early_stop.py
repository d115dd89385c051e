"""The books of a trial that ASHA stopped: a record of its own, KILLED in MLflow, a row of the leaderboard."""

from pathlib import Path
from typing import Any

import pytest
from mini_search import SWEEP
from mlflow import MlflowClient

from grass_ray.cluster.job import has_ended
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.storage import Storage
from grass_ray.config import RunConfig
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan, plan_trials
from grass_ray.progress import SweepProgress
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import Overview
from grass_ray.results.record import RunRecord, SearchPart
from grass_ray.results.searches import best_settings, rung_losses
from grass_ray.results.tracker import Tracker

REASON = "stopped early at step 4 of 36 by ASHA: its validation loss 1.5000 was not among the best 1/3 there"


@pytest.fixture
def books(tmp_path: Path) -> tuple[TrialStore, RunConfig]:
    _, search = plan_trials(SWEEP, SweepOptions(scheduler="asha", num_samples=2))
    assert search is not None
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    plan = SweepPlan(name="mini", sweep_id="s", question="?", trials=(), tracking_uri=uri, search=search)
    storage = Storage.at(str(tmp_path / "mini" / "s"))
    tracker = Tracker(uri, "mini", tmp_path / "artifacts")
    tracker.open()
    run = tracker.start_sweep("s", {}, {})
    overview = Overview(tracker, run, "?", num_trials=2, folder=tmp_path / "summary")
    progress = SweepProgress("mini", [], quiet=True, expected=plan.num_trials)
    trial_store = TrialStore(plan, storage, tracker, progress, tmp_path, overview)
    config = search.trials[0]
    trial_store.add(config, SearchPart(search="random", scheduler="asha", stage="search", number=0))
    return trial_store, config


def steps(first: int, last: int, loss: float | None = None) -> dict[str, Any]:
    found: list[Any] = [[step, {"train/loss": 2.0 + step}] for step in range(first, last + 1)]
    if loss is not None:
        found[-1][1]["validation/loss"] = loss
    machine = {"hardware_name": "A worker's CPU", "threads": 1}
    return {"phase": "training", "steps": found, "view": {}, "machine": machine}


def test_a_stopped_trial_is_recorded_up_to_the_rung_that_stopped_it(
    books: tuple[TrialStore, RunConfig], tmp_path: Path
) -> None:
    trial_store, config = books
    trial_store.start(config.fingerprint)
    trial_store.result(config.fingerprint, steps(1, 6, 1.5))  # two of the six only measured
    trial_store.stop_early(config.fingerprint, 4, REASON)
    late = trial_store.records[config.fingerprint].model_copy(update={"status": "finished"})
    trial_store.storage.write_text(
        late.model_dump_json(), config.folder, "record.json"
    )  # a process in its last moments
    trial_store.settle()

    record = RunRecord.load(tmp_path / "mini" / "s" / config.folder / "record.json")
    assert (record.status, record.failure) == ("stopped", REASON)
    assert record.search is not None
    assert (record.search.scheduler, record.search.stopped_after, record.search.number) == ("asha", 4, 0)
    assert [step for step, _ in record.series["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert rung_losses(record) == {4: 1.5}
    assert (record.hardware, record.threads) == ("A worker's CPU", 1)
    assert has_ended(trial_store.storage, config), "a resumed search does not run it again"
    assert trial_store.progress.summary().startswith("1 of 3 done, 0 running, 0 failed, 1 stopped early")

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mini").experiment_id], "tags.stage = 'search'")
    assert [(run.info.status, run.data.tags["status"]) for run in runs] == [("KILLED", "stopped")]
    assert runs[0].data.metrics["validation/loss"] == 1.5
    (table,) = build_leaderboard([record])
    assert [(row.status, row.rank) for row in table.rows] == [("stopped", None)]
    assert "stopped early at step 4 of 36 by ASHA" in (table.rows[0].failure or "")
    assert best_settings([record]) == {}
