"""The first use of a store: by several processes at once, after one that was killed, and of what is no database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import create_engine

from grass_ray.config import ConfigError
from grass_ray.results.connection import default_tracking_uri
from grass_ray.results.tracker import Tracker

pytestmark = pytest.mark.long

# imports first, so that both come to the store at the same time
FIRST_USE = """
import sys, time
from pathlib import Path
import mlflow
from grass_ray.results.tracker import Tracker
Path(sys.argv[2]).touch()
while len(list(Path(sys.argv[2]).parent.glob("ready-*"))) < 2: time.sleep(0.001)
tracker = Tracker(sys.argv[1], "train")
tracker.open()
tracker.start_trial("train", sys.argv[2], "run", {}, {})
assert tracker.close() == 0
"""


def half_made(path: Path) -> None:
    """As MLflow leaves it when it is killed before its migrations."""
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    engine.dispose()


def runs_in(uri: str) -> int:
    client = MlflowClient(uri)
    return len(client.search_runs([client.get_experiment_by_name("train").experiment_id], "run_name = 'run'"))


def test_two_first_uses_at_once_both_keep_their_runs(tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path)
    processes = [
        subprocess.Popen([sys.executable, "-c", FIRST_USE, uri, str(tmp_path / f"ready-{number}")])
        for number in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert runs_in(uri) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "ready-0", "ready-1"}


@pytest.mark.parametrize("make", [half_made, Path.touch], ids=["half made", "empty"])
def test_what_a_killed_first_use_left_is_put_aside(tmp_path: Path, make: object) -> None:
    path = tmp_path / "mlflow.db"
    make(path)  # type: ignore[operator]
    os.utime(path, (0, 0))  # long ago
    tracker = Tracker(f"sqlite:///{path}", "train")
    tracker.open()
    tracker.start_trial("train", "key", "run", {}, {})
    assert runs_in(tracker.tracking_uri) == 1
    assert (tmp_path / "mlflow.db.unfinished").exists()


def test_what_is_no_database_of_mlflow_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 100)
    with pytest.raises(ConfigError, match=r"cannot use the MLflow store .*file is not a database"):
        Tracker(f"sqlite:///{path}", "train").open()
    assert path.read_text().startswith("not a database")
