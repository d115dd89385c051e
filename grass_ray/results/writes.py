"""What is written to an MLflow store, in parts that may be repeated: nothing is doubled, nothing is lost.

::

    run = find_runs(client, experiment_id, sweep_id, trial_key)[0]
    log_metrics(client, run_id, missing_steps(client, run_id, record.series, ended))
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_ray.config import to_json
from grass_ray.results.connection import metric_name, quoted
from grass_ray.results.record import RunRecord, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)

RUN_STATUS: Mapping[Status, str] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "out_of_memory": "FAILED",
}
COMPLETE_TAG = "record_sha256"  # of the record that is in the run with all its numbers and files; set last
_FILES = ("config.yaml", "record.json", "examples.jsonl", "lm_eval_examples.jsonl", "engagement.json", "engagement.txt")
_PICTURES = ("*.png", "*.svg", "*.pdf", "plots/*.png", "plots/*.svg", "plots/*.pdf")
_METRICS_A_BATCH = 1000
_OTHERS_A_BATCH = 100


class EmptyAnswerError(OSError):
    """The store answered with nothing where it must hold something: what was asked is unknown."""


# ------------------------------------------------------------------------------------------------------------ finding


def find_runs(client: MlflowClient, experiment_id: str, sweep_id: str, trial_key: str) -> list[Run]:
    """The runs with these two tags, oldest first; more than one only if the store answered a creation too late."""
    wanted = f"tags.sweep_id = {quoted(sweep_id)} and tags.trial_key = {quoted(trial_key)}"
    return list(client.search_runs([experiment_id], wanted, order_by=["attributes.start_time ASC"]))


def create_run(client: MlflowClient, experiment_id: str, tags: Mapping[str, str], run_name: str) -> str:
    """Create a run, with its tags at once, so that a killed process leaves no run without them."""
    run_id = str(client.create_run(experiment_id, tags=dict(tags), run_name=run_name).info.run_id)
    if not run_id:
        raise EmptyAnswerError("the store created a run and did not say which")
    return run_id


def get_run(client: MlflowClient, run_id: str) -> Run:
    """A run, of which the store says that it is the one asked for."""
    run = client.get_run(run_id)
    if run.info.run_id != run_id:
        raise EmptyAnswerError(f"the store was asked for run {run_id} and answered with none")
    return run


def delete_twins(client: MlflowClient, run_id: str) -> None:
    """Delete the runs of the same trial that nobody finished: made by requests that were answered too late."""
    run = get_run(client, run_id)
    tags = run.data.tags
    for other in find_runs(client, run.info.experiment_id, tags["sweep_id"], tags["trial_key"]):
        if other.info.run_id != run_id and "status" not in other.data.tags:
            log.warning("deleting MLflow's run %s, a second one of %s", other.info.run_id, run.info.run_name)
            client.delete_run(other.info.run_id)


def check_run(
    client: MlflowClient, run_id: str, record: RunRecord, params: Mapping[str, str], *, every_step: bool
) -> None:
    """Raise :class:`EmptyAnswerError` if a run has not ended with all of its record.

    Every call that sends steps sends one of the longest series, so its steps show whether one was lost;
    ``every_step`` looks at those of all series, a call for each.
    """
    run = get_run(client, run_id)
    longest = max(record.series, key=lambda key: len(record.series[key]), default=None)
    looked_at = record.series if every_step or longest is None else {longest: record.series[longest]}
    ended = run.info.status == RUN_STATUS[record.status] and run.data.tags.get("status") == record.status
    numbers = {metric_name(key) for key in (*record.series, *record.metrics) if record.series.get(key, True)}
    there = numbers <= run.data.metrics.keys() and set(map(metric_name, params)) <= run.data.params.keys()
    if not ended or not there or missing_steps(client, run_id, looked_at, ended_at(record)):
        raise EmptyAnswerError(f"the store took the end of run {run_id} and does not have it")


# ------------------------------------------------------------------------------------------------------------ numbers


def logged_steps(client: MlflowClient, run_id: str, key: str, *, some: bool = False) -> set[int]:
    """The steps at which a run has the metric ``key``; ``some``: the run is known to have it."""
    found = {int(metric.step) for metric in client.get_metric_history(run_id, key)}
    if some and not found:
        raise EmptyAnswerError(f"the store holds {key} of run {run_id} and answered with no value of it")
    return found


def missing_steps(
    client: MlflowClient, run_id: str, series: Mapping[str, Sequence[tuple[int, float]]], moment: int
) -> list[Metric]:
    """Those points of series that are not in the run yet; ``moment`` in milliseconds since 1970."""
    from mlflow.entities import Metric

    present = get_run(client, run_id).data.metrics
    rows = []
    for key, points in series.items():
        name = metric_name(key)
        steps = logged_steps(client, run_id, name, some=True) if name in present else set()
        rows += [Metric(name, float(value), moment, step) for step, value in points if step not in steps]
    return rows


def final_metrics(record: RunRecord) -> list[Metric]:
    """A record's metrics at its last step, without those that its series end with."""
    from mlflow.entities import Metric

    last = max((points[-1][0] for points in record.series.values() if points), default=0)
    return [
        Metric(metric_name(key), float(value), ended_at(record), last)
        for key, value in record.metrics.items()
        if record.series.get(key, [])[-1:] != [(last, value)]
    ]


