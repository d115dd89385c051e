"""A sweep on three nodes whose workers, nodes and driver are killed again and again ends as if nothing had happened.

Real Ray, real MLflow, real training; every kill is SIGKILL, of processes this test started, by their ids::

    python -m pytest --slow tests/chaos/test_chaos.py -s

GRASS_RAY_CHAOS_KILLS (20) kills, but none after GRASS_RAY_CHAOS_S (480) seconds; what was done is printed.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import IO

import pytest
from disturbed import assert_as_undisturbed, assert_tracked_once, driver, living, records_of, wait_for_training
from machines import Machines

KILLS = int(os.environ.get("GRASS_RAY_CHAOS_KILLS", "20"))
FOR_S = float(os.environ.get("GRASS_RAY_CHAOS_S", "480"))
KINDS = ("worker", "node", "worker", "driver")
STEPS_A_KILL = 30  # of each trial, so that work is left at the last kill


def disturb(machines: Machines, storage: Path, log: IO[str]) -> Counter[str]:
    """Run the sweep while killing what it consists of; returns how often what was killed."""
    kinds, chance, kills = itertools.cycle(KINDS), random.Random(0), Counter[str]()
    flags: tuple[str, ...] = ("--machines", "3", "--steps", str(STEPS_A_KILL * KILLS))
    end = time.monotonic() + FOR_S
    while sum(kills.values()) < KILLS and time.monotonic() < end:
        with driver(machines, storage, log, *flags) as process:
            flags = ("--resume",)
            while sum(kills.values()) < KILLS and time.monotonic() < end:
                if not wait_for_training(machines, process):
                    return kills
                time.sleep(chance.uniform(3, 12))
                kind = next(kinds)
                if kind == "driver":
                    process.send_signal(signal.SIGKILL)
                elif kind == "node":
                    assert machines.tell("kill") == 3
                elif victims := living(machines):
                    chance.choice(victims).kill()
                else:
                    continue
                kills[kind] += 1
                print(f"kill {sum(kills.values())}: {kind}", flush=True)
                if kind == "driver":
                    break
    return kills


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_has_the_numbers_of_an_undisturbed_one() -> None:
    with Machines(3) as machines:
        storage, log_file = machines.folder / "results", machines.folder / "driver.log"
        with log_file.open("w") as log:
            kills = disturb(machines, storage, log)
            print(f"{sum(kills.values())} kills: {dict(kills)}")
            assert kills.keys() == set(KINDS), "too little time to kill each kind once"
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
