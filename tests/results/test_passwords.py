"""Passwords of a server that takes them are in nothing that is said, written, uploaded or listed by ``ps``.

Real servers: one that ignores passwords, and one with MLflow's basic-auth app, which needs Flask-WTF::

    python -m pytest --slow tests/results/test_passwords.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow_server import free_port, server
from small import REPOSITORY

pytestmark = pytest.mark.slow

PASSWORD, TOKEN = "planted-pa55word-of-the-store", "planted-t0ken-of-the-environment"
TRAIN = [sys.executable, "-c", "from grass_ray.cli import main; main()", "train", "grass", "--model", "tiny"]
TRAIN += ["--task", "generated", "--steps", "2", "--set", "data.source.train_rows=8", "data.source.test_rows=4"]
TRAIN += ["training.batch_size=4", "method.sampler.probing_steps=1", "--output"]
NO_PASSWORD = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
GIVEN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD, "HF_TOKEN": TOKEN}
BASIC_AUTH = ("--app-name", "basic-auth")


def of_the_server(password: str) -> dict[str, str]:
    return {"MLFLOW_AUTH_ADMIN_PASSWORD": password, "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret-of-the-server"}


def need_basic_auth() -> None:
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("MLflow's basic-auth needs Flask-WTF: pip install 'mlflow[auth]'")


@pytest.fixture(params=["any server", "basic-auth"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Of a server that ignores passwords, and of one with MLflow's app that asks for them."""
    found, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    if request.param == "any server":
        with server(folder, found):
            yield found
    else:
        need_basic_auth()
        with server(folder, found, *BASIC_AUTH, **of_the_server(PASSWORD)):
            yield found


class Titles:
    """The command lines of all processes of the machine while the block runs, as every user may list them."""

    def __enter__(self) -> Titles:
        self.seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.3):
            for process in psutil.process_iter(["cmdline"]):
                self.seen.add(" ".join(process.info["cmdline"] or ()))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def run(
    folder: Path, command: list[str], environment: dict[str, str], code: int = 0
) -> tuple[str, list[Path], set[str]]:
    """What a command says and writes, and the titles of processes meanwhile."""
    folder.mkdir()
    with Titles() as titles:
        done = subprocess.run(
            command, cwd=folder, env=NO_PASSWORD | environment, capture_output=True, text=True, timeout=600
        )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr, [path for path in folder.rglob("*") if path.is_file()], titles.seen


def holding(secret: str, files: list[Path]) -> list[Path]:
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_a_server_that_answers(port: int, tmp_path: Path) -> None:
    """By the address, and by the environment, whose secrets no command line shows."""
    address = f"http://127.0.0.1:{port}"
    inside = f"http://admin:{PASSWORD}@127.0.0.1:{port}"
    by_address = run(tmp_path / "a", [*TRAIN, "out", "--tracking-uri", inside], {})
    by_environment = run(tmp_path / "b", [*TRAIN, "out", "--tracking-uri", address], GIVEN)
    for said, files, _ in (by_address, by_environment):
        assert any(path.name == "record.json" for path in files)
        assert PASSWORD not in said
        assert TOKEN not in said
        assert holding(PASSWORD, files) == holding(TOKEN, files) == []
    titles = by_environment[2]
    assert any("grass_ray.cli" in title for title in titles)
    assert [title for title in titles if PASSWORD in title or TOKEN in title] == []
    client = MlflowClient(inside)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert PASSWORD not in repr([run.to_dictionary() for run in runs])
    uploaded = tmp_path / "uploaded"
    for found in runs:
        (place := uploaded / found.info.run_id).mkdir(parents=True)
        client.download_artifacts(found.info.run_id, "", str(place))
    files = [path for path in uploaded.rglob("*") if path.is_file()]
    assert any(path.name == "record.json" for path in files)
    assert holding(PASSWORD, files) == holding(TOKEN, files) == []
    assert holding(TOKEN, [path for path in (tmp_path / "server").rglob("*") if path.is_file()]) == []


def test_a_wrong_password_is_one_message(tmp_path: Path) -> None:
    need_basic_auth()
    number, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    with server(folder, number, *BASIC_AUTH, **of_the_server("another-password")):
        address = f"http://admin:{PASSWORD}@127.0.0.1:{number}"
        said, files, _ = run(tmp_path / "a", [*TRAIN, "out", "--tracking-uri", address], {}, code=2)
    assert PASSWORD not in said
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert holding(PASSWORD, files) == []


def test_a_sweeps_processes_and_the_logs_of_ray(port: int, tmp_path: Path) -> None:
    """Driver and workers, whose titles Ray sets, and the files that Ray writes of a session."""
    logs = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # short: Ray's sockets lie in it
    sweep = [sys.executable, str(REPOSITORY / "tests" / "mini_sweep.py"), "--methods", "full", "--no-base"]
    sweep += ["--cpus-per-trial", "1", "--storage-path", "results", "--tracking-uri", f"http://127.0.0.1:{port}"]
    ray = {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(logs), "TMPDIR": str(logs)}
    said, files, titles = run(tmp_path / "a", sweep, GIVEN | ray)
    written = [path for path in logs.rglob("*") if path.is_file()]
    assert any(title.startswith("ray::") for title in titles)
    assert any(path.suffix == ".log" for path in written), "Ray's files are elsewhere"
    for secret in (PASSWORD, TOKEN):
        assert secret not in said
        assert holding(secret, [*files, *written]) == []
        assert [title for title in titles if secret in title] == []
