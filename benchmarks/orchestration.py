"""What Ray Tune, Ray Train and MLflow cost: a sweep of short trials against the same trials in a loop.

    python benchmarks/orchestration.py                              # eight trials of 40 steps, the tiny model
    python benchmarks/orchestration.py --trials 2 --steps 10 --output /tmp/orchestration

The loop prepares, trains and evaluates each trial in this process, with the threads that a trial of the sweep has, and
writes nothing. The sweep does all that a sweep does. A trial's start-up is what the sweep's places held beyond the time
that its workers worked: ``(wall time x trials at once - sum of workers' times) / trials``; Ray's own start is in it.
What a checkpoint costs a trial is the difference between two trials in a sweep, one with checkpoints and one without.
Where the processor's seconds go is sampled from the process tree of the sweep, and drawn beside those of the loop.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import psutil
import recording
import torch
import tyro
from matplotlib.figure import Figure
from recording import Measure

from grass_ray.commands import sweep as sweep_command
from grass_ray.experiment import EvaluationConfig, Sweep, TrainingConfig
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import plan_trials
from grass_ray.results.record import RunRecord
from grass_ray.results.tracker import Tracker
from grass_ray.training.run import Run

PROBING_STEPS = 4
SAMPLE_EVERY_S = 0.1
KINDS = {
    "driver": "the sweep's own process",
    "trials": "processes of trials",
    "train": "Ray Train's other processes",
    "daemons": "Ray's daemons",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    trials: int = 8
    steps: int = 40
    cpus_per_trial: int = 1
    saves: Annotated[int, tyro.conf.arg(help="checkpoints to time")] = 10
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/orchestration")


def main(options: Options) -> None:
    torch.set_num_threads(options.cpus_per_trial)
    sweep = make_sweep(options, seeds=options.trials)
    values = loop(sweep) | orchestrated(sweep, options)
    values["start_up_s_a_trial"] = (
        values["sweep_s"] * values["trials_at_once"] - values["workers_s"]
    ) / options.trials  # fmt: skip
    values |= checkpointing(options) | tracking()
    write(options, values)


def make_sweep(options: Options, *, seeds: int, checkpoint_every: int | None = None) -> Sweep:
    return Sweep(
        name="orchestration",
        question="What does orchestration cost?",
        models=("tiny",),
        methods=("grass",),
        tasks=("generated",),
        seeds=tuple(range(seeds)),
        training=TrainingConfig(steps=options.steps, batch_size=4, checkpoint_every_steps=checkpoint_every),
        evaluation=EvaluationConfig(limit=8),
        method_settings={"grass": {"method.sampler.period": 10, "method.sampler.probing_steps": PROBING_STEPS}},
    )


def loop(sweep: Sweep) -> dict[str, float]:
    """The trials one after another; the first one's imports and downloads are warmed up before."""
    configs = plan_trials(sweep, SweepOptions(base=False))[0]
    Run.prepare(configs[0])
    started, worked = time.perf_counter(), time.process_time()
    for config in configs:
        run = Run.prepare(config)
        for _ in run.fit():
            pass
        run.evaluate()
    return {"loop_s": time.perf_counter() - started, "loop_cpu_s": time.process_time() - worked}


