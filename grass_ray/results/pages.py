"""MLflow's pages: which one shows a sweep, and a server for the page of a local store.

::

    page = find_page(uri, "quickstart")                       # "#/experiments/1/runs/..." of its newest sweep
    with serve(uri, port=5000) as address: ...                # of a store that is a file
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

from grass_ray.config import ConfigError
from grass_ray.errors import redact
from grass_ray.results.connection import SQLITE, absolute_uri, connect, quoted, sqlite_path, store_errors
from grass_ray.results.tracker import SWEEP_KEY, Tracker

START_WITHIN_S = 180.0  # mlflow is slow to import on a busy machine


def is_server(uri: str) -> bool:
    """Whether a store is a server, which has pages of its own."""
    return uri.startswith(("http://", "https://"))


def page_of(experiment_id: str, run_id: str | None) -> str:
    """The part of an address that shows a run, or an experiment's runs."""
    place = f"#/experiments/{experiment_id}"
    return place if run_id is None else f"{place}/runs/{run_id}"


def run_page(tracker: Tracker, run_id: str) -> str:
    """The part of an address of MLflow's page that shows a run, or its experiment if the store refused the run."""
    return page_of(tracker._experiment_id, tracker._known(run_id))


def find_page(uri: str, experiment: str | None) -> str:
    """The page of the newest sweep, else of the newest run.

    Args:
        uri: the store.
        experiment: name of a sweep; None takes the newest of all.

    Raises:
        ConfigError: the store does not answer or is not there, or has no such experiment.
    """
    if uri.startswith(SQLITE) and not sqlite_path(absolute_uri(uri)).exists():
        raise ConfigError(f"there is no MLflow store {redact(uri)} yet; run something first, or give --tracking-uri")
    client = connect(absolute_uri(uri))
    with store_errors(uri):
        if experiment is not None:
            found = client.get_experiment_by_name(experiment)
            if found is None:
                known = ", ".join(sorted(own.name for own in client.search_experiments())) or "none"
                raise ConfigError(f"unknown experiment {experiment!r}; available: {known}")
            experiments = [str(found.experiment_id)]
        else:
            experiments = [str(own.experiment_id) for own in client.search_experiments()]
        order = ["attributes.start_time DESC"]
        for wanted in (f"tags.trial_key = {quoted(SWEEP_KEY)}", ""):
            runs = client.search_runs(experiments, wanted, order_by=order, max_results=1) if experiments else []
            if runs:
                return page_of(str(runs[0].info.experiment_id), str(runs[0].info.run_id))
    return page_of(experiments[0], None) if experiment is not None else "#/experiments"


@contextmanager
def serve(uri: str, *, port: int, within_s: float = START_WITHIN_S) -> Iterator[str]:
    """Serve the page of a store in the block, on this machine alone; yields its address.

    Raises:
        ConfigError: the port is taken, or the server does not start.
    """
    if _answers(port):
        raise ConfigError(f"port {port} is taken; give another with --port")
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", absolute_uri(uri), "--port", str(port)]
    command += ["--workers", "1"]  # one reader; the default of four takes four times as long to start
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            _wait(server, address, within_s, said)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(server: subprocess.Popen[bytes], address: str, within_s: float, said: object) -> None:
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if server.poll() is not None:
            break
        try:
            with urlopen(f"{address}health", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.3)
    raise ConfigError(f"MLflow's server did not start within {within_s:.0f} s: {_last_line(said)}")


def _last_line(said: object) -> str:
    said.seek(0)  # type: ignore[attr-defined]
    lines = said.read().decode(errors="replace").strip().splitlines()  # type: ignore[attr-defined]
    return lines[-1] if lines else "it said nothing"
