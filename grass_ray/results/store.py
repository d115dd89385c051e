"""What is in an MLflow store: the records of its trials, and the files of a run.

::

    records = load_records(default_tracking_uri(storage_path), experiment="quickstart")
"""

from __future__ import annotations

import functools
import logging
import re
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from grass_ray.config import ConfigError
from grass_ray.errors import redact
from grass_ray.results.connection import SQLITE, absolute_uri, connect, sqlite_path, store_errors
from grass_ray.results.record import RunRecord
from grass_ray.results.sqlite_runs import open_store, read_experiments, read_runs
from grass_ray.results.writes import COMPLETE_TAG, RUN_STATUS

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
RECORD_FILE = "record.json"


def trial_tags(config: Mapping[str, Any], *, sweep: str, stage: str, folder: str) -> dict[str, str]:
    """Return the tags of a trial's run: what it is, its sweep and stage, and where its files are.

    ``config`` is the configuration as a record holds it, of any version.
    """
    return {
        "method": str(config["method"]["name"]),
        "model": str(config["model"]["name"]),
        "suite": str(config["data"]["suite"]),
        "seed": str(config["seed"]),
        "sweep": sweep,
        "stage": stage,
        "folder": folder,
    }


def load_records(tracking_uri: str, experiment: str | None = None, *, series: bool = True) -> list[RunRecord]:
    """Read the records of all trials of an experiment, oldest first.

    For each sweep id and trial key the latest run counts. Trials without a record yet are left out.

    Args:
        tracking_uri: ``sqlite:///...`` or the address of a server.
        experiment: the name of a sweep; None means all experiments.
        series: keep what was measured at every step, which is most of a record
            (:meth:`~grass_ray.results.record.RunRecord.without_steps`).

    Raises:
        ConfigError: the store or the experiment does not exist.
    """
    return list(iter_records(tracking_uri, experiment, series=series))


def iter_records(tracking_uri: str, experiment: str | None = None, *, series: bool = True) -> Iterator[RunRecord]:
    """As :func:`load_records`, one record at a time, so that only one is in memory."""
    uri = _existing(tracking_uri)
    questions: dict[str, str] = {}
    client = functools.cache(functools.partial(connect, uri))
    with tempfile.TemporaryDirectory(prefix="grass_ray-records-") as folder:
        for found in _trials(uri, experiment):
            with store_errors(uri):
                path = _record_file(client, found, Path(folder))
            record = None if path is None else _read(path, found)
            if record is not None:
                yield record.with_known(questions) if series else record.without_steps(questions)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """A trial as MLflow lists it, without its record.

    Attributes:
        name: of the run.
        run_id: as in its record, of sweep id and trial key.
        status: of its record; ``running`` while it has none.
        accuracy: average over its tasks, from 0 to 1; None if none was measured.
        loss: of the right answers in nats; None if none was measured.
        started: when it began.
        record_sha256: of the record that it ended with, if all of that is in MLflow.
    """

    name: str
    run_id: str
    status: str
    accuracy: float | None
    loss: float | None
    started: datetime
    record_sha256: str | None


def tracked_runs(tracking_uri: str) -> list[TrackedRun]:
    """List the trials of all experiments, oldest first; of each sweep id and trial key the latest run.

    Raises:
        ConfigError: the store does not exist.
    """
    uri = _existing(tracking_uri)
    if uri.startswith(SQLITE):
        with suppress(sqlite3.Error), closing(open_store(sqlite_path(uri))) as database:
            return _latest(_listed_in(database))
    client = connect(uri)
    with store_errors(uri):
        return _latest(_listed(key, run) for key, run in _every_child_run(client))


def _latest(runs: Iterable[TrackedRun]) -> list[TrackedRun]:
    latest: dict[str, TrackedRun] = {}
    for run in runs:
        # one of several is not all there is of its trial
        latest[run.run_id] = replace(run, record_sha256=None) if run.run_id in latest else run
    return list(latest.values())


