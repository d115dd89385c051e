"""A sweep on three nodes that is disturbed again and again ends as if nothing had happened.

Real Ray, real MLflow, real training; what is killed, stopped or interrupted are processes this test started::

    python -m pytest --slow tests/chaos/test_chaos.py -s

GRASS_RAY_CHAOS_KILLS (20) kills, but none after GRASS_RAY_CHAOS_S (480) seconds; GRASS_RAY_CHAOS_FAULTS (30) faults of
all kinds, but none after GRASS_RAY_CHAOS_FAULTS_S (1200) seconds; what was done is printed.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest
from disturbed import assert_as_undisturbed, assert_tracked_once, driver, living, records_of, wait_for_training
from machines import Machines
from mlflow_server import free_port

KILLS = int(os.environ.get("GRASS_RAY_CHAOS_KILLS", "20"))
KILLS_FOR_S = float(os.environ.get("GRASS_RAY_CHAOS_S", "480"))
FAULTS = int(os.environ.get("GRASS_RAY_CHAOS_FAULTS", "30"))
FAULTS_FOR_S = float(os.environ.get("GRASS_RAY_CHAOS_FAULTS_S", "1200"))
# "worker", "node", "driver": SIGKILL; "stopped": a trial's process stands still; "head": Ray's control service is away;
# "early ...": the sweep is interrupted at any moment before a trial trains, else while one does
KILL_KINDS = ("worker", "node", "worker", "driver")
FAULT_KINDS = (
    *("sigterm", "worker", "early sigint", "head", "node"),
    *("sigint", "stopped", "early sigterm", "driver", "head"),
)
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "driver": signal.SIGKILL}
STEPS_A_KILL, STEPS_A_FAULT = 30, 70  # of each trial, so that work is left at the last one
STOPPED_S = 10
ENDS_WITHIN_S = 120
REDIS = shutil.which("redis-server")
EARLY_S = 25  # about what it takes until a trial trains


class Chaos:
    """A sweep and what is done to it."""

    def __init__(
        self, machines: Machines, storage: Path, kinds: Sequence[str], number: int, for_s: float, steps: int
    ) -> None:
        self.machines, self.storage, self.steps = machines, storage, steps
        self.done = Counter[str]()
        self._kinds, self._number, self._end = itertools.cycle(kinds), number, time.monotonic() + for_s
        self._chance = random.Random(0)

    def disturb(self, log: IO[str]) -> None:
        """Run the sweep again and again until the faults are used up, or it ends."""
        while self._goes_on():
            known = ("--machines", "3", "--steps", str(self.steps))
            flags = ("--resume",) if list(self.storage.glob("chaos/*/sweep.yaml")) else known
            with driver(self.machines, self.storage, log, *flags) as process:
                while self._goes_on() and process.poll() is None:
                    kind = next(self._kinds)
                    if kind.startswith("early "):
                        time.sleep(self._chance.uniform(0, EARLY_S))
                    elif not wait_for_training(self.machines, process):
                        return
                    else:
                        time.sleep(self._chance.uniform(3, 12))
                    self._do(kind, process)
                    print(f"fault {sum(self.done.values())}: {kind}", flush=True)

    def _goes_on(self) -> bool:
        return sum(self.done.values()) < self._number and time.monotonic() < self._end

    def _do(self, kind: str, process: subprocess.Popen[str]) -> None:
        victims = living(self.machines)
        if (number := SIGNALS.get(kind.removeprefix("early "))) is not None:
            process.send_signal(number)
            code = process.wait(timeout=ENDS_WITHIN_S)
            assert code in (0, 130, -number), f"{kind}: exit code {code}"
        elif kind in ("node", "head"):
            assert self.machines.tell("kill" if kind == "node" else kind) == 3
        elif not victims:
            return
        elif kind == "worker":
            self._chance.choice(victims).kill()
        else:
            victim = self._chance.choice(victims)
            victim.suspend()
            time.sleep(STOPPED_S)
            victim.resume()
        self.done[kind] += 1


def survive(kinds: Sequence[str], number: int, for_s: float, steps: int) -> None:
    """Disturb a sweep, let it end, and compare it with one that was not disturbed."""
    with Machines(3) as machines:
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"
        chaos = Chaos(machines, storage, kinds, number, for_s, steps)
        with log_file.open("w") as log:
            chaos.disturb(log)
            print(f"{sum(chaos.done.values())} faults: {dict(chaos.done)}")
            assert chaos.done.keys() == set(kinds), "too little time for each kind once"
            for _ in range(3):
                with driver(machines, storage, log, "--resume") as process:
                    code = process.wait(timeout=900)
                if code == 0:
                    break
        output = log_file.read_text()
        assert code == 0, output
        assert "joined Ray at" in output
        assert "3 machine(s)" in output

        records = records_of(storage)
        assert sorted((r.config["method"]["name"], r.config["seed"]) for r in records) == [
            ("base", 0), ("full", 0), ("grass", 0), ("lisa", 0),
        ]  # fmt: skip
        for record in records:
            assert_as_undisturbed(record)
        assert_tracked_once(storage, records)


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_has_the_numbers_of_an_undisturbed_one() -> None:
    survive(KILL_KINDS, KILLS, KILLS_FOR_S, KILLS * STEPS_A_KILL)


@pytest.mark.slow
def test_faults_of_all_kinds_change_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    survive(FAULT_KINDS, FAULTS, FAULTS_FOR_S, FAULTS * STEPS_A_FAULT)


@pytest.mark.slow
@pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)")
def test_a_head_whose_state_is_in_redis_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert REDIS is not None
    port = free_port()
    own = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path))
    with (tmp_path / "redis.log").open("w") as log:
        server = subprocess.Popen([REDIS, *own], stdout=log, stderr=subprocess.STDOUT)
    try:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{port}")
        survive(("head", "worker", "head", "node"), 4, FAULTS_FOR_S, 4 * STEPS_A_FAULT)
    finally:
        server.terminate()
        server.wait()
