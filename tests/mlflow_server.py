"""A real MLflow server for tests, which can be killed and started again on the same store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 120


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(folder: Path, port: int, *words: str, **environment: str) -> Iterator[None]:
    """A real tracking server; on leaving, its process group is killed without a chance to finish.

    Args:
        folder: of its files.
        port: where it listens.
        words: more of its command line.
        environment: more of its environment.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(
        [*command, *words],
        cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(port, process, folder)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def wait_for(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    for _ in range(START_S * 5):
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError((folder / "server.log").read_text())
