"""The MLflow store behind tracking: how to reach one, what it may be told, and the records that are in it.

::

    records = load_records(default_tracking_uri(storage_path), experiment="quickstart")
"""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from grass_ray.config import ConfigError
from grass_ray.results.provenance import redact
from grass_ray.results.record import RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
SQLITE = "sqlite:///"


def default_tracking_uri(storage_path: Path) -> str:
    """The embedded store of a storage folder."""
    return f"{SQLITE}{Path(storage_path).absolute()}/mlflow.db"


def metric_name(name: str) -> str:
    """The nearest name MLflow accepts: letters, digits, ``_ - . : /`` and space, and clean as a path."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name).split("/")
    return ("/".join(part for part in parts if part not in ("", ".", "..")) or "_")[:250]


def absolute_uri(uri: str) -> str:
    """The address with a SQLite path made absolute."""
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"  # workers run in other directories
    return uri


def quoted(text: str) -> str:
    """The text as a string of MLflow's search language."""
    if '"' in text and "'" in text:
        raise ConfigError(f"sweep id or trial key {text!r} holds both kinds of quotes; use at most one")
    return f'"{text}"' if "'" in text else f"'{text}'"


def connect(uri: str) -> MlflowClient:
    """A client whose store answered once. Raises :class:`ConfigError` within seconds when it does not."""
    from mlflow import MlflowClient

    for noisy in ("mlflow.store.db.utils", "alembic"):  # pages about migrations of a fresh store
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with store_errors(uri):
        if uri.startswith(SQLITE):
            Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        else:
            _knock(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


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
    from mlflow.exceptions import MlflowException

    try:
        with impatient(timeout_s=30):
            yield
    except (MlflowException, OSError) as error:
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0][:300]
        if uri.startswith(("http://", "https://")):
            advice = "is it running (`mlflow server --backend-store-uri sqlite:///mlflow.db`) and reachable from here?"
            raise ConfigError(f"the MLflow server {redact(uri)} does not answer; {advice} ({reason})") from None
        raise ConfigError(
            f"cannot use the MLflow store {redact(uri)}; give sqlite:///<path>.db or a server's address ({reason})"
        ) from None


@contextmanager
def impatient(timeout_s: int) -> Iterator[None]:
    """MLflow's own patience is minutes a call, which training must not wait for; its only switch is the environment."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def load_records(tracking_uri: str, experiment: str | None = None) -> list[RunRecord]:
    """Download the records of all trials of an experiment (None: of all experiments), oldest first.

    The latest run counts for each sweep id and trial key; trials without a record yet are left out. Raises
    :class:`ConfigError` when the store or the experiment does not exist.
    """
    uri = absolute_uri(tracking_uri)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        raise ConfigError(f"there is no MLflow store at {uri}; run a sweep first, or name another with --tracking-uri")
    client = connect(uri)
    with store_errors(uri):
        experiments = {item.name: item.experiment_id for item in client.search_experiments()}
        if experiment is not None and experiment not in experiments:
            raise ConfigError(
                f"unknown experiment {experiment!r} in {redact(uri)}; available: {', '.join(experiments)}"
            )
        chosen = list(experiments.values()) if experiment is None else [experiments[experiment]]
        latest: dict[tuple[str, str], Any] = {}
        for run in _child_runs(client, chosen):
            latest[run.data.tags["sweep_id"], run.data.tags["trial_key"]] = run
        with tempfile.TemporaryDirectory() as folder:
            records = [_download(client, run, Path(folder)) for run in latest.values()]
    return [record for record in records if record is not None]


def _child_runs(client: MlflowClient, experiments: list[str]) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs(
            experiments, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from (run for run in page if {PARENT_TAG, "sweep_id", "trial_key"} <= run.data.tags.keys())
        token = page.token
        if not token:
            return


def _download(client: MlflowClient, run: Any, folder: Path) -> RunRecord | None:
    run_id = run.info.run_id
    if all(item.path != "record.json" for item in client.list_artifacts(run_id)):
        return None
    target = folder / run_id
    target.mkdir()
    try:
        return RunRecord.load(client.download_artifacts(run_id, "record.json", str(target)))
    except ConfigError as error:
        log.warning("the record of run %s (%s) is left out: %s", run.info.run_name, run_id, error)
        return None
