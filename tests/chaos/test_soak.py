"""Hundreds of trials and hundreds of checkpoints under faults: nothing lost, nothing twice, nothing left over.

Real Ray, real MLflow, real training; every process that is killed or stopped is one of this test's own::

    GRASS_RAY_SOAK_OUTPUT=benchmarks/results/soak.json python -m pytest --slow tests/chaos/test_soak.py -s

GRASS_RAY_SOAK_TRIALS (200) trials with GRASS_RAY_SOAK_FAULTS (40) faults, and GRASS_RAY_SOAK_CHECKPOINTS (480).
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from disturbed import assert_as_undisturbed, assert_tracked_once, driver, living, records_of, trial_processes
from machines import Machines

from grass_ray.results.record import RunRecord

TRIALS = int(os.environ.get("GRASS_RAY_SOAK_TRIALS", "200"))
FAULTS = int(os.environ.get("GRASS_RAY_SOAK_FAULTS", "40"))
CHECKPOINTS = int(os.environ.get("GRASS_RAY_SOAK_CHECKPOINTS", "480"))
OUTPUT = os.environ.get("GRASS_RAY_SOAK_OUTPUT")
KILLS = 8  # of the run
COMPARED = 10  # records that are compared with undisturbed runs
KINDS = ("kill", "kill", "stop", "kill", "kill", "driver")
SEGMENTS = ("torch", "psm", "plasma", "ray", "sem")  # as torch, Python and Ray name them; others use /dev/shm, too
MIB = 1024**2

LEFT = """
import json, ray
from ray.util import state
ray.init(log_to_driver=False)
actors = [actor.class_name for actor in state.list_actors(limit=10_000) if actor.state != "DEAD"]
groups = [group.placement_group_id for group in state.list_placement_groups(limit=10_000) if group.state != "REMOVED"]
print("left", json.dumps({"actors": actors, "placement groups": groups}))
"""


def rss(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return float(process.memory_info().rss) / MIB
    return 0.0


def size(folder: Path) -> float:
    """MiB of the files of a folder that something is writing to."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob, unmoved by a folder that has just been replaced
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total / MIB


def write(name: str, values: dict[str, Any]) -> None:
    print(json.dumps({name: values}, indent=1), flush=True)
    if OUTPUT:
        path = Path(OUTPUT)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: values}, indent=1) + "\n")


# -------------------------------------------------------------------------------------------------------- many trials


class Soak:
    """One sweep, its faults, and what was measured while it ran."""

    def __init__(self, machines: Machines, storage: Path) -> None:
        self.machines, self.storage = machines, storage
        self.faults = Counter[str]()
        self.samples: list[tuple[int, int, float, float]] = []  # driver, trials ended, MiB of the driver and of a trial
        self._chance, self._drivers, self._due = random.Random(0), 0, time.monotonic() + 30

    def run(self, log: Path, *flags: str) -> int:
        """Run it to its end, through all deaths of its driver; the exit code."""
        with log.open("w") as output:
            while True:
                self._drivers += 1
                with driver(self.machines, self.storage, output, *flags) as process:
                    flags = ("--resume", "--quiet")
                    while process.poll() is None:
                        self._sample(psutil.Process(process.pid))
                        if self._is_due():
                            self._disturb(process)
                        time.sleep(1)
                if process.returncode != -signal.SIGKILL:
                    return process.returncode

    def _is_due(self) -> bool:
        """Faults are spread over the trials, at moments that nothing chose."""
        done = sum(self.faults.values())
        return done < FAULTS and self.samples[-1][1] >= done * TRIALS / FAULTS and time.monotonic() > self._due

    def _sample(self, process: psutil.Process) -> None:
        ended = len(list(self.storage.glob("chaos/*/*/record.json")))
        trial = max(map(rss, trial_processes(self.machines)), default=0.0)
        self.samples.append((self._drivers, ended, rss(process), trial))

    def _disturb(self, process: subprocess.Popen[str]) -> None:
        kind, victims = KINDS[sum(self.faults.values()) % len(KINDS)], living(self.machines)
        if kind != "driver" and not victims:
            return
        with suppress(psutil.NoSuchProcess):
            if kind == "driver":
                process.kill()
            elif kind == "kill":
                self._chance.choice(victims).kill()
            else:
                victim = self._chance.choice(victims)
                victim.suspend()
                time.sleep(5)
                victim.resume()
            self.faults[kind] += 1
        self._due = time.monotonic() + self._chance.uniform(1, 10)

    def most(self) -> dict[str, list[int]]:
        """The most MiB of the driver, and of a trial's process, in the first and in the last tenth of the trials."""
        first = [sample for sample in self.samples if sample[1] <= max(4, TRIALS / 10)]
        last = [sample for sample in self.samples if sample[1] >= TRIALS * 9 / 10]
        return {
            name: [round(max(sample[at] for sample in part)) for part in (first, last)]
            for name, at in (("driver", 2), ("trial", 3))
        }


