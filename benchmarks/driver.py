"""What a sweep of thousands of trials costs its driver: trials that only replay the reports of a recorded run.

    python benchmarks/driver.py                                       # 2,000 trials; an hour or so on two cores
    python benchmarks/driver.py --trials 200 --every 20 --output /tmp/driver

One run of the tiny model is carried out and all that it reports is kept. Then a sweep of many learning rates and seeds
runs as always (Ray Tune, MLflow, the leaderboard, the progress lines) but for the worker's work: it sends the kept
reports and writes the kept record under its own name. Every so many trials the driver's resident memory, the
processor's seconds it took, its statements that write into MLflow's database, and the seconds spent on the leaderboard
are noted. At the end ``--resume`` of the finished sweep is run in a process of its own.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import recording
import tyro
from matplotlib.figure import Figure
from recording import Measure

from grass_ray.cluster import runner, tuner
from grass_ray.cluster.job import RECORD_FILE, Job
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.storage import Storage
from grass_ray.commands import sweep as sweep_command
from grass_ray.experiment import EvaluationConfig, Sweep, TrainingConfig
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import plan_trials
from grass_ray.results.overview import Overview
from grass_ray.results.record import RunRecord

KEPT = "recorded.json.gz"
SEEDS = 10
METHODS = ("full", "lora", "lisa", "badam", "grass")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many trials, and how often to note."""

    trials: int = 2000
    every: Annotated[int, tyro.conf.arg(help="trials between two notes")] = 100
    steps: Annotated[int, tyro.conf.arg(help="training steps of the recorded run")] = 100
    output: Path = Path("benchmarks/results/driver")
    folder: Annotated[Path | None, tyro.conf.arg(help="keep the sweep here; default: a temporary folder")] = None
    part: Annotated[Literal["record", "resume"] | None, tyro.conf.arg(help="internal: only this, in the folder")] = None


@dataclass(kw_only=True)
class Notes:
    """What the driver took, as it was after so many trials."""

    every: int
    rows: list[dict[str, float]] = field(default_factory=list)
    writes: int = 0
    leaderboard_s: float = 0.0
    leaderboards: int = 0
    ended: int = 0

    def note(self) -> None:
        """Add a row."""
        self.rows.append(
            {
                "trials": self.ended,
                "driver_mib": psutil.Process().memory_info().rss / 2**20,
                "driver_cpu_s": time.process_time(),
                "wall_s": time.monotonic(),
                "writes": self.writes,
                "leaderboard_s": self.leaderboard_s,
                "leaderboards": self.leaderboards,
            }
        )
        print(f"{self.ended} trials: {self.rows[-1]}", file=sys.stderr, flush=True)