def orchestrated(sweep: Sweep, options: Options) -> dict[str, float]:
    """The same trials as a sweep, on a Ray of this process."""
    started = time.perf_counter()
    with processor_seconds() as spent:
        worked = run_sweep(sweep, options)
    wall = time.perf_counter() - started
    assert len(worked) == options.trials
    at_once = min(options.trials, max(1, (os.cpu_count() or 1) // options.cpus_per_trial))
    seconds = {f"{kind}_cpu_s": sum(spent[kind].values()) for kind in KINDS}
    return {"sweep_s": wall, "workers_s": sum(worked), "trials_at_once": at_once, **seconds}


@contextmanager
def processor_seconds() -> Iterator[dict[str, dict[int, float]]]:
    """Sample, while the block runs, the processor's seconds of this process and all below it: by kind and process."""
    spent: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    before, over = time.process_time(), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_EVERY_S):
            for process in psutil.Process().children(recursive=True):
                try:
                    title, times = " ".join(process.cmdline()), process.cpu_times()
                except psutil.Error:
                    continue
                for seconds in spent.values():  # a process is named after its work once it has some
                    seconds.pop(process.pid, None)
                spent[kind_of(title)][process.pid] = times.user + times.system

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield spent
    finally:
        over.set()
        sampler.join()
        spent["driver"][os.getpid()] = time.process_time() - before


def kind_of(title: str) -> str:
    """What a process below a sweep does, by its title."""
    if title.startswith(("ray::ImplicitFunc", "ray::RayTrainWorker")):
        return "trials"
    own = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return "train" if title.startswith("ray::") and not title.startswith(own) else "daemons"


def run_sweep(sweep: Sweep, options: Options) -> list[float]:
    """Run a sweep, and find out how many seconds the worker of each trial worked."""
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory(prefix="grass_ray-orchestration-") as folder:
        code = sweep_command.run(
            sweep,
            SweepOptions(base=False, quiet=True, storage_path=folder, cpus_per_trial=options.cpus_per_trial,
                         tracking_uri=f"sqlite:///{folder}/mlflow.db")
        )  # fmt: skip
        assert code == 0, "a trial failed"
        records = [RunRecord.load(path) for path in Path(folder).glob(f"{sweep.name}/*/*/record.json")]
    return [
        (datetime.fromisoformat(r.finished_at) - datetime.fromisoformat(r.started_at)).total_seconds() for r in records
    ]


def checkpointing(options: Options) -> dict[str, float]:
    """Seconds a checkpoint takes to write, beside those of a step; and what it costs a trial, Ray's report included."""
    run = Run.prepare(plan_trials(make_sweep(options, seeds=1), SweepOptions(base=False))[0][0])
    steps = [report.step_s for report in run.fit()]
    times = []
    with tempfile.TemporaryDirectory(prefix="grass_ray-orchestration-") as folder:
        for _ in range(options.saves):
            started = time.perf_counter()
            run.save(Path(folder) / "checkpoint")
            times.append(time.perf_counter() - started)
    every = max(1, options.steps // options.saves)
    (without,) = run_sweep(make_sweep(options, seeds=1), options)
    (with_them,) = run_sweep(make_sweep(options, seeds=1, checkpoint_every=every), options)
    reported = -(-(options.steps + PROBING_STEPS) // every)  # of all steps, those that only measure included
    return {
        "step_s": statistics.median(steps),
        "checkpoint_s": statistics.median(times),
        "checkpoint_in_a_sweep_s": (with_them - without) / reported,
    }


def tracking(steps: int = 100, metrics: int = 12) -> dict[str, float]:
    """Seconds a step's metrics take to reach a SQLite store in the driver: one call a step, and ten steps a call."""
    costs = {}
    with tempfile.TemporaryDirectory(prefix="grass_ray-orchestration-") as folder:
        tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "orchestration")
        tracker.open()
        for at_once in (1, 10):
            run = tracker.start_trial("s", f"by {at_once}", f"by-{at_once}", {}, {})
            started = time.perf_counter()
            for first in range(1, steps + 1, at_once):
                rows = [(n, {f"train/m{i}": float(n) for i in range(metrics)}) for n in range(first, first + at_once)]
                tracker.log_steps(run, rows)
            costs[f"tracking_s_a_step_by_{at_once}"] = (time.perf_counter() - started) / steps
        assert tracker.close() == 0
    return costs


def draw(values: dict[str, float], path: Path) -> None:
    """Two bars: the processor's seconds of the loop, and of the sweep by what its processes are."""
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(["a loop"], [values["loop_cpu_s"]], color="0.6")
    left = 0.0
    for kind, name in KINDS.items():
        seconds = values[f"{kind}_cpu_s"]
        axes.barh(["a sweep"], [seconds], left=left, label=f"{name}, {seconds:.0f} s")
        left += seconds
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the processor")
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=150)


def write(options: Options, values: dict[str, float]) -> None:
    rows = {
        "trials one after another in a loop": f"{values['loop_s']:.1f} s",
        "the same trials as a sweep": f"{values['sweep_s']:.1f} s, {values['trials_at_once']:.0f} at once",
        "start-up of a trial in the sweep": f"{values['start_up_s_a_trial']:.1f} s",
        "processor, the loop": f"{values['loop_cpu_s']:.1f} s",
        **{f"processor, the sweep: {name}": f"{values[f'{kind}_cpu_s']:.1f} s" for kind, name in KINDS.items()},
        "a training step": f"{1000 * values['step_s']:.1f} ms",
        "a checkpoint, written": f"{1000 * values['checkpoint_s']:.1f} ms",
        "a checkpoint, reported to the driver": f"{values['checkpoint_in_a_sweep_s']:.2f} s of its trial",
        "tracking a step, one call a step": f"{1000 * values['tracking_s_a_step_by_1']:.1f} ms in the driver",
        "tracking a step, ten steps a call": f"{1000 * values['tracking_s_a_step_by_10']:.1f} ms in the driver",
    }
    lines = [
        "# What orchestration costs",
        "",
        f"{options.trials} trials of {options.steps} steps of the tiny model, {options.cpus_per_trial} CPU(s) a trial; "
        f"{recording.made_on()}. Made by `python benchmarks/orchestration.py`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        f"![Where the processor's seconds go]({options.output.with_suffix('.png').name})",
    ]
    recording.write(
        options.output,
        {"about": recording.facts(options), "values": values},
        "\n".join(lines),
        measures=[Measure(name, "s", [value]) for name, value in values.items() if name != "trials_at_once"],
        draw=lambda path: draw(values, path),
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
