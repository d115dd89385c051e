"""A machine of a cluster has no memory, another no room on its disk: their trials start again, and say why.

On the first one Ray's memory monitor finds too much taken whenever it looks, and kills a trial each time. The temporary
folder of the second is a small file system in memory, which nobody else sees and this test fills::

    python -m pytest --slow tests/chaos/test_starved_machines.py -s
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
from disturbed import assert_as_undisturbed, assert_tracked_once, driver, records_of, wait_until
from machines import Machines

DISK = "48m"  # for checkpoints of 1 MiB
SCRATCH = "/mnt"
NO_MEMORY = "RAY_memory_usage_threshold=0.01 RAY_memory_monitor_refresh_ms=20000"
KILLS = 3
LOW_ON_MEMORY, NO_ROOM = "low on memory", "No space left on device"


def can_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", SCRATCH]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def fill(file: IO[bytes]) -> None:
    """Take every byte that its file system has left."""
    with suppress(OSError):
        while file.write(bytes(65536)):
            pass


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system")
def test_a_machine_without_memory_and_one_without_disk_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # on the other machines it does not look
    mounted = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={DISK} none {SCRATCH} && exec "$@"', "sh")
    with Machines(1, before=mounted) as machines:
        assert machines.tell(f"add {NO_MEMORY}") == 2
        seen = Path(f"/proc/{machines.process.pid}/root{SCRATCH}")  # where this process reaches that file system
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"

        def deaths(word: str) -> int:
            return sum("the worker failed" in line and word in line for line in log_file.read_text().splitlines())

        flags = ("--machines", "2", "--methods", "full", "grass", "--no-base", "--seeds", "0", "1", "--steps", "800")
        with log_file.open("w") as log, driver(machines, storage, log, *flags) as process:
            assert wait_until(lambda: deaths(LOW_ON_MEMORY) >= KILLS, process, "nothing was killed"), (
                log_file.read_text()
            )
            assert machines.tell("lose") == 1
            assert machines.tell(f"add TMPDIR={SCRATCH}") == 2
            # a process that has not written there yet would find no room and take another folder
            saves = wait_until(lambda: any(seen.glob("grass_ray-check*")), process, "nothing is saved", every_s=0.01)
            assert saves, log_file.read_text()
            with (seen / "filler").open("wb", buffering=0) as filler:

                def failed() -> bool:
                    fill(filler)  # again and again: a checkpoint that was under way leaves room
                    return deaths(NO_ROOM) > 0

                assert wait_until(failed, process, "nothing has failed"), log_file.read_text()
            (seen / "filler").unlink()
            code = process.wait(timeout=900)
        output = log_file.read_text()
        told = [line for line in output.splitlines() if "the worker failed" in line]
        print("\n".join(told))
        assert code == 0, output
        assert "goes on from its checkpoint after step" in output
        assert all("(machine " in line or "(IP: " in line for line in told), "which machine"
        records = records_of(storage)
        assert sorted((record.config["method"]["name"], record.config["seed"]) for record in records) == [
            ("full", 0), ("full", 1), ("grass", 0), ("grass", 1),
        ]  # fmt: skip
        for record in records:
            assert_as_undisturbed(record)
        assert_tracked_once(storage, records)
