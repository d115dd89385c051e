"""How to reach an MLflow store: its address, its first use, and its failures as messages that say what to do.

::

    client = connect(default_tracking_uri(storage_path))     # an mlflow.MlflowClient that answered once
    with store_errors(uri): client.search_experiments()
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
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from grass_ray.config import ConfigError
from grass_ray.errors import redact
from grass_ray.process import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
_DATABASE_SERVERS = ("postgresql", "mysql", "mssql")
_OTHER_SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+)")
_STILL_GROWING_S = 5.0  # a half-made database that somebody changed so recently may still be finished


def default_tracking_uri(storage_path: Path) -> str:
    """Address of the SQLite store in a storage folder."""
    from sqlalchemy import URL

    database = Path(storage_path).expanduser().absolute() / "mlflow.db"
    return URL.create("sqlite", database=str(database)).render_as_string()


def sqlite_path(uri: str) -> Path:
    """File of a ``sqlite:///...`` store. In the address ``?`` and ``%`` of a path are written ``%3F`` and ``%25``."""
    from sqlalchemy import make_url

    return Path(make_url(uri).database or "").expanduser()


def metric_name(name: str) -> str:
    """The nearest name that MLflow accepts: letters, digits, ``_ - . : /`` and space, no empty path components."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name).split("/")
    return ("/".join(part for part in parts if part not in ("", ".", "..")) or "_")[:250]


def absolute_uri(uri: str) -> str:
    """The address, with a SQLite path made absolute."""
    if not uri.startswith(SQLITE):
        return uri
    from sqlalchemy import make_url

    database = str(sqlite_path(uri).absolute())  # workers run in other directories
    return make_url(uri).set(database=database).render_as_string(hide_password=False)


def quoted(text: str) -> str:
    """The text as a string literal for MLflow's search."""
    if '"' in text and "'" in text:
        raise ConfigError(f"sweep id or trial key {text!r} holds both kinds of quotes; use at most one")
    return f'"{text}"' if "'" in text else f"'{text}'"


def connect(uri: str) -> MlflowClient:
    """A client whose store has answered once. Raises :class:`ConfigError` within seconds if it does not answer."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # pages about migrations of a fresh store
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # and about errors that it raises, too
    with store_errors(uri):
        if uri.startswith(SQLITE):
            _make_database(sqlite_path(uri))
        else:
            _knock(uri)
        return _first_answer(uri)


def _first_answer(uri: str) -> MlflowClient:
    """Ask until the store answers: in a database server another process may just be creating the tables."""
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
    """Create MLflow's database if there is none: elsewhere, and linked into place when it is complete.

    MLflow creates the tables in place, where two processes break each other and a kill leaves half of them. An
    incomplete database, which holds no data, is renamed.
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
    """Whether a SQLite file was abandoned while MLflow created its tables: no table has a row."""
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
    """Fail at once if nothing listens there, so that a slow server can be waited for."""
    address = urlsplit(uri)
    behind_proxy = address.scheme in getproxies() and not proxy_bypass(address.hostname or "")
    if address.scheme in ("http", "https") and address.hostname and not behind_proxy:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=5).close()


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn a store's failure into one readable :class:`ConfigError`."""
    try:
        with impatient(timeout_s=30):
            yield
    except failures() as error:
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0][:300]
        if any(words in reason for words in ("disk is full", os.strerror(errno.ENOSPC))):  # no mistake of the user's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), redact(uri)) from None
        if (found := _OTHER_SCHEMA.search(str(error))) is not None:
            raise ConfigError(_other_version(redact(uri), found[1])) from None
        if uri.startswith(("http://", "https://")):
            if re.search(r"error code 40[13]\b", str(error)):
                raise ConfigError(
                    f"the MLflow server {redact(uri)} refuses the user or the password; set MLFLOW_TRACKING_USERNAME "
                    f"and MLFLOW_TRACKING_PASSWORD ({reason})"
                ) from None
            advice = "is it running (`mlflow server --backend-store-uri sqlite:///mlflow.db`) and reachable from here?"
            raise ConfigError(f"the MLflow server {redact(uri)} does not answer; {advice} ({reason})") from None
        raise ConfigError(
            f"cannot use the MLflow store {redact(uri)}; give sqlite:///<path>.db or a server's address ({reason})"
        ) from None


def _other_version(uri: str, schema: str) -> str:
    """What to do about a database whose tables another version of MLflow made."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    try:
        migrations.get_revision(schema)
    except CommandError:
        return f"the MLflow store {uri} was made by a newer MLflow than {mlflow.__version__}; install that one"
    return f"the MLflow store {uri} was made by an older MLflow; copy it, then run `mlflow db upgrade {uri}`"


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a failing store; MLflow does not wrap every error of its database."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, OSError)


@contextmanager
def impatient(timeout_s: int) -> Iterator[None]:
    """Limit how long MLflow waits, and keep it from printing; its only switches are environment variables."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    with environment(wanted):
        yield
