"""What a step costs inside a sweep, over the same step in a plain process, with one and two threads or trials at once.

    python benchmarks/contention.py                                  # SmolLM2-135M, full fine-tuning
    python benchmarks/contention.py --model tiny --rounds 1 --steps 4 --output /tmp/contention

In each round every case runs once in plain processes and once as a sweep on a Ray of its own, in a new order; ratios
are taken within a round. The plain processes are as many as trials run at once, started together. The environments:

- ``default``: plain processes as they are; a sweep's trials as this project starts them;
- ``passive``: threads that wait for others sleep (``OMP_WAIT_POLICY=PASSIVE``), in both;
- ``huge pages``: malloc asks for transparent huge pages (``glibc.malloc.hugetlb=1``), in both.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import recording
import torch
import tyro

from grass_ray.training.report import WARM_UP_STEPS

ENVIRONMENTS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "smollm2-135m"
    method: str = "full"
    batch_size: int = 8
    rounds: Annotated[int, tyro.conf.arg(help="interleaved rounds")] = 3
    steps: Annotated[int, tyro.conf.arg(help="timed steps of a trial")] = 8
    cpus: Annotated[int, tyro.conf.arg(help="CPUs to fill")] = os.cpu_count() or 1
    environments: tuple[str, ...] = tuple(ENVIRONMENTS)
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/contention")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Trials at once, and the threads of each, in one of ``ENVIRONMENTS``."""

    threads: int
    at_once: int
    environment: str

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.at_once} at once, {self.environment}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds: the median step of all trials, and from the start of the first process to the end of the last."""

    step_s: float
    wall_s: float


def cases(options: Options) -> list[Case]:
    """One trial of one thread, as many as there are CPUs, and one with all threads: that one in every environment."""
    one_thread = [Case(threads=1, at_once=n, environment="default") for n in sorted({1, options.cpus})]
    return one_thread + [Case(threads=options.cpus, at_once=1, environment=name) for name in options.environments]


# ------------------------------------------------------------------------------------------------ what a process does


def trials(options: Options, case: Case) -> tuple[object, list[object]]:
    from grass_ray.experiment import EvaluationConfig, Sweep, TrainingConfig
    from grass_ray.experiment.flags import SweepOptions
    from grass_ray.experiment.plan import plan_trials

    sweep = Sweep(
        name="contention",
        question="What does a step cost inside a sweep?",
        models=(options.model,),
        methods=(options.method,),
        tasks=("generated",),
        seeds=tuple(range(case.at_once)),
        training=TrainingConfig(steps=WARM_UP_STEPS + options.steps, batch_size=options.batch_size),
        evaluation=EvaluationConfig(limit=1),
    )
    return sweep, list(plan_trials(sweep, SweepOptions(base=False))[0])


def plain(options: Options, case: Case, seed: int) -> list[float]:
    """Train and evaluate one of the trials in this process; seconds of its timed steps."""
    from grass_ray.training.run import Run

    torch.set_num_threads(case.threads)
    run = Run.prepare(trials(options, case)[1][seed])  # type: ignore[arg-type]
    seconds = [report.step_s for report in run.fit()]
    run.evaluate()
    return seconds[WARM_UP_STEPS:]


def sweep(options: Options, case: Case) -> list[float]:
    """Run the trials as a sweep on a Ray of this process; seconds of all timed steps."""
    from grass_ray.commands import sweep as sweep_command
    from grass_ray.experiment.flags import SweepOptions
    from grass_ray.results.record import RunRecord

    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory(prefix="grass_ray-contention-") as folder:
        flags = SweepOptions(
            base=False,
            quiet=True,
            storage_path=folder,
            cpus_per_trial=case.threads,
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
        )
        assert sweep_command.run(trials(options, case)[0], flags) == 0, "a trial failed"  # type: ignore[arg-type]
        records = [RunRecord.load(path) for path in Path(folder).glob("contention/*/*/record.json")]
    assert len(records) == case.at_once
    return [seconds for record in records for _, seconds in record.series["time/step_s"][WARM_UP_STEPS:]]


# ------------------------------------------------------------------------------------------------------ measuring all


def measure(options: Options, case: Case, *, inside: bool) -> Cost:
    """Run a case in processes of its own."""
    environment = os.environ | ENVIRONMENTS[case.environment]
    settings = json.dumps({"options": vars(options) | {"output": None}, "case": asdict(case)})
    commands = [["sweep"]] if inside else [["plain", str(seed)] for seed in range(case.at_once)]
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--job", settings, *command], env=environment, text=True, stdout=subprocess.PIPE
        )
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in processes]
    wall = time.perf_counter() - started
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case.name} failed")
    seconds = [second for output in outputs for second in json.loads(output.strip().splitlines()[-1])]
    return Cost(step_s=statistics.median(seconds), wall_s=wall)


def measure_all(options: Options) -> dict[str, dict[str, list[Cost]]]:
    order = [(case, inside) for case in cases(options) for inside in (False, True)]
    costs: dict[str, dict[str, list[Cost]]] = {case.name: {"plain": [], "sweep": []} for case in cases(options)}
    shuffler = random.Random(0)
    for index in range(options.rounds):
        shuffler.shuffle(order)
        for case, inside in order:
            cost = measure(options, case, inside=inside)
            costs[case.name]["sweep" if inside else "plain"].append(cost)
            print(
                f"round {index + 1}/{options.rounds}  {case.name}, {'sweep' if inside else 'plain'}: {cost}", flush=True
            )
    return costs


def table(costs: dict[str, dict[str, list[Cost]]]) -> str:
    """The result in Markdown."""
    header = ["", "a step, plain", "in a sweep", "ratio: median (min-max)", "from start to end, plain", "in a sweep"]
    rows = []
    for name, taken in costs.items():
        plain_ones, inside = taken["plain"], taken["sweep"]
        ratios = [b.step_s / a.step_s for a, b in zip(plain_ones, inside, strict=True)]
        rows.append(
            [
                name,
                *(f"{statistics.median(cost.step_s for cost in ones):.2f} s" for ones in (plain_ones, inside)),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                *(f"{statistics.median(cost.wall_s for cost in ones):.0f} s" for ones in (plain_ones, inside)),
            ]
        )
    return recording.table(header, rows)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    costs = measure_all(options)
    heading = (
        f"# A step inside a sweep and in a plain process\n\n{options.method} on {options.model}, batch "
        f"{options.batch_size}, generated problems; {options.rounds} interleaved rounds, median of "
        f"{options.steps} steps a trial; {recording.made_on()}. Made by `python -m benchmarks run contention`. "
        "From start to end: with "
        "imports, loading the model, evaluation, and, in a sweep, Ray's and MLflow's own start.\n\n"
    )
    values = {
        name: {way: [asdict(cost) for cost in ones] for way, ones in ways.items()} for name, ways in costs.items()
    }
    measures = [
        measure
        for name, ways in costs.items()
        for way, ones in ways.items()
        for measure in recording.costs(ones, f"{name}, {way}", {"step_s": "s", "wall_s": "s"})
    ]
    recording.write(
        options.output, recording.facts(options) | {"costs": values}, heading + table(costs), measures=measures
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        given, what, *seed = json.loads(sys.argv[2]), *sys.argv[3:]
        asked, at = Options(**given["options"]), Case(**given["case"])
        print("\n" + json.dumps(plain(asked, at, int(seed[0])) if what == "plain" else sweep(asked, at)))
    else:
        main()
