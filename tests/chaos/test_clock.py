"""The system's clock jumps under a sweep: no number changes and nothing is lost.

All processes of the cluster and the sweep, Ray's own included, see a clock that ``clock.c`` moves, forward by hours and
days, and back by seconds: Ray gives trials their places by that clock, and gives none for as long as it was set back::

    python -m pytest --slow tests/chaos/test_clock.py -s
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from disturbed import HERE, assert_as_undisturbed, assert_tracked_once, driver, living, records_of, wait_until
from machines import Machines

COMPILER = shutil.which("cc")
HOUR_S, DAY_S = 3600, 86_400
BACK_S = 20
# how far the clock is ahead after each jump; the sweep's own process is killed between the two lists
JUMPS_S = (HOUR_S, HOUR_S - BACK_S, 30 * DAY_S)
LATER_JUMPS_S = (60 * DAY_S, 60 * DAY_S - BACK_S)


class Clock:
    """The clock of programs that are started with :attr:`environment`."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        library = folder / "clock.so"
        subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", HERE / "clock.c", "-o", library, "-ldl"], check=True)
        self._file = folder / "ahead"
        self.jump(0)
        self.environment = {"LD_PRELOAD": str(library), "GRASS_RAY_TEST_CLOCK": str(self._file)}

    def jump(self, ahead_s: int) -> None:
        """Be ahead of the kernel's by so many seconds."""
        with self._file.open("r+b" if self._file.exists() else "w+b") as file:
            file.write(struct.pack("=q", ahead_s))

    def enter(self) -> tuple[str, ...]:
        """Words before a command that is to have this clock."""
        return ("env", *(f"{name}={value}" for name, value in self.environment.items()))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_jumps_of_the_clock_change_no_number(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    chance = random.Random(0)
    with Machines(2, before=clock.enter()) as machines:
        machines.enter = clock.enter()
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"

        def jump_often(process: subprocess.Popen[str], jumps: tuple[int, ...]) -> None:
            """Each jump after a new checkpoint; a trial's process is killed after each."""
            for ahead_s in jumps:
                since = time.time()

                def saved(since: float = since) -> bool:
                    times = (path.stat().st_mtime for path in storage.glob("*/*/ray/train-*/*/state.json"))
                    return max(times, default=0.0) > since and bool(living(machines))

                assert wait_until(saved, process, "no new checkpoint"), log_file.read_text()
                clock.jump(ahead_s)
                print(f"the clock is ahead by {ahead_s} s", flush=True)
                time.sleep(chance.uniform(1, 5))
                for victim in living(machines)[:1]:
                    victim.kill()

        flags = ("--machines", "2", "--methods", "full", "grass", "--no-base", "--steps", "1200")
        with log_file.open("w") as log:
            with driver(machines, storage, log, *flags) as process:
                jump_often(process, JUMPS_S)
                process.kill()
            clock.jump(JUMPS_S[-1] - BACK_S)
            with driver(machines, storage, log, "--machines", "2", "--resume") as process:
                jump_often(process, LATER_JUMPS_S)
                code = process.wait(timeout=900)
        output = log_file.read_text()
        assert code == 0, output
        assert "goes on from its checkpoint after step" in output
        records = records_of(storage)
        assert [record.config["method"]["name"] for record in records] == ["full", "grass"]
        for record in records:
            assert record.started_at <= record.finished_at
            assert_as_undisturbed(record)
        assert_tracked_once(storage, records)
