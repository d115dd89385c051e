"""MLflow stores whose tables another version of MLflow made: they work, or one message says what to do."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from grass_ray.config import ConfigError
from grass_ray.results.connection import default_tracking_uri, sqlite_path
from grass_ray.results.tracker import Tracker

# the migrations of MLflow 1, from its own files
MAKE = """
import sys
import sqlalchemy
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base
engine, config = sqlalchemy.create_engine(sys.argv[1]), _get_alembic_config(sys.argv[1])
Base.metadata.create_all(engine)
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, "7ac759974ad8")
    connection.execute(sqlalchemy.text(
        "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage)"
        " VALUES (7, 'mine', 'file:///nowhere', 'active')"))
"""


def track(uri: str) -> None:
    tracker = Tracker(uri, "mine")
    tracker.open()
    tracker.start_trial("s1", "t1", "run", {}, {})
    assert tracker.close() == tracker.lacking == 0


@pytest.mark.slow
def test_a_store_of_mlflow_1_is_migrated(tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path)
    subprocess.run([sys.executable, "-c", MAKE, uri], check=True, capture_output=True)
    track(uri)  # tables are missing, so that MLflow migrates by itself
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs WHERE experiment_id = 7").fetchone() == (2,)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("cbc13b556ace", "was made by an older MLflow; copy it, then run `mlflow db upgrade sqlite:"),
        ("ffffffffffff", "was made by a newer MLflow than 3"),
    ],
)
def test_a_store_with_the_tables_of_another_version_is_one_message(
    store: str, tmp_path: Path, schema: str, message: str
) -> None:
    shutil.copy(sqlite_path(store), tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute(f"UPDATE alembic_version SET version_num = '{schema}'")
    with pytest.raises(ConfigError, match=message):
        track(default_tracking_uri(tmp_path))