def log_metrics(client: MlflowClient, run_id: str, rows: Sequence[Metric]) -> None:
    """Log metrics; exact repetitions of what is there add nothing."""
    for start in range(0, len(rows), _METRICS_A_BATCH):
        client.log_batch(run_id, metrics=rows[start : start + _METRICS_A_BATCH])


def ended_at(record: RunRecord) -> int:
    """When a run ended, in milliseconds since 1970."""
    return int(datetime.fromisoformat(record.finished_at).timestamp() * 1000)


# ------------------------------------------------------------------------------------------------------ text and files


def add_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Add the parameters that a run does not have yet: they never change in MLflow. Long values are cut."""
    from mlflow.entities import Param

    present = get_run(client, run_id).data.params
    new = {metric_name(key): str(value)[:6000] for key, value in params.items()}
    rows = [Param(key, value) for key, value in new.items() if key not in present]
    for start in range(0, len(rows), _OTHERS_A_BATCH):
        client.log_batch(run_id, params=rows[start : start + _OTHERS_A_BATCH])


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags, of at most 5000 characters but for the description."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(metric_name(key), value) for key, value in tags.items()])


def ending_tags(record: RunRecord) -> dict[str, str]:
    """The tags that say how a run ended, and where."""
    tags = {
        "status": record.status,
        "hardware": record.hardware,
        "world_size": str(record.world_size),
        "git_commit": record.git_commit or "-",
        "git_dirty": "-" if record.git_dirty is None else str(record.git_dirty).lower(),
    }
    if record.reused_from:
        tags["reused_from"] = record.reused_from
    if record.failure:
        tags["failure"] = record.failure[:5000]
    return tags


def digest(*records: RunRecord) -> str:
    """SHA-256 of a record's contents, or of several in any order; in hexadecimal."""
    return joint_digest(hashlib.sha256(record.model_dump_json().encode()).hexdigest() for record in records)


def joint_digest(digests: Iterable[str]) -> str:
    """The digest of several records, from those of each."""
    each = sorted(digests)
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def upload_files(client: MlflowClient, run_id: str, record: RunRecord, folder: Path) -> bool:
    """Log a run's files; returns False if there was no room for them and the run did not finish anyway."""
    try:
        client.log_text(run_id, record.model_dump_json(indent=1), "record.json")
        for path in files_of(folder):
            inside = path.parent.relative_to(folder).as_posix()
            client.log_artifact(run_id, str(path), None if inside == "." else inside)
    except OSError as error:
        if record.status == "finished" or error.errno != errno.ENOSPC:
            raise
        return False  # what is behind this call must not wait for it
    return True


def files_of(folder: Path) -> list[Path]:
    """The files of a run's folder that go into the store beside its record; none that a link takes from elsewhere."""
    files = [folder / name for name in _FILES if name != "record.json"]
    files += [path for pattern in _PICTURES for path in sorted(folder.glob(pattern))]
    own = folder.resolve()
    return [path for path in files if path.is_file() and path.resolve().is_relative_to(own)]


def split_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as ``pandas.DataFrame.to_json(orient="split")`` writes them, which MLflow shows as a table."""
    columns = list(rows[0]) if rows else []
    return to_json({"columns": columns, "data": [[row[column] for column in columns] for row in rows]})
