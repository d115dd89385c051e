"""The MLflow store behind tracking: how to reach one, what it may be told, and the records that are in it.

::

    records = load_records(default_tracking_uri(storage_path), experiment="quickstart")
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname

from grass_ray.config import ConfigError
from grass_ray.process import environment
from grass_ray.results.provenance import redact
from grass_ray.results.record import RunRecord
from grass_ray.training.report import TOKENS

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
SQLITE = "sqlite:///"
RECORD_FILE = "record.json"
_DATABASE_SERVERS = ("postgresql", "mysql", "mssql")
_STILL_GROWING_S = 5.0  # a half-made database that somebody changed so recently may still be finished


def default_tracking_uri(storage_path: Path) -> str:
    """The embedded store of a storage folder."""
    from sqlalchemy import URL

    database = Path(storage_path).expanduser().absolute() / "mlflow.db"
    return URL.create("sqlite", database=str(database)).render_as_string()


def sqlite_path(uri: str) -> Path:
    """The file of a ``sqlite:///...`` store, whose address has ``%3F`` and ``%25`` for a path's ``?`` and ``%``."""
    from sqlalchemy import make_url

    return Path(make_url(uri).database or "").expanduser()


def metric_name(name: str) -> str:
    """The nearest name MLflow accepts: letters, digits, ``_ - . : /`` and space, and clean as a path."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name).split("/")
    return ("/".join(part for part in parts if part not in ("", ".", "..")) or "_")[:250]


def absolute_uri(uri: str) -> str:
    """The address with a SQLite path made absolute."""
    if not uri.startswith(SQLITE):
        return uri
    from sqlalchemy import make_url

    database = str(sqlite_path(uri).absolute())  # workers run in other directories
    return make_url(uri).set(database=database).render_as_string(hide_password=False)


def quoted(text: str) -> str:
    """The text as a string of MLflow's search language."""
    if '"' in text and "'" in text:
        raise ConfigError(f"sweep id or trial key {text!r} holds both kinds of quotes; use at most one")
    return f'"{text}"' if "'" in text else f"'{text}'"


def connect(uri: str) -> MlflowClient:
    """A client whose store answered once. Raises :class:`ConfigError` within seconds when it does not."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # pages about migrations of a fresh store
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # and about errors that it raises, too
    with store_errors(uri):
        if uri.startswith(SQLITE):
            _make_database(sqlite_path(uri))
        else:
            _knock(uri)
        return _first_answer(uri)


def _first_answer(uri: str) -> MlflowClient:
    """A client that has been answered once; in a database server another first use may be making the tables."""
    from mlflow import MlflowClient

    pauses = iter((1, 2, 4) if uri.startswith(_DATABASE_SERVERS) else ())
    while True:
        try:
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
            return client
        except failures():
            pause = next(pauses, None)
            if pause is None:
                raise
            time.sleep(pause)


def _make_database(path: Path) -> None:
    """Make MLflow's database where there is none yet: beside its place, and linked there when it is whole.

    MLflow itself makes the tables in place, where two first uses break each other, and a kill leaves half of them.
    A half-made one, which holds nothing, is put aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while _is_unfinished(path):
        with suppress(FileNotFoundError):  # somebody else has just put it aside
            if time.time() - path.stat().st_mtime > _STILL_GROWING_S:
                path.rename(path.with_name(path.name + ".unfinished"))
            else:
                time.sleep(0.2)
    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix="grass_ray-store-") as folder:
        made = Path(folder) / "mlflow.db"
        _first_answer(f"{SQLITE}{made}")
        whole = path.with_name(f"{path.name}.part-{uuid.uuid4().hex[:8]}")
        try:
            shutil.copyfile(made, whole)
            try:
                os.link(whole, path)
            except FileExistsError:
                pass  # another first use came before, perhaps with runs in it already
            except OSError:
                os.replace(whole, path)  # a file system without hard links
        finally:
            whole.unlink(missing_ok=True)


def _is_unfinished(path: Path) -> bool:
    """Whether a SQLite file was abandoned while MLflow made its tables: it holds no row of anything."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return not any(  # MLflow's last act is a row in experiments
                database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone()
                for name in sorted(names - {"alembic_version", "workspaces"}, key=lambda name: name != "experiments")
            )
    except sqlite3.Error:  # no database, or one that is busy: MLflow says which
        return False


def _knock(uri: str) -> None:
    """Fail soon where nobody listens, so that a server that is merely slow at its first request may be waited for."""
    address = urlsplit(uri)
    behind_proxy = address.scheme in getproxies() and not proxy_bypass(address.hostname or "")
    if address.scheme in ("http", "https") and address.hostname and not behind_proxy:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=5).close()


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn a store's failure into one readable message."""
    try:
        with impatient(timeout_s=30):
            yield
    except failures() as error:
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0][:300]
        if any(words in reason for words in ("disk is full", os.strerror(errno.ENOSPC))):  # no mistake of the user's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), redact(uri)) from None
        if uri.startswith(("http://", "https://")):
            advice = "is it running (`mlflow server --backend-store-uri sqlite:///mlflow.db`) and reachable from here?"
            raise ConfigError(f"the MLflow server {redact(uri)} does not answer; {advice} ({reason})") from None
        raise ConfigError(
            f"cannot use the MLflow store {redact(uri)}; give sqlite:///<path>.db or a server's address ({reason})"
        ) from None