def left_over(machines: Machines) -> dict[str, list[str]]:
    """What is left in a cluster that no sweep uses: actors, placement groups, processes of trials."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT], env=machines.environment, capture_output=True, text=True, timeout=300, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout.rpartition("left ")[2])
    return found | {"processes": [str(process) for process in trial_processes(machines)]}


@pytest.mark.slow
def test_hundreds_of_trials_under_faults_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    memory_before, started = set(os.listdir("/dev/shm")), time.monotonic()
    with Machines(1, head_cpus=2) as machines:
        soak = Soak(machines, tmp_path / "results")
        log = tmp_path / "driver.log"
        seeds = map(str, range(TRIALS // 2))
        flags = ("--methods", "full", "grass", "--no-base", "--steps", "20", "--seeds", *seeds, "--quiet")
        code = soak.run(log, *flags, "--set", "training.checkpoint_every_steps=5")
        took = time.monotonic() - started
        assert code == 0, log.read_text()[-5000:]
        time.sleep(5)
        left = left_over(machines)
    records = records_of(soak.storage)
    files = sorted(path.name.rpartition("-")[0] for path in scratch.iterdir() if path.is_file() or any(path.iterdir()))
    segments = sorted(name for name in set(os.listdir("/dev/shm")) - memory_before if name.startswith(SEGMENTS))
    values = {
        "trials": TRIALS, "faults": dict(soak.faults), "seconds": round(took),
        "records": len(records), "keys": len({record.run_id for record in records}),
        "most_mib": soak.most(),
        "left": left | {"temporary files": files, "shared memory": segments},
        "storage_mib": round(size(soak.storage), 1),
    }  # fmt: skip
    write("sweep", values)
    assert values["records"] == values["keys"] == TRIALS
    assert {record.status for record in records} == {"finished"}
    assert not any(left.values()), left
    # a process that is killed outright cannot clear up behind itself; every other one does
    assert len(files) <= soak.faults["kill"] + soak.faults["driver"], files
    assert not segments
    assert not list(soak.storage.glob("chaos/*/*/checkpoint*")), "checkpoints of finished trials"
    for name, (first, last) in soak.most().items():
        assert last < first + 150, name
    assert_tracked_once(soak.storage, records)
    for record in random.Random(0).sample(records, min(COMPARED, len(records))):
        assert_as_undisturbed(record)


# ------------------------------------------------------------------------------------------------------------- one run


@contextmanager
def training(folder: Path, log: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    words = ["train", "grass", "--model", "tiny", "--task", "generated", "--output", str(folder), *flags]
    with log.open("a") as output:
        command = [sys.executable, "-c", "from grass_ray.cli import main; main()", *words]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def saved_since(folder: Path, moment: float) -> bool:
    with suppress(OSError):
        return (folder / "checkpoint").stat().st_mtime > moment
    return False


@pytest.mark.slow
def test_a_run_with_a_checkpoint_a_minute_for_eight_hours_keeps_to_its_disk(tmp_path: Path) -> None:
    """Time-scaled: what happens in a minute of a real run, a few steps and a checkpoint, takes less than a second."""
    folder, log = tmp_path / "train" / "run", tmp_path / "train.log"
    steps = 5 * CHECKPOINTS
    settings = (f"training.steps={steps}", "training.checkpoint_every_steps=5", "training.batch_size=4")
    more = ("data.source.train_rows=64", "data.source.test_rows=8", "evaluation.limit=8")
    chance, disk, memory, kills, started = random.Random(0), list[float](), list[float](), 0, time.monotonic()
    flags: tuple[str, ...] = ("--set", *settings, *more, "--quiet")
    while True:
        with training(folder, log, *flags) as process:
            flags = ("--set", *settings, *more, "--quiet", "--resume")
            began, due = time.time(), float("inf")
            memory.clear()
            while process.poll() is None:
                disk.append(size(folder))
                if saved_since(folder, began) and not (folder / "record.json").exists():  # while it trains
                    memory.append(rss(psutil.Process(process.pid)))
                    due = min(due, time.monotonic() + chance.uniform(1, 15))
                if kills < KILLS and time.monotonic() > due:
                    process.kill()
                    kills += 1
                time.sleep(0.5)
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, log.read_text()[-5000:]
    record = RunRecord.load(folder / "record.json")
    assert len(memory) >= 8, "the last process trained for too short a time to compare its memory"
    early, late = (statistics.median(memory[at * len(memory) // 4 :][: len(memory) // 4]) for at in (1, 3))
    values = {
        "checkpoints": CHECKPOINTS, "steps": steps, "kills": kills, "seconds": round(time.monotonic() - started),
        "disk_mib": {"first": round(max(disk[:20]), 1), "most": round(max(disk), 1), "end": round(size(folder), 1)},
        "memory_mib": {"second quarter": round(early), "last quarter": round(late), "most": round(max(memory))},
        "files": sorted(path.name for path in folder.iterdir()),
    }  # fmt: skip
    write("one run", values)
    one = size(folder / "checkpoint")
    assert max(disk) < 2.5 * one + 20, "at most two checkpoints at a time, and the results"
    assert late < 1.1 * early
    assert not [name for name in values["files"] if name.startswith((".", "checkpoint."))], "torn or put aside"
    last = steps + len(record.probing_steps())
    assert [step for step, _ in record.series["train/loss"]] == list(range(1, last + 1))
    assert_as_undisturbed(record)
