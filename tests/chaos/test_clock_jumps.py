"""The clock of a machine jumps hours ahead and back while a sweep runs: nothing hangs, no number changes.

libfaketime gives all processes of the sweep, Ray's own too, the clock that a file says::

    python -m pytest --slow tests/chaos/test_clock_jumps.py -s
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from disturbed import SWEEP, assert_as_undisturbed, assert_tracked_once, records_of, wait_until

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
JUMPS = ("+3h", "-2d", "+0")


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed (apt-get install libfaketime)")
def test_a_clock_that_jumps_changes_no_number(tmp_path: Path) -> None:
    clock, storage, log = tmp_path / "clock", tmp_path / "results", tmp_path / "driver.log"
    clock.write_text("+0\n")
    jumping = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # as the kernel's does not jump
        "FAKETIME_DONT_RESET": "1",
    }
    command = [sys.executable, str(SWEEP), "--storage-path", str(storage), "--cpus-per-trial", "1"]
    environment = {**os.environ, **jumping, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--methods", "grass", "--steps", "600"],
            stdout=output, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        try:

            def trained() -> bool:
                return bool(list(storage.glob("chaos/*/ray/train-*/latest")))

            assert wait_until(trained, process, "no checkpoint"), log.read_text()
            for jump in JUMPS:
                clock.write_text(f"{jump}\n")
                time.sleep(4)
            clock.write_text("-2d\n")
            assert process.wait(timeout=600) == 0, log.read_text()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    records = records_of(storage)
    assert [record.config["method"]["name"] for record in records] == ["base", "grass"]
    for record in records:
        assert_as_undisturbed(record)
        assert datetime.fromisoformat(record.started_at) <= datetime.fromisoformat(record.finished_at)
    assert_tracked_once(storage, records)
