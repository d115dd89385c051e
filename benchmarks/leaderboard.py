"""What a leaderboard over thousands of runs costs, against only reading their records out of MLflow.

    python benchmarks/leaderboard.py                                   # 5,000 records; minutes to fill the store
    python benchmarks/leaderboard.py --records 500 --store store500    # the store is kept there and used again

The records are made up (ten methods, twenty settings each, twenty-five seeds) and lie in a SQLite store as the tracker
leaves them: a run with tags, params and metrics, and a ``record.json`` among its artifacts. Reading and building are
measured in processes of their own, in turn, so that neither warms up the other's memory: seconds without the imports,
and the peak of the process's resident memory over the imports' own.
"""

from __future__ import annotations

import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import recording
import tyro
from recording import Measure

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.results.connection import connect, default_tracking_uri
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.provenance import versions
from grass_ray.results.record import RunRecord, TaskScore
from grass_ray.results.rendering import render
from grass_ray.results.store import PARENT_TAG, iter_records, load_records
from grass_ray.training.report import LayerTrace

EXPERIMENT = "synthetic"
GOAL = 5.0  # times the time of reading
METHOD_NAMES = ("full", "lora", "dora", "lisa", "ows", "badam", "galore", "apollo", "grass-static", "grass")
Work = Literal["import", "read", "build", "build-with-steps"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to make and where to put it."""

    records: int = 5000
    questions: Annotated[int, tyro.conf.arg(help="evaluated examples a record")] = 200
    steps: Annotated[int, tyro.conf.arg(help="training steps a record; eight numbers each")] = 100
    rounds: int = 3
    store: Annotated[Path | None, tyro.conf.arg(help="folder to keep the store in; default: a temporary one")] = None
    output: Path = Path("benchmarks/results/leaderboard_5000")
    measure: Annotated[Work | None, tyro.conf.arg(help="internal: do one piece of work in this process")] = None


def main(options: Options) -> None:
    if options.measure is not None:
        assert options.store is not None
        print(json.dumps(work(options.measure, options.store)))
        return
    place = tempfile.TemporaryDirectory() if options.store is None else nullcontext(str(options.store))
    with place as name:
        store = Path(name)
        filled_s = fill(store, options)
        kinds: tuple[Work, ...] = ("import", "read", "build", "build-with-steps")
        rounds = [{kind: measure(kind, store) for kind in kinds} for _ in range(options.rounds)]
    result = summarise(options, rounds, filled_s)
    measures = [
        Measure(f"{kind} {key}", unit, [once[kind][key] for once in rounds])
        for kind in kinds[1:]
        for key, unit in (("seconds", "s"), ("peak_mib", "MiB"))
    ]
    recording.write(options.output, result, describe(result), measures=measures)


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(kind: Work, store: Path) -> dict[str, float]:
    """One piece of work in a fresh process."""
    command = [sys.executable, __file__, "--measure", kind, "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def work(kind: Work, store: Path) -> dict[str, float]:
    """Do it, and say what it took: seconds, and the peak of resident memory in MiB."""
    uri = default_tracking_uri(store)
    connect(uri)  # imports mlflow and opens the store, which every piece of work needs once
    started = time.perf_counter()
    count = 0
    if kind == "read":
        for _ in iter_records(uri, EXPERIMENT, series=False):
            count += 1
    elif kind != "import":
        records = load_records(uri, EXPERIMENT, series=kind == "build-with-steps")
        count = len(records)
        render(build_leaderboard(records), "table")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "records": count}


def summarise(options: Options, rounds: list[dict[Work, dict[str, float]]], filled_s: float) -> dict[str, Any]:
    """Medians over the rounds; the ratio is of each round's own two times."""

    def median(kind: Work, key: str) -> float:
        return statistics.median(once[kind][key] for once in rounds)

    baseline = median("import", "peak_mib")
    ratios = [once["build"]["seconds"] / once["read"]["seconds"] for once in rounds]
    return recording.facts() | {
        "records": options.records,
        "questions_a_record": options.questions,
        "steps_a_record": options.steps,
        "rounds": len(rounds),
        "fill_s": round(filled_s, 1),
        "read_s": median("read", "seconds"),
        "build_s": median("build", "seconds"),
        "build_with_steps_s": median("build-with-steps", "seconds"),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "goal": GOAL,
        "import_peak_mib": baseline,
        "read_peak_mib_above_import": median("read", "peak_mib") - baseline,
        "build_peak_mib_above_import": median("build", "peak_mib") - baseline,
        "build_with_steps_peak_mib_above_import": median("build-with-steps", "peak_mib") - baseline,
    }


def describe(result: dict[str, Any]) -> str:
    low, high = result["ratio_range"]
    rows = (
        ("read one after another", result["read_s"], result["read_peak_mib_above_import"]),
        ("read, rank and print the table", result["build_s"], result["build_peak_mib_above_import"]),
        (
            "the same with every step's numbers in memory",
            result["build_with_steps_s"],
            result["build_with_steps_peak_mib_above_import"],
        ),
    )
    table = "\n".join(f"| {what} | {seconds:.2f} | {mib:.0f} |" for what, seconds, mib in rows)
    return f"""# A leaderboard over {result["records"]:,} records

Building it takes **{result["ratio"]:.2f} times** the time of only reading the records ({low:.2f} to {high:.2f} over
{result["rounds"]} rounds; goal: under {result["goal"]:.0f} times).

| work | seconds | peak MiB above the imports' {result["import_peak_mib"]:.0f} |
| --- | ---: | ---: |
{table}

Made-up records of {result["questions_a_record"]} questions and {result["steps_a_record"]} steps in a SQLite store,
each piece of work in a process of its own, in turn; medians. {result["hardware"]}, commit
{recording.commit()},
{result["measured_at"][:10]}.
"""


# -------------------------------------------------------------------------------------------------------------- records


def fill(store: Path, options: Options) -> float:
    """Put the records into the store, unless they are there; returns the seconds it took."""
    from mlflow.entities import Metric, Param

    started = time.monotonic()
    store.mkdir(parents=True, exist_ok=True)
    client = connect(default_tracking_uri(store))
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return 0.0
    experiment = client.create_experiment(EXPERIMENT, (store.absolute() / "artifacts").as_uri())
    parent = client.create_run(experiment, tags={"sweep_id": "s", "trial_key": "(sweep)"}).info.run_id
    moment = int(time.time() * 1000)
    for number in range(options.records):
        record = make_record(number, options)
        tags = {
            PARENT_TAG: parent,
            "sweep_id": "s",
            "trial_key": str(number),
            "method": record.config["method"]["name"],
        }
        run = client.create_run(experiment, tags=tags, run_name=record.name).info
        client.log_batch(
            run.run_id,
            metrics=[Metric(key, value, moment, 0) for key, value in record.metrics.items()],
            params=[Param(key, value) for key, value in RunConfig.parse(record.config).flatten().items()],
        )
        client.log_text(run.run_id, record.model_dump_json(indent=1), "record.json")
        client.set_terminated(run.run_id)
        if number % 500 == 499:
            print(f"filled {number + 1} of {options.records} records", file=sys.stderr)
    return time.monotonic() - started


def make_record(number: int, options: Options) -> RunRecord:
    """A record as a run would leave it, the same for the same number."""
    chance = random.Random(number)
    method = METHOD_NAMES[number % len(METHOD_NAMES)]
    variant, seed = number // len(METHOD_NAMES) % 20, number // (20 * len(METHOD_NAMES))
    rate = float(f"{1e-5 * 1.3**variant:.3g}")
    config = RunConfig(method=METHODS[method].config, model=ModelConfig(name="tiny")).override(
        {"seed": seed, "method.optimizer.lr": rate, "training.steps": options.steps}
    )
    share = 0.3 + 0.02 * METHOD_NAMES.index(method) + 0.01 * variant
    correct = [chance.random() < share for _ in range(options.questions)]
    names = ("train/loss", "train/lr", "train/grad_norm", "time/step_s", "throughput/tokens_per_second",
             "memory/peak_allocated_gib", "memory/host_pinned_gib", "layers/entropy")  # fmt: skip
    series = {
        name: [(step, 2 * math.exp(-step / 40) + chance.random()) for step in range(1, options.steps + 1)]
        for name in names
    }
    accuracy = sum(correct) / len(correct)
    return RunRecord(
        run_id=f"s-{config.fingerprint}",
        name=config.name,
        sweep=EXPERIMENT,
        sweep_id="s",
        status="finished",
        config=config.to_dict(),
        metrics={
            "eval/generated/accuracy": accuracy,
            "eval/average": accuracy,
            "memory/peak_allocated_gib": 1 + 0.1 * METHOD_NAMES.index(method) + 0.01 * chance.random(),
            "memory/peak_reserved_gib": 2.0,
            "memory/host_pinned_gib": 0.1,
            "throughput/tokens_per_second": 1000 + chance.random(),
            "time/train_s": 60 + chance.random(),
        },
        series=series,
        tasks={
            "generated": TaskScore(
                accuracy=accuracy,
                num_examples=options.questions,
                correct=correct,
                example_ids=[f"{question:016x}" for question in range(options.questions)],
                scoring="generation",
                extraction="published",
            )
        },
        layers=LayerTrace(
            num_layers=4,
            units=[f"layer_{layer:02d}" for layer in range(4)],
            total_parameters=1000,
            trainable_parameters=300,
            trainable_share=0.3,
            intervals=[(step, (0, 1)) for step in range(1, options.steps, 10)],
            refreshes=[(step, (1.0,) * 4, (0.25,) * 4) for step in range(10, options.steps, 40)],
            visits=[1] * 4,
            only_active_layers_changed=True,
            resident_state_bytes=0,
            host_state_bytes=0,
        ),
        data={"train": {"rows_sha256": "0" * 64}},
        hardware="Made-up CPU, 2 cores, 24 GiB",
        versions=versions(),
        git_commit="0" * 40,
        git_dirty=False,
        started_at="2026-05-01T10:00:00.000+00:00",
        finished_at="2026-05-01T10:10:00.000+00:00",
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
