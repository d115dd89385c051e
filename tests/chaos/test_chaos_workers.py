"""Trials of several workers and populations are killed, and end as if nothing had happened.

Each kind of sweep loses a process of a trial, a machine and its driver, each time after a new checkpoint, and is then
compared with the same sweep undisturbed on the same machines::

    python -m pytest --slow tests/chaos/test_chaos_workers.py -s

GRASS_RAY_CHAOS_ROUNDS (1) times all three.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from disturbed import (
    SWEEP,
    assert_same,
    assert_tracked_once,
    driver,
    living,
    records_of,
    tracked,
    trial_processes,
    wait_until,
)
from machines import Machines
from small import REPOSITORY

from grass_ray.results.record import RunRecord

ROUNDS = int(os.environ.get("GRASS_RAY_CHAOS_ROUNDS", "1"))
FAULTS = ("worker", "machine", "driver") * ROUNDS
# float32 sums in another order, which hundreds of steps of Adam let grow
LOSS_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Kind:
    """A kind of sweep.

    Attributes:
        flags: of the sweep.
        script: the sweep's file.
        name: of the sweep.
        process: what is killed of a trial.
        bits: whether a disturbed sweep has the bits of an undisturbed one, and not only its numbers.
    """

    flags: tuple[str, ...]
    script: Path = SWEEP
    name: str = "chaos"
    process: str = "TrainWorker"
    bits: bool = True


STEPS = ("--steps", str(300 + 300 * len(FAULTS)))
TWO_WORKERS = (
    *("--methods", "grass", "--no-base", "--workers-per-trial", "2", *STEPS),
    *("--set", "training.accumulation_steps=2", "training.checkpoint_every_steps=25"),
)
KINDS = {
    "data-parallel": Kind(TWO_WORKERS),
    "sharded": Kind((*TWO_WORKERS, "--parallel", "shard")),
    "elastic": Kind((*TWO_WORKERS, "--min-workers-per-trial", "1"), bits=False),
    "population": Kind(
        ("--scheduler", "pbt", "--num-samples", "4", "--no-base", "--steps", "800"),
        script=REPOSITORY / "tests" / "mini_search.py",
        name="mini-search",
        process="ImplicitFunc",
    ),
}


class Chaos:
    """A sweep and what is done to it."""

    def __init__(self, kind: Kind, machines: Machines, storage: Path) -> None:
        self.kind, self.machines, self.storage = kind, machines, storage
        self.done = Counter[str]()
        self._left = list(FAULTS)
        self._chance = random.Random(0)
        self._newest = 0.0

    def run(self, log: IO[str]) -> int:
        """Run it to its end, through all deaths of its driver; the exit code."""
        flags: Sequence[str] = ("--machines", "3", *self.kind.flags)
        while True:
            with driver(self.machines, self.storage, log, *flags, script=self.kind.script) as process:
                flags = ("--machines", "3", "--resume")  # the plan says how many workers a trial has
                while self._left and wait_until(self._has_gone_on, process, "no new checkpoint", 600):
                    time.sleep(self._chance.uniform(0, 4))
                    self._do(self._left[0], process)
                code = process.wait(timeout=1200)
            if code != -signal.SIGKILL:
                return code

    def _has_gone_on(self) -> bool:
        """Whether there is a checkpoint since the last fault, and a process to kill."""
        times = [path.stat().st_mtime for path in self.storage.glob("*/*/ray/train-*/checkpoint_*/state.json")]
        return max(times, default=0.0) > self._newest and bool(trial_processes(self.machines, [self.kind.process]))

    def _do(self, fault: str, process: subprocess.Popen[str]) -> None:
        if fault == "driver":
            process.kill()
        elif fault == "machine":
            assert self.machines.tell("kill") == 3
        else:
            victims = [victim for victim in living(self.machines) if self.kind.process in " ".join(victim.cmdline())]
            if not victims:
                return
            self._chance.choice(victims).kill()
        self._newest = time.time()
        self.done[self._left.pop(0)] += 1
        print(f"fault {sum(self.done.values())}: {fault}", flush=True)
        if fault == "driver":
            process.wait()


def assert_near(record: RunRecord, other: RunRecord) -> None:
    """Numbers that differ as sums in another order do, and no step lost or taken twice."""
    assert record.status == other.status == "finished"
    assert [step for step, _ in record.series["train/loss"]] == [step for step, _ in other.series["train/loss"]]
    losses = [loss for _, loss in other.series["train/loss"]]
    assert [loss for _, loss in record.series["train/loss"]] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert record.layers is not None
    assert other.layers is not None
    assert record.layers.only_active_layers_changed
    assert record.layers.intervals == other.layers.intervals


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_sweep_that_is_killed_has_the_numbers_of_an_undisturbed_one(name: str) -> None:
    kind = KINDS[name]
    with Machines(3) as machines:
        log_file = machines.folder / "driver.log"
        with log_file.open("w") as log:
            chaos = Chaos(kind, machines, machines.folder / "disturbed")
            code = chaos.run(log)
            assert code == 0, log_file.read_text()
            assert sum(chaos.done.values()) == len(FAULTS), f"the sweep ended after {dict(chaos.done)}"
            whole = machines.folder / "undisturbed"
            with driver(machines, whole, log, *kind.flags, script=kind.script) as process:
                assert process.wait(timeout=1200) == 0, log_file.read_text()
        output = log_file.read_text()
        print("\n".join(line for line in output.splitlines() if "the worker failed" in line or "goes on from" in line))
        assert "the worker failed" in output, "why it was started again"
        records, others = records_of(chaos.storage, kind.name), records_of(whole, kind.name)
        keys = [record.run_id[-12:] for record in records]
        assert sorted(set(keys)) == sorted(keys) == sorted(other.run_id[-12:] for other in others)
        other_of = {other.run_id[-12:]: other for other in others}
        for key, record in zip(keys, records, strict=True):
            (assert_same if kind.bits else assert_near)(record, other_of[key])
        if name == "population":  # MLflow has what each member went through, a record what its weights did
            assert tracked(chaos.storage, records) == tracked(whole, others)
        else:
            assert_tracked_once(chaos.storage, records)
