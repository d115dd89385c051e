"""A machine of a cluster has no memory, then no room on its disk: its trials start again, and say why.

Its temporary folder is a small file system in memory, which nobody else sees; Ray's memory monitor, at work on this
machine alone, finds more taken than it allows while this test takes it::

    python -m pytest --slow tests/chaos/test_starved_machines.py -s
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest
from disturbed import (
    assert_as_undisturbed,
    assert_tracked_once,
    driver,
    living,
    records_of,
    wait_until,
)
from machines import Machines

GIB = 1024**3
DISK = "48m"  # for a checkpoint of 3 MiB and its copy
FOR_RAY = 5 * GIB  # what the cluster, the sweep and others may take before the monitor kills anything
BALLOON_STEP, MOST_STEPS = GIB // 4, 10
SCRATCH = "/mnt"  # that machine's temporary folder
OUT_OF_MEMORY = ("NODE_OUT_OF_MEMORY", "low on memory")
NO_ROOM = "No space left on device"


def can_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def trials_of(machines: Machines, temporary: str) -> list[psutil.Process]:
    """The processes of trials on the machine with this temporary folder."""
    found = []
    for process in living(machines):
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == temporary:
                found.append(process)
    return found


def fill(file: IO[bytes]) -> None:
    """Take every byte that its file system has left."""
    with suppress(OSError):
        while file.write(bytes(65536)):
            pass


def take_memory_until(killed: Callable[[], bool], limit: float, process: subprocess.Popen[str]) -> float:
    """Take all up to the limit, and more and more until a trial was killed; the seconds that it took."""
    began, memory = time.monotonic(), psutil.virtual_memory()
    lacking = max(int(limit - (memory.total - memory.available)), 0)
    taken = [np.ones(lacking + BALLOON_STEP, dtype=np.uint8)]
    while not killed():
        assert process.poll() is None, "the sweep has ended"
        assert len(taken) < MOST_STEPS, "Ray lets the machine run out of memory"
        time.sleep(5)
        taken.append(np.ones(BALLOON_STEP, dtype=np.uint8))
    return time.monotonic() - began


@pytest.mark.slow
def test_a_machine_without_memory_and_then_without_disk_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()
    if memory.available < FOR_RAY + 3 * GIB:
        pytest.skip("too little memory is free to come to the end of it")
    if not can_mount():
        pytest.skip("this user may not mount a file system")
    limit = memory.total - memory.available + FOR_RAY
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # of all machines but one
    mounted = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={DISK} none {SCRATCH} && exec "$@"', "sh")
    with Machines(1, before=mounted) as machines:
        monitor = f"RAY_memory_monitor_refresh_ms=250 RAY_memory_usage_threshold={limit / memory.total}"
        assert machines.tell(f"add TMPDIR={SCRATCH} {monitor}") == 2
        seen = Path(f"/proc/{machines.process.pid}/root{SCRATCH}")  # where this process reaches that file system
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"

        def deaths(*words: str) -> int:
            lines = [line for line in log_file.read_text().splitlines() if "the worker failed" in line]
            return sum(any(word in line for word in words) for line in lines)

        def trains_there() -> bool:
            return bool(trials_of(machines, SCRATCH))

        flags = ("--machines", "2", "--methods", "full", "grass", "--no-base", "--seeds", "0", "1", "--steps", "400")
        with log_file.open("w") as log, driver(machines, storage, log, *flags) as process:
            assert wait_until(trains_there, process, "no trial on the machine")
            took = take_memory_until(lambda: deaths(*OUT_OF_MEMORY) > 0, limit, process)
            print(f"out of memory: a trial was killed after {took:.0f} s")
            assert wait_until(trains_there, process, "no trial on the machine")
            with (seen / "filler").open("wb", buffering=0) as filler:

                def nothing_fits() -> bool:
                    fill(filler)  # again and again: a checkpoint that was under way leaves room
                    return deaths(NO_ROOM) > 1

                assert wait_until(nothing_fits, process, "nothing has failed"), log_file.read_text()
            (seen / "filler").unlink()
            code = process.wait(timeout=900)
        output = log_file.read_text()
        print("\n".join(line for line in output.splitlines() if "the worker failed" in line or "goes on" in line))
        assert code == 0, output
        assert "goes on from its checkpoint after step" in output
        assert all("(machine " in line for line in output.splitlines() if "the worker failed" in line)
        records = records_of(storage)
        assert sorted((record.config["method"]["name"], record.config["seed"]) for record in records) == [
            ("full", 0), ("full", 1), ("grass", 0), ("grass", 1),
        ]  # fmt: skip
        for record in records:
            assert_as_undisturbed(record)
        assert_tracked_once(storage, records)