def make_sweep(options: Options) -> Sweep:
    """Five methods, ten seeds, and as many learning rates as make the trials."""
    rates = max(1, options.trials // (SEEDS * len(METHODS)))
    return Sweep(
        name="driver",
        question="What do thousands of trials cost the driver?",
        models=("tiny",),
        methods=METHODS,
        tasks=("generated",),
        seeds=tuple(range(SEEDS)),
        training=TrainingConfig(steps=options.steps, batch_size=4),
        evaluation=EvaluationConfig(limit=40),
        grid={"method.optimizer.lr": [float(f"{1e-5 * 1.1**place:.3g}") for place in range(rates)]},
    )


def record_run(options: Options, folder: Path) -> None:
    """Carry out one trial, alone, and keep its record and the steps that it reported."""
    from grass_ray.cluster.listeners import steps_of
    from grass_ray.execute import RunContext, execute

    config = plan_trials(make_sweep(options), SweepOptions(base=False))[0][-1]
    record = execute(config).record(RunContext(sweep="driver", sweep_id="recorded", run_id="recorded"))
    kept = {"record": record.model_dump(mode="json"), "steps": steps_of(record.series)}
    with gzip.open(folder / KEPT, "wt") as file:
        json.dump(kept, file)


def replay(params: dict[str, Any], kept: Path) -> None:
    """The work of a trial: send what was reported, write what was recorded."""
    import ray.tune

    job = Job.model_validate(params["job"])
    with gzip.open(kept, "rt") as file:
        found = json.load(file)
    storage = Storage(job.context.storage)
    storage.write_text(job.config.to_yaml(), job.folder, "config.yaml")
    steps = found["steps"]
    half = len(steps) // 2
    for part in (steps[:half], steps[half:]):
        view = {"step": part[-1][0], "total_steps": steps[-1][0], "loss": 1.0}
        view |= {"tokens_per_second": 1000.0, "peak_gib": 0.1, "active_layers": []}
        ray.tune.report({"phase": "training", "steps": part, "view": view})
    ray.tune.report({"phase": "evaluating", "steps": [], "view": {"task": "generated", "done": 20, "total": 40}})
    record = RunRecord.model_validate(found["record"]).model_copy(
        update={
            "run_id": job.run_context.run_id,
            "name": job.config.name,
            "sweep_id": job.context.sweep_id,
            "config": job.config.to_dict(),
        }
    )
    storage.write_text(record.model_dump_json(indent=1), job.folder, RECORD_FILE)
    ray.tune.report({"phase": "ended", "status": "finished", "failure": None, "steps": []})


def watch(notes: Notes) -> None:
    """Note what happens in this process: trials that end, statements that write, leaderboards."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "before_cursor_execute")
    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        notes.writes += statement.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE")

    class Watched(TrialStore):
        def end(self, key: str, failure: str | None, error: str = "", *, earlier: bool = False) -> None:
            super().end(key, failure, error, earlier=earlier)
            notes.ended += 1
            if notes.ended % notes.every == 0:
                notes.note()

    class Timed(Overview):
        def update(self, *given: Any) -> Any:
            started = time.process_time()
            try:
                return super().update(*given)
            finally:
                notes.leaderboard_s += time.process_time() - started
                notes.leaderboards += 1

    runner.TrialStore, runner.Overview = Watched, Timed


def run_sweep(options: Options, folder: Path) -> Notes:
    """The sweep, or what is left of it."""
    notes = Notes(every=options.every)
    watch(notes)
    tuner.single_worker = functools.partial(replay, kept=folder / KEPT)
    os.environ["RAY_ADDRESS"] = "local"
    notes.note()
    place = {"storage_path": str(folder), "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    asked = SweepOptions(
        base=False, quiet=True, cpus_per_trial=1, memory_check=False, resume=options.part == "resume", **place
    )
    code = sweep_command.run(make_sweep(options), asked)
    assert code == 0, "a trial failed"
    notes.note()
    return notes


def part(name: str, options: Options, folder: Path) -> float:
    """The processor's seconds of a part in a process of its own."""
    words = ["--trials", str(options.trials), "--steps", str(options.steps), "--every", str(options.trials + 1)]
    command = [sys.executable, __file__, *words, "--folder", str(folder), "--part", name]
    with (folder / f"{name}.txt").open("wb") as said:
        ended = recording.run_process(command, stdout=said, stderr=said)
    assert ended.code == 0, (folder / f"{name}.txt").read_text()
    return ended.processor_s


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(prefix="grass_ray-driver-") as scratch:
        folder = (options.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if options.part == "record":
            record_run(options, folder)
        elif options.part == "resume":
            run_sweep(options, folder)
        if options.part is not None:
            return
        part("record", options, folder)
        notes = run_sweep(options, folder)
        resumed = part("resume", options, folder)
    write(options, notes, resumed)


def write(options: Options, notes: Notes, resumed: float) -> None:
    """Table and picture: what each hundred of trials cost."""
    rows = []
    for before, after in zip(notes.rows[:-1], notes.rows[1:], strict=True):
        count = after["trials"] - before["trials"]
        if count:
            share = {key: (after[key] - before[key]) / count for key in after if key != "trials"}
            rows.append({"trials": after["trials"], "driver_mib": after["driver_mib"]} | {
                f"{key}_a_trial": value for key, value in share.items() if key != "driver_mib"
            })  # fmt: skip
    table = recording.table(
        ["trials", "driver MiB", "driver s a trial", "of these the leaderboard", "wall s a trial", "writes a trial"],
        [
            [
                f"{row['trials']:.0f}",
                f"{row['driver_mib']:.0f}",
                f"{row['driver_cpu_s_a_trial']:.3f}",
                f"{row['leaderboard_s_a_trial']:.3f}",
                f"{row['wall_s_a_trial']:.2f}",
                f"{row['writes_a_trial']:.1f}",
            ]
            for row in rows
        ],
    )
    page = (
        f"# The driver over {options.trials:,} trials\n\nTrials of {options.steps} steps that replay the reports of "
        f"one recorded run: {len(METHODS)} methods, {SEEDS} seeds, all rates in one leaderboard; SQLite. Seconds "
        f"of the processor in the driver alone, writes: statements that change MLflow's database. "
        f"{recording.made_on()}.\n\n{table}\n\n`--resume` of the finished sweep, a whole process: {resumed:.1f} s of "
        f"the processor.\n\n![Per trial, as the sweep grows]({options.output.with_suffix('.png').name})"
    )
    last = rows[-1]
    measures = [Measure(key, "MiB" if key == "driver_mib" else "s", [last[key]]) for key in last if key != "trials"]
    values = recording.facts(options) | {"notes": asdict(notes), "rows": rows, "resume_s": resumed}
    recording.write(
        options.output,
        values,
        page,
        measures=[*measures, Measure("resume", "s", [resumed])],
        draw=lambda path: draw(rows, path),
    )


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Memory, seconds and writes over the number of trials."""
    what = {
        "driver_mib": "driver, MiB",
        "driver_cpu_s_a_trial": "driver, s a trial",
        "writes_a_trial": "writes a trial",
    }
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (key, name) in zip(figure.subplots(1, len(what)), what.items(), strict=True):
        axes.plot([row["trials"] for row in rows], [row[key] for row in rows], marker="o", markersize=3)
        axes.set(title=name, xlabel="trials")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
