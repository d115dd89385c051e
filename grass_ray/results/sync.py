"""Upload what an MLflow store lacks of runs whose records are on disk: a folder's records are the truth.

::

    tracker = Tracker(uri, record.sweep)
    tracker.open()
    numbers = sync_run(tracker, record, folder)      # None if the store had all of it

What is in the store already is not sent again, so that everything may be repeated.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from grass_ray.config import as_text
from grass_ray.errors import redact
from grass_ray.results.overview import Overview
from grass_ray.results.record import RunRecord
from grass_ray.results.store import RECORD_FILE, is_run_id, trial_tags
from grass_ray.results.tracker import SWEEP_KEY, Tracker
from grass_ray.results.writes import digest

_WITHIN_S = 60.0
_NOT_TRACKED = "eval"  # measures a model without a run


def run_folders(place: Path) -> Iterator[Path]:
    """The folders of runs with a record, at and below a folder, sorted; not MLflow's own copies of them."""
    for path in sorted(place.rglob(RECORD_FILE)):
        if not is_run_id(path.parent.parent.name):
            yield path.parent


def is_tracked(record: RunRecord) -> bool:
    """Whether a run of that kind is in a store."""
    return record.sweep != _NOT_TRACKED


def sync_run(tracker: Tracker, record: RunRecord, folder: Path) -> int | None:
    """Upload what the store lacks of one run.

    Args:
        tracker: an open tracker of the experiment ``record.sweep``.
        record: the run's record.
        folder: the folder that it is in, with the run's other files.

    Returns:
        How many values of metrics were sent; None if the run was complete.

    Raises:
        ConfigError: the store does not answer the first question.
        OSError: it stopped answering.
    """
    key = record.run_id.removeprefix(f"{record.sweep_id}-")
    if tracker.is_complete(record.sweep_id, key, record):
        return None
    stage = "trial" if record.search is None else record.search.stage
    is_alone = record.sweep == record.sweep_id  # grass-ray train's
    tags = trial_tags(
        record.config, sweep=record.sweep, stage="training" if is_alone else stage, folder=str(folder.absolute())
    )
    before = tracker.filled
    run_id = tracker.start_trial(record.sweep_id, key, record.name, tags, as_text(record.config))
    tracker.finish(run_id, record, folder)
    _close(tracker)
    return tracker.filled - before


def sync_sweep(tracker: Tracker, records: Sequence[RunRecord], *, question: str, folder: Path) -> bool:
    """Upload a sweep's ranking and end its run, after its trials; returns False if all of it was there.

    Args:
        tracker: an open tracker of the sweep's experiment.
        records: of all trials of the sweep.
        question: what the sweep asks.
        folder: the sweep's.

    Raises:
        ConfigError: the store does not answer the first question.
        OSError: it stopped answering.
    """
    sweep_id = records[0].sweep_id
    if tracker.is_complete(sweep_id, SWEEP_KEY, *records):
        return False
    tags, params = {"sweep": records[0].sweep, "question": question}, {"trials": str(len(records))}
    run_id = tracker.start_sweep(sweep_id, tags, params | {"storage": str(folder.absolute())})
    with tempfile.TemporaryDirectory(prefix="grass_ray-sync-") as scratch:
        Overview(tracker, run_id, question, num_trials=len(records), folder=Path(scratch)).update(records)
        failed = any(record.status not in ("finished", "stopped") for record in records)
        tracker.finish_sweep(run_id, status="failed" if failed else "finished", sha256=digest(*records))
        _close(tracker)
    return True


def sync_command(folder: Path, tracking_uri: str) -> str:
    """The command that uploads what is in a folder."""
    return redact(shlex.join(["grass-ray", "sync", str(folder), "--tracking-uri", tracking_uri]))


def _close(tracker: Tracker) -> None:
    tracker.close(wait_s=_WITHIN_S)
    if tracker.lacking:
        raise OSError(f"MLflow at {redact(tracker.tracking_uri)} does not take it")