def failures() -> tuple[type[Exception], ...]:
    """What a store's failure may be; MLflow does not wrap every error of its database."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, OSError)


@contextmanager
def impatient(timeout_s: int) -> Iterator[None]:
    """MLflow waits for minutes and prints where each run can be seen; its only switches are in the environment."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    with environment(wanted):
        yield


def load_records(tracking_uri: str, experiment: str | None = None, *, series: bool = True) -> list[RunRecord]:
    """Read the records of all trials of an experiment (None: of all experiments), oldest first.

    The latest run counts for each sweep id and trial key; trials without a record yet are left out.

    Args:
        tracking_uri: ``sqlite:///...`` or the address of a server.
        experiment: the name of a sweep.
        series: keep what was measured at every step, which is most of a record. Without, the tokens of all steps stay
            as one point, so that leaderboards come out the same.

    Raises:
        ConfigError: the store or the experiment does not exist.
    """
    return list(iter_records(tracking_uri, experiment, series=series))


def iter_records(tracking_uri: str, experiment: str | None = None, *, series: bool = True) -> Iterator[RunRecord]:
    """The same one after another, so that only the one in hand is in memory."""
    uri = _existing(tracking_uri)
    client = connect(uri)
    with store_errors(uri):
        experiments = {item.name: item.experiment_id for item in client.search_experiments()}
        if experiment is not None and experiment not in experiments:
            raise ConfigError(
                f"unknown experiment {experiment!r} in {redact(uri)}; available: {', '.join(experiments)}"
            )
        chosen = list(experiments.values()) if experiment is None else [experiments[experiment]]
        latest: dict[tuple[str, str], _Found] = {}
        for key, found in _child_runs(client, chosen):
            latest[key] = found
    questions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="grass_ray-records-") as folder:
        for found in latest.values():
            with store_errors(uri):
                path = _record_file(client, found, Path(folder))
            record = None if path is None else _read(path, found)
            if record is not None:
                yield _slim(record, questions, series=series)


def download(tracking_uri: str, run_id: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Copy those of a run's artifacts that are there into ``folder``.

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
    """Where a run wrote its files, as its tag ``folder`` says.

    Raises:
        ConfigError: the store or the run does not exist, or the run is of a version that did not tell.
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
    """What is kept of a run that was found; MLflow's own object holds all its metrics and parameters."""

    run_id: str
    name: str
    artifacts: str


def _existing(tracking_uri: str) -> str:
    """The absolute address. Raises :class:`ConfigError` where a SQLite file would be made by looking at it."""
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


def _child_runs(client: MlflowClient, experiments: list[str]) -> Iterator[tuple[tuple[str, str], _Found]]:
    token = None
    while True:
        page = client.search_runs(
            experiments, max_results=500, order_by=["attributes.start_time ASC"], page_token=token
        )
        for run in page:
            tags = run.data.tags
            if {PARENT_TAG, "sweep_id", "trial_key"} <= tags.keys():
                found = _Found(str(run.info.run_id), str(run.info.run_name), str(run.info.artifact_uri))
                yield (tags["sweep_id"], tags["trial_key"]), found
        token = page.token
        if not token:
            return


def _record_file(client: MlflowClient, found: _Found, folder: Path) -> Path | None:
    """The record as a file: in its place where that is on this machine, else downloaded into ``folder``."""
    if found.artifacts.startswith("file:"):
        path = Path(url2pathname(urlsplit(found.artifacts).path)) / RECORD_FILE
        return path if path.is_file() else None
    if all(item.path != RECORD_FILE for item in client.list_artifacts(found.run_id)):
        return None
    return Path(client.download_artifacts(found.run_id, RECORD_FILE, str(folder)))  # over the one before


def _read(path: Path, found: _Found) -> RunRecord | None:
    try:
        return RunRecord.load(path)
    except ConfigError as error:
        log.warning("the record of run %s (%s) is left out: %s", found.name, found.run_id, error)
        return None


def _slim(record: RunRecord, questions: dict[str, str], *, series: bool) -> RunRecord:
    """The record with each question's id in memory once however many runs answered it, and without steps if asked."""
    for score in record.tasks.values():
        score.example_ids = [questions.setdefault(example, example) for example in score.example_ids]
    if not series:
        tokens = record.step_tokens()
        record.series = {TOKENS: [(max(tokens), sum(tokens.values()))]} if tokens else {}
        if record.layers is not None:
            record.layers.intervals, record.layers.refreshes, record.layers.ages = [], [], []
    return record