def _listed_in(database: sqlite3.Connection) -> Iterator[TrackedRun]:
    wanted = (PARENT_TAG, "sweep_id", "trial_key", "status", COMPLETE_TAG)
    for run in read_runs(database, tags=wanted, metrics=("eval/average", "eval/loss")):
        if (key := _trial_of(run.tags)) is not None:
            yield _tracked(key, run.name, run.status, run.started_ms, run.tags, run.metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierRun:
    """A finished trial in MLflow. ``folder`` is where it wrote its files; None if the run does not say."""

    run_id: str
    sweep_id: str
    trial_key: str
    folder: str | None


def earlier_runs(tracking_uri: str, keys: Collection[str]) -> list[EarlierRun]:
    """List the finished trials of all experiments with one of these keys, oldest first.

    Raises:
        ConfigError: the store does not exist.
    """
    uri = _existing(tracking_uri)
    client = connect(uri)
    with store_errors(uri):
        return [
            EarlierRun(
                run_id=str(run.info.run_id), sweep_id=sweep_id, trial_key=key, folder=run.data.tags.get("folder")
            )
            for (sweep_id, key), run in _every_child_run(client)
            if key in keys and run.data.tags.get("status") == "finished"
        ]


def download_files(tracking_uri: str, run_id: str, folder: Path) -> None:
    """Download all artifacts of a run into ``folder``."""
    uri = _existing(tracking_uri)
    client = connect(uri)
    with store_errors(uri):
        client.download_artifacts(run_id, "", str(folder))


def download(tracking_uri: str, run_id: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Download the artifacts ``names`` of a run into ``folder``; those that do not exist are left out.

    Raises:
        ConfigError: the store or the run does not exist.
    """
    uri = _existing(tracking_uri)
    client = connect(uri)
    with store_errors(uri):
        _check_run(client, uri, run_id)
        there = {item.path for item in client.list_artifacts(run_id)}
        return {name: Path(client.download_artifacts(run_id, name, str(folder))) for name in names if name in there}


def run_folder(tracking_uri: str, run_id: str) -> str:
    """The folder that a run wrote its files to, from its tag ``folder``.

    Raises:
        ConfigError: the store or the run does not exist, or the run is of a version that did not set the tag.
    """
    uri = _existing(tracking_uri)
    client = connect(uri)
    with store_errors(uri):
        tags = _check_run(client, uri, run_id).data.tags
    if "folder" not in tags:
        raise ConfigError(f"the MLflow run {run_id} does not say where its files are; give the run's folder itself")
    return str(tags["folder"])


def upload(tracking_uri: str, run_id: str, folder: Path, place: str) -> None:
    """Log a folder's files as artifacts of a run, under ``place``.

    Raises:
        ConfigError: the store or the run does not exist, or takes no files.
    """
    uri = _existing(tracking_uri)
    client = connect(uri)
    with store_errors(uri):
        _check_run(client, uri, run_id)
        client.log_artifacts(run_id, str(folder), place)


def is_run_id(text: str) -> bool:
    """Whether the text has the form of MLflow's run ids: 32 hexadecimal digits."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


# ------------------------------------------------------------------------------------------------------ inside a store


@dataclass(frozen=True, slots=True)
class _Found:
    """What is kept of a run; MLflow's own object holds all its metrics and parameters."""

    run_id: str
    name: str
    artifacts: str


def _trials(uri: str, experiment: str | None) -> list[_Found]:
    """The trials of an experiment, or of all, oldest first; of each sweep id and trial key the latest run."""
    if uri.startswith(SQLITE):
        with suppress(sqlite3.Error), closing(open_store(sqlite_path(uri))) as database:
            _check_experiment(uri, experiment, read_experiments(database))
            runs = read_runs(database, tags=(PARENT_TAG, "sweep_id", "trial_key"), metrics=())
            chosen = [run for run in runs if experiment in (None, run.experiment)]
            found = {_trial_of(run.tags): _Found(run.run_id, run.name, run.artifacts) for run in chosen}
            return [trial for key, trial in found.items() if key is not None]
    client = connect(uri)
    with store_errors(uri):
        ids = {item.name: item.experiment_id for item in client.search_experiments()}
        _check_experiment(uri, experiment, ids)
        own = _child_runs(client, list(ids.values()) if experiment is None else [ids[experiment]])
        facts = {key: (run.info.run_id, run.info.run_name, run.info.artifact_uri) for key, run in own}
        return [_Found(*map(str, trial)) for trial in facts.values()]


def _check_experiment(uri: str, experiment: str | None, known: Collection[str]) -> None:
    if experiment is not None and experiment not in known:
        raise ConfigError(f"unknown experiment {experiment!r} in {redact(uri)}; available: {', '.join(known)}")


def _trial_of(tags: Mapping[str, str]) -> tuple[str, str] | None:
    """Sweep id and trial key; None if the run is not a trial's."""
    is_trial = {PARENT_TAG, "sweep_id", "trial_key"} <= tags.keys()
    return (tags["sweep_id"], tags["trial_key"]) if is_trial else None


def _existing(tracking_uri: str) -> str:
    """The absolute address. Raises :class:`ConfigError` if a SQLite file does not exist, which MLflow would create."""
    uri = absolute_uri(tracking_uri)
    if uri.startswith(SQLITE) and not sqlite_path(uri).exists():
        raise ConfigError(f"there is no MLflow store at {uri}; run a sweep first, or name another with --tracking-uri")
    return uri


def _check_run(client: MlflowClient, uri: str, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise ConfigError(f"there is no run {run_id} in {redact(uri)}; its page there shows a run's id") from None
        raise


def _listed(key: tuple[str, str], run: Any) -> TrackedRun:
    return _tracked(key, run.info.run_name, run.info.status, run.info.start_time, run.data.tags, run.data.metrics)


def _tracked(
    key: tuple[str, str],
    name: str,
    status: str,
    started_ms: int,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> TrackedRun:
    return TrackedRun(
        name=name,
        run_id="-".join(key),
        status=tags.get("status", status.lower()),
        accuracy=metrics.get("eval/average"),
        loss=metrics.get("eval/loss"),
        started=datetime.fromtimestamp(started_ms / 1000, UTC),
        record_sha256=tags.get(COMPLETE_TAG) if status in RUN_STATUS.values() else None,
    )


def _every_child_run(client: MlflowClient) -> Iterator[tuple[tuple[str, str], Any]]:
    """Those of all experiments."""
    return _child_runs(client, [item.experiment_id for item in client.search_experiments()])


def _child_runs(client: MlflowClient, experiments: list[str]) -> Iterator[tuple[tuple[str, str], Any]]:
    """The trials' runs, oldest first, with sweep id and trial key."""
    token = None
    while True:
        page = client.search_runs(
            experiments, max_results=500, order_by=["attributes.start_time ASC"], page_token=token
        )
        for run in page:
            if (key := _trial_of(run.data.tags)) is not None:
                yield key, run
        token = page.token
        if not token:
            return


def _record_file(client: Callable[[], MlflowClient], found: _Found, folder: Path) -> Path | None:
    """The record's file: the artifact itself if it is on this machine, else a download in ``folder``."""
    if found.artifacts.startswith("file:"):
        path = Path(url2pathname(urlsplit(found.artifacts).path)) / RECORD_FILE
        return path if path.is_file() else None
    if all(item.path != RECORD_FILE for item in client().list_artifacts(found.run_id)):
        return None
    return Path(client().download_artifacts(found.run_id, RECORD_FILE, str(folder)))  # over the one before


def _read(path: Path, found: _Found) -> RunRecord | None:
    try:
        return RunRecord.load(path)
    except ConfigError as error:
        log.warning("the record of run %s (%s) is left out: %s", found.name, found.run_id, error)
        return None
