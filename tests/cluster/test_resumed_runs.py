"""A resumed sweep tells MLflow nothing anew of trials that it has whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mini_sweep import SWEEP
from sqlalchemy import event
from sqlalchemy.engine import Engine

from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.storage import Storage
from grass_ray.config import RunConfig
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan, plan_trials
from grass_ray.progress import SweepProgress
from grass_ray.results.connection import connect
from grass_ray.results.overview import Overview
from grass_ray.results.provenance import build_record, now
from grass_ray.results.store import tracked_runs
from grass_ray.results.tracker import Tracker

pytestmark = pytest.mark.long


@pytest.fixture
def writes() -> Iterator[list[str]]:
    """The statements that change a database."""
    found: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if statement.split()[0].upper() in ("INSERT", "UPDATE", "DELETE"):
            found.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield found
    event.remove(Engine, "before_cursor_execute", note)


def open_store(folder: Path, configs: list[RunConfig]) -> TrialStore:
    uri = f"sqlite:///{folder}/mlflow.db"
    plan = SweepPlan(name="mini", sweep_id="s", question="?", trials=tuple(configs), tracking_uri=uri)
    tracker = Tracker(uri, "mini", folder / "artifacts")
    tracker.open()
    run = tracker.start_sweep("s", {}, {})
    overview = Overview(tracker, run, "?", num_trials=len(configs), folder=folder / "summary")
    progress = SweepProgress("mini", [(config.fingerprint, config.name) for config in configs], quiet=True)
    return TrialStore(plan, Storage.at(str(folder / "mini" / "s")), tracker, progress, folder, overview)


def test_only_what_mlflow_does_not_have_is_written(tmp_path: Path, writes: list[str]) -> None:
    configs = plan_trials(SWEEP, SweepOptions(base=False))[0][:2]
    first = open_store(tmp_path, configs)
    for config, status in zip(configs, ("finished", "failed"), strict=True):
        record = build_record(
            run_id=f"s-{config.fingerprint}", sweep="mini", sweep_id="s", config=config, status=status,
            failure=None if status == "finished" else "a loss that is no number", outcome=None, started_at=now(),
        )  # fmt: skip
        record.series = {"train/loss": [(1, 2.0), (2, 1.5)]}
        first.storage.write_text(record.model_dump_json(), config.folder, "record.json")
        first.start(config.fingerprint)
        first.end(config.fingerprint, None)
    uri = first.plan.tracking_uri
    assert all(run.record_sha256 for run in tracked_runs(uri))

    def resume() -> int:
        again = open_store(tmp_path, configs)
        writes.clear()
        again.end(configs[0].fingerprint, None, earlier=True)
        record = again.records[configs[0].fingerprint]
        assert record.series == {}
        assert again.whole_record(record).series == {"train/loss": [(1, 2.0), (2, 1.5)]}
        return len(writes)

    assert resume() == 0
    client = connect(uri)
    (run,) = client.search_runs(["1"], f"tags.trial_key = '{configs[0].fingerprint}'")
    client.update_run(run.info.run_id, status="RUNNING")  # as of a driver that died before the last call
    assert resume() > 0
    assert all(run.record_sha256 for run in tracked_runs(uri))
    client.delete_run(run.info.run_id)
    assert resume() > 0
    assert [run.status for run in tracked_runs(uri)] == ["failed", "finished"]
