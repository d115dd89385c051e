"""The network between two machines is away for a minute: a trial goes on there, or elsewhere, and no number changes.

The machines have addresses of their own in namespaces of the kernel; see :mod:`networks`. Both see the storage all the
time, as where it has a network of its own::

    python -m pytest --slow tests/chaos/test_network_cut.py -s

GRASS_RAY_CUT_S (60) is how long.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from disturbed import (
    PATIENCE_S,
    assert_as_undisturbed,
    assert_tracked_once,
    driver,
    records_of,
    trial_processes,
    wait_until,
)
from networks import Network, can_make_networks

CUT_S = float(os.environ.get("GRASS_RAY_CUT_S", "60"))
PORT = 6379
RAY = str(Path(sys.executable).with_name("ray"))
# Ray's head asks each machine every 3 s, waits 10 s, and gives it up after the fifth time: more than a minute
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def with_children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        own = psutil.Process(process.pid)
        return [own, *own.children(recursive=True)]
    return []


class TwoMachines:
    """A head and another machine, each with one CPU."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.enter = network.enter(0)
        self.environment = {
            **os.environ, "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)
        self._started: list[subprocess.Popen[bytes]] = []
        self._log = (folder / "ray.log").open("wb")
        head = ("--head", f"--port={PORT}", "--include-dashboard=false")
        self.head = self._start(0, *head)
        self.far = self.start_far()
        self.environment["RAY_ADDRESS"] = f"{network.address(0)}:{PORT}"

    def start_far(self) -> subprocess.Popen[bytes]:
        """Start Ray on the machine that is not the head."""
        return self._start(1, f"--address={self.network.address(0)}:{PORT}")

    def _start(self, place: int, *flags: str) -> subprocess.Popen[bytes]:
        own = [f"--node-ip-address={self.network.address(place)}", "--num-cpus=1", "--object-store-memory=150000000"]
        process = subprocess.Popen(
            [*self.network.enter(place), RAY, "start", "--block", *own, *flags],
            env=self.environment, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._started.append(process)
        deadline = time.monotonic() + PATIENCE_S
        while not any("raylet" in child.name() for child in with_children(process)):
            assert process.poll() is None, (self.folder / "ray.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "ray.log").read_text()
            time.sleep(0.5)
        return process

    def processes(self) -> list[psutil.Process]:
        """All of Ray's."""
        return [child for process in self._started for child in with_children(process)]

    def trials_far(self) -> list[psutil.Process]:
        """Those of trials on the machine that is not the head."""
        far = {child.pid for child in with_children(self.far)}
        return [process for process in trial_processes(self) if process.pid in far]

    def close(self) -> None:
        """End every process that was started."""
        found = self.processes()
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs(found, timeout=30)
        for child in psutil.process_iter():  # those whose parent is gone, too
            with suppress(psutil.Error):
                if child.environ().get("RAY_TMPDIR") == str(self.folder):
                    child.kill()
        for process in self._started:
            process.wait()
        self._log.close()


@contextmanager
def two_machines() -> Iterator[TwoMachines]:
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # short: Ray's sockets lie in it
    with Network(2) as network:
        machines = TwoMachines(network, folder)
        try:
            yield machines
        finally:
            machines.close()
    shutil.rmtree(folder, ignore_errors=True)


def checkpoints(storage: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in storage.glob("chaos/*/ray/train-*/latest")}


@pytest.mark.slow
@pytest.mark.skipif(not can_make_networks(), reason="this user may not make network namespaces with a bridge")
@pytest.mark.parametrize(
    ("seconds", "settings", "expected"),
    [(CUT_S / 3, {}, False), (CUT_S, {}, None), (CUT_S, IMPATIENT, True)],
    ids=["a third", "as Ray is", "given up soon"],
)
def test_a_time_without_the_network_changes_no_number(
    seconds: float, settings: dict[str, str], expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``expected``: whether Ray gives the machine up meanwhile; None leaves it open: a minute is what Ray waits.

    Where it does not, a trial may wait for an answer that was lost, until Ray notices five minutes later.
    """
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with two_machines() as machines:
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"
        with (
            log_file.open("w") as log,
            driver(machines, storage, log, "--machines", "2", "--no-base", "--steps", "1500") as process,
        ):
            there = wait_until(lambda: bool(machines.trials_far() and checkpoints(storage)), process, "none trains")
            assert there, log_file.read_text()
            victims = machines.trials_far()
            machines.network.cut(1)
            began = time.monotonic()
            while time.monotonic() < began + seconds and process.poll() is None:
                time.sleep(1)
            given_up = "the worker failed" in log_file.read_text()
            machines.network.mend(1)
            print(f"cut for {seconds:.0f} s; Ray {'gave the machine up' if given_up else 'waited'}")
            assert given_up == expected or expected is None, log_file.read_text()
            if expected:
                # a machine that was given up ends what it still runs once it hears of that, and can join again
                _, left = psutil.wait_procs(victims, timeout=120)
                assert not left, "trials that were started again elsewhere still run"
                machines.far.wait(timeout=120)
                if process.poll() is None:  # else all was done on the machine that was left
                    machines.far = machines.start_far()
            assert process.wait(timeout=1200) == 0, log_file.read_text()
        output = log_file.read_text()
        print("\n".join(line for line in output.splitlines() if "the worker failed" in line or "goes on from" in line))
        records = records_of(storage)
        assert sorted(record.config["method"]["name"] for record in records) == ["full", "grass", "lisa"]
        for record in records:
            assert_as_undisturbed(record)
        assert_tracked_once(storage, records)
