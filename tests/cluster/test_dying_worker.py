"""A trial whose only process is killed: once too often, or when it takes over from the trial before."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small import REPOSITORY

from grass_ray.cluster.job import describe_death
from grass_ray.results.record import RunRecord

SWEEP = REPOSITORY / "tests" / "mini_sweep.py"
PATIENCE_S = 900
# as Ray writes them
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
\tpid: 4711
\tip: 10.0.0.3
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Some common causes include: 1
The actor never ran"""
RAISED = """ray::ImplicitFunc.train() (pid=4711, ip=10.0.0.4, actor_id=1, repr=single_worker)
  File "worker.py", line 1, in work
OSError: [Errno 28] No space left on device: '/tmp/x'"""


def workers(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The trials' processes; Ray names them after Tune's class."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::ImplicitFunc"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            KILLED,
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR (machine 10.0.0.3)",
        ),
        (RAISED, "OSError: [Errno 28] No space left on device: '/tmp/x' (machine 10.0.0.4)"),
        ("", "no reason known"),
    ],
)
def test_a_death_is_told_in_one_line_with_the_machine(error: str, told: str) -> None:
    assert describe_death(error, 2) == f"the worker failed 2 time(s): {told}"


@pytest.mark.long
def test_a_worker_that_dies_too_often_fails_its_trial_and_a_resumed_sweep_tries_it_again(tmp_path: Path) -> None:
    storage, log = tmp_path / "results", tmp_path / "driver.log"
    command = [sys.executable, str(SWEEP), "--methods", "grass", "--no-base", "--cpus-per-trial", "1"]
    command += ["--storage-path", str(storage), "--max-failures", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed: set[int] = set()
    with log.open("wb") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while driver.poll() is None:
                assert time.monotonic() < deadline, log.read_text()
                checkpoints = len(list(storage.glob("mini/*/ray/train-*/latest")))
                for worker in workers(driver) if checkpoints else ():
                    if worker.pid not in killed:
                        worker.send_signal(signal.SIGKILL)
                        killed.add(worker.pid)
                time.sleep(0.1)
        finally:
            driver.kill()
            driver.wait()
    assert driver.returncode == 1, log.read_text()
    assert len(killed) == 2
    (path,) = storage.glob("mini/*/*/record.json")
    record = RunRecord.load(path)
    assert record.status == "failed"
    assert re.match(r"the worker failed 2 time\(s\): .*process has died", record.failure or ""), record.failure
    assert (path.parent / "traceback.txt").exists()

    resumed = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, timeout=PATIENCE_S
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "goes on from its checkpoint after step" in resumed.stdout
    assert RunRecord.load(path).status == "finished"
    assert not (path.parent / "traceback.txt").exists()


@pytest.mark.slow
def test_a_process_that_dies_between_two_trials_loses_neither(tmp_path: Path) -> None:
    storage, log = tmp_path / "results", tmp_path / "driver.log"
    command = [sys.executable, str(SWEEP), "--methods", "full", "grass", "--no-base", "--cpus-per-trial", "1"]
    command += ["--max-concurrent-trials", "1", "--storage-path", str(storage), "--set", "training.steps=30"]
    with log.open("wb") as output:
        driver = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not re.search(r"finished", log.read_text()):  # the driver says so before it hands the process on
                assert driver.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            (worker,) = workers(driver)
            worker.suspend()
            time.sleep(3)
            worker.kill()
            assert driver.wait(timeout=PATIENCE_S) == 0, log.read_text()
        finally:
            driver.kill()
            driver.wait()
    records = [RunRecord.load(path) for path in storage.glob("mini/*/*/record.json")]
    assert sorted((r.config["method"]["name"], r.status) for r in records) == [
        ("full", "finished"),
        ("grass", "finished"),
    ]


@pytest.mark.slow
def test_a_trial_that_the_memory_monitor_of_ray_kills_fails_alone_and_is_resumed(tmp_path: Path) -> None:
    """Tune itself would end the sweep with a traceback; see :mod:`grass_ray.cluster.lost_answers`."""
    command = [sys.executable, str(SWEEP), "--methods", "full", "--no-base", "--cpus-per-trial", "1", "--steps", "30"]
    command += ["--storage-path", str(tmp_path), "--max-failures", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    always_too_much = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "250"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | always_too_much, timeout=PATIENCE_S
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (path,) = tmp_path.glob("mini/*/*/record.json")
    failure = RunRecord.load(path).failure or ""
    assert re.match(r"the worker failed 2 time\(s\): .*low on memory.* \(IP: ", failure), failure
    assert failure.replace(" 2 time", " 1 time")[:40] in done.stdout, "the first death is told, too"

    resumed = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, timeout=PATIENCE_S
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert RunRecord.load(path).status == "finished"
