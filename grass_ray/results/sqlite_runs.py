"""List the runs of a SQLite store without MLflow, whose own search loads every parameter of every run.

::

    with closing(open_store(sqlite_path(uri))) as database:
        for row in read_runs(database, tags=("sweep_id",), metrics=("eval/average",)):
            print(row.name, row.tags.get("sweep_id"), row.metrics)

Over thousands of runs that is most of the time, and importing MLflow is the rest. The tables are those of MLflow's
database schema; a store that has others raises ``sqlite3.Error``, and is then asked through MLflow.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

_RUNS = """
    SELECT run_uuid, runs.name, status, start_time, runs.artifact_uri, experiments.name
    FROM runs JOIN experiments USING (experiment_id)
    WHERE runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active' ORDER BY start_time, run_uuid
"""


@dataclass(kw_only=True, slots=True)
class SqliteRun:
    """A run as the database has it; ``started_ms`` is in milliseconds since 1970, ``artifacts`` where its files are."""

    run_id: str
    name: str
    status: str
    started_ms: int
    artifacts: str
    experiment: str
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def open_store(path: Path) -> sqlite3.Connection:
    """Open a database to read it; nothing in it changes."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)


def read_experiments(database: sqlite3.Connection) -> list[str]:
    """Read the names of the experiments that are not deleted, the newest first.

    Raises:
        sqlite3.Error: as :func:`read_runs`.
    """
    found = "SELECT name FROM experiments WHERE lifecycle_stage = 'active' ORDER BY creation_time DESC, experiment_id"
    return [name for (name,) in database.execute(found)]


def read_runs(database: sqlite3.Connection, *, tags: Sequence[str], metrics: Sequence[str]) -> list[SqliteRun]:
    """Read all runs that are not deleted, oldest first, with some of their tags and metrics.

    Raises:
        sqlite3.Error: it is not a database of MLflow, or of another schema.
    """
    runs = {
        run_id: SqliteRun(
            run_id=run_id, name=name, status=status, started_ms=started, artifacts=artifacts, experiment=experiment
        )
        for run_id, name, status, started, artifacts, experiment in database.execute(_RUNS)
    }
    for run_id, key, value in database.execute(_of("tags", "value", tags), tags):
        if run_id in runs:
            runs[run_id].tags[key] = value
    for run_id, key, value, is_nan in database.execute(_of("latest_metrics", "value, is_nan", metrics), metrics):
        if run_id in runs:
            runs[run_id].metrics[key] = math.nan if is_nan else value
    return list(runs.values())


def _of(table: str, columns: str, keys: Sequence[str]) -> str:
    return f"SELECT run_uuid, key, {columns} FROM {table} WHERE key IN ({', '.join('?' * len(keys))})"
