"""The runs of the verdict (PLAN.md), one after another; the same command goes on where it was cut.

    cp -r benchmarks/verdict/runs verdict_runs                                       # go on after the recorded runs
    nice python benchmarks/verdict/run.py --data-dir DATA --work verdict_runs        # once per free core

Every run has a file of its own. Processes share the work: each claims a run by a lock that ends with the process, so a
cut loses no more than the runs in progress. A row's learning rates are searched before its tested runs begin. Needs
neither ray nor mlflow. On a GPU, ``--extra-seeds 5`` adds as many seeds to every row.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from experiment import (
    DATA,
    LADDER,
    MOST_EXTENSIONS,
    ROWS,
    SEARCH_SEED,
    SEARCH_STEPS,
    STAGES,
    STEPS,
    configure,
    prepare_data,
)

from grass_ray.execute import RunContext, execute
from grass_ray.methods import METHODS
from grass_ray.process import leave
from grass_ray.results.provenance import now, write_examples
from grass_ray.results.record import RunRecord
from grass_ray.training.report import VALIDATION

WAIT_S = 10.0  # for a run of another process that others depend on
SPEED = ("time/", "throughput/", "step/stall_s")  # of runs beside other work: says nothing, so it is not kept


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to work, and for how long."""

    data_dir: Annotated[Path, tyro.conf.arg(help="holds llm-adapters/dataset and gsm8k/{train,test}.jsonl")]
    work: Annotated[Path, tyro.conf.arg(help="folder of the runs")] = Path("verdict_runs")
    minutes: Annotated[float, tyro.conf.arg(help="begin no run after so many minutes")] = math.inf
    extra_seeds: Annotated[int, tyro.conf.arg(help="seeds beyond those of the plan, for every row")] = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: of the search (``seed`` None) or tested."""

    data: str
    row: str
    lr: float
    seed: int | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.data}-{self.row}-{f'lr{self.lr:.0e}' if self.seed is None else f's{self.seed}'}"

    @property
    def path(self) -> Path:
        """Its record, relative to the folder of the runs."""
        return Path("search" if self.seed is None else "records") / f"{self.name}.json.gz"


def search(data: str, row: str) -> tuple[list[Job], float | None]:
    """The runs that a row's search still needs, and its learning rate when none are left.

    Three neighbours on the ladder, then further ones while the best is at an edge. A run that failed counts as the
    worst.
    """
    if not METHODS[ROWS[row].method].trains:
        return [], ROWS[row].middle
    middle = LADDER.index(ROWS[row].middle)
    low, high = middle - 1, middle + 1
    while True:
        grid = [Job(data=data, row=row, lr=lr) for lr in LADDER[low : high + 1]]
        if missing := [job for job in grid if not job.path.exists()]:
            return missing, None
        losses = [judged(job.path) for job in grid]
        best = losses.index(min(losses))
        if best == 0 and middle - low <= MOST_EXTENSIONS:
            low -= 1
        elif best == len(grid) - 1 and high - middle <= MOST_EXTENSIONS:
            high += 1
        else:
            return [], grid[best].lr


def judged(path: Path) -> float:
    """The loss on held-out training rows; infinite if the run failed."""
    loss = RunRecord.load(path).metrics.get(VALIDATION, math.inf)
    return loss if math.isfinite(loss) else math.inf


def remaining(extra_seeds: int) -> Iterator[list[Job]]:
    """What is left, by urgency: of each stage the searches, then the tested runs, seed after seed."""
    for stage in STAGES:
        tested: list[tuple[int, Job]] = []
        searches: list[Job] = []
        for data in DATA:
            for row in stage:
                needed, lr = search(data, row)
                searches += needed
                if lr is not None:
                    more = extra_seeds if METHODS[ROWS[row].method].trains else 0
                    seeds = range(1, ROWS[row].seeds + more + 1)
                    tested += [(seed, Job(data=data, row=row, lr=lr, seed=seed)) for seed in seeds]
        left = [job for _, job in sorted(tested, key=lambda item: item[0]) if not job.path.exists()]
        if searches or left:
            yield [*searches, *left]


@contextmanager
def claimed(job: Job) -> Iterator[bool]:
    """Whether this process has the run for itself; the lock ends with the process."""
    lock = Path("locks") / job.name
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not job.path.exists()


def run(job: Job) -> None:
    """Carry the run out and write its record, without speeds."""
    tested = job.seed is not None
    config = configure(
        job.data,
        job.row,
        job.lr,
        seed=SEARCH_SEED if job.seed is None else job.seed,
        steps=STEPS if tested else SEARCH_STEPS,
        test=tested,
    )
    result = execute(config, threads=1)
    record = result.record(RunContext(sweep="verdict", sweep_id=f"verdict-{job.data}", run_id=job.name))
    record.metrics = {name: value for name, value in record.metrics.items() if not name.startswith(SPEED)}
    record.series = {name: points for name, points in record.series.items() if not name.startswith(SPEED)}
    for score in record.tasks.values():
        score.workload.pop("seconds", None)
    job.path.parent.mkdir(exist_ok=True)
    if tested and result.outcome is not None:
        examples = Path("examples") / f"{job.name}.jsonl"
        examples.parent.mkdir(exist_ok=True)
        write_examples(examples, result.outcome.tasks)
    record.save(job.path)
    loss = record.metrics.get("eval/loss", record.metrics.get(VALIDATION, math.nan))
    print(f"{now()} {job.name}: {record.status}, loss {loss:.4f}{f' ({record.failure})' * bool(record.failure)}")


def work(options: Options) -> int:
    """Run whatever is left, most urgent first; returns the exit code."""
    data_dir = options.data_dir.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    os.chdir(options.work)
    prepare_data(data_dir, Path())
    began = time.monotonic()
    while time.monotonic() - began < 60 * options.minutes:
        stages = list(remaining(options.extra_seeds))
        if not stages:
            print("nothing is left")
            return 0
        for job in (job for stage in stages for job in stage):
            with claimed(job) as mine:
                if mine:
                    run(job)
                    break
        else:
            time.sleep(WAIT_S)
    return 0


if __name__ == "__main__":
    leave(lambda: work(tyro.cli(Options, description=__doc__)))
