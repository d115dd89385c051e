"""Every method on real questions with SmolLM2-135M, learning rates searched with the same budget.

    python benchmarks/comparison.py --data-dir LLM-Adapters --threads 1              # goes on where it stopped
    python benchmarks/comparison.py --data-dir LLM-Adapters --tasks gsm8k addsub --methods grass lora

Each method tries the same number of learning rates around its row's default (a factor of sqrt(10) apart) for
``search-steps`` steps with one seed, keeps the one with the lowest loss on held-out training rows, and trains with two
other seeds for ``steps`` steps. Test questions are seen by those runs alone. Sampling periods are scaled with the
length of the training, for every method alike. Needs neither ray nor mlflow.

Every search and every run has a file of its own in the output folder, so several processes with other ``--methods``
may share the work; ``--no-speed`` then leaves their speed out of the records, ``--no-results`` the tables to the last
call. ``settings.yaml`` (the rates found) is read by every sweep's ``--settings``.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from grass_ray.config import FolderSource, ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import write_summary
from grass_ray.results.provenance import build_record, now
from grass_ray.results.rate_search import (
    ANSWER_LOSS,
    SEARCH,
    SETTINGS,
    load_rate_searches,
    rate_table,
    render_settings,
)
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import RECORDS, read_records
from grass_ray.results.rendering import render
from grass_ray.tasks.sources import load_test_rows
from grass_ray.tasks.suites import resolve_tasks
from grass_ray.training.batches import Batches
from grass_ray.training.report import TrainingFailure
from grass_ray.training.run import Run
from grass_ray.training.validation import answer_loss

STEP_FACTOR = math.sqrt(10)
SEARCH_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    data_dir: Annotated[Path, tyro.conf.arg(help="folder in the published layout")]
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(help="of one suite; those with a train set are trained on")] = (
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    )
    methods: tuple[str, ...] = tuple(METHODS)
    model: str = "smollm2-135m"
    steps: int = 30
    search_steps: int = 15
    search_points: Annotated[int, tyro.conf.arg(help="learning rates a method tries; odd")] = 5
    seeds: tuple[int, ...] = (1, 2)
    batch_size: int = 4
    held_out: Annotated[int, tyro.conf.arg(help="training rows that judge the search and are never trained on")] = 48
    limit: Annotated[int, tyro.conf.arg(help="test questions a task")] = 32
    evaluation_batch_size: int = 16
    max_length_tokens: int = 256
    max_train_rows: int | None = None
    threads: int | None = None
    matmul_precision: Annotated[Literal["highest", "high"], tyro.conf.arg(help="high: TF32 on a GPU")] = "highest"
    speed: Annotated[bool, tyro.conf.arg(help="keep speed in the records")] = True
    results: Annotated[bool, tyro.conf.arg(help="write tables and pictures of all files at the end")] = True
    output: Path = Path("benchmarks/results/comparison")


def configure(options: Options, method: str, steps: int, lr: float, seed: int) -> RunConfig:
    """The run of one method, with sampling periods a sixth of the training and refreshes a third."""
    row = METHODS[method].config
    sampler = row.sampler.model_dump()
    settings = [
        f"training.steps={steps if METHODS[method].trains else 0}",
        f"training.batch_size={options.batch_size}",
        f"training.warmup_steps={max(1, steps // 10)}",
        f"method.optimizer.lr={lr!r}",
        f"data.validation_rows={options.held_out}",
        f"data.max_length_tokens={options.max_length_tokens}",
        f"data.max_train_rows={options.max_train_rows or 'null'}",
        f"evaluation.limit={options.limit}",
        f"evaluation.batch_size={options.evaluation_batch_size}",
    ]
    if (sampler.get("period") or 0) > 1:
        settings.append(f"method.sampler.period={max(1, steps // 6)}")
    if sampler["kind"] == "grad_norm":
        settings.append(f"method.sampler.probing_steps={max(1, steps // 10)}")
    if sampler["kind"] == "grad_norm" and sampler["refresh_period"]:
        settings.append(f"method.sampler.refresh_period={max(1, steps // 3)}")
    config = RunConfig(method=row, model=ModelConfig(name=options.model), seed=seed)
    suite, tasks = resolve_tasks(options.tasks)
    source = FolderSource(path=str(options.data_dir))
    data = config.data.model_copy(update={"suite": suite, "tasks": tasks, "source": source})
    return config.model_copy(update={"data": data}).override(parse(settings))


def test_loss(run: Run, options: Options) -> float:
    """Mean cross-entropy in nats over the answers of the first task's test questions."""
    rows = load_test_rows(run.config.data.tasks[0], run.config.data).rows[: options.limit]
    batches = Batches(rows, run.tokenizer, run.config.data, batch_size=1, accumulation_steps=1, seed=0)
    return answer_loss(run.state.model, batches, run.state.device)


def train(run: Run) -> str | None:
    """Train to the end; the reason when that fails."""
    try:
        for _ in run.fit():
            pass
    except TrainingFailure as failure:
        return failure.reason
    return None


def search(options: Options, method: str) -> dict[str, float]:
    """Loss on the held-out rows by learning rate; infinite where training failed."""
    if not METHODS[method].trains:
        return {}
    default = METHODS[method].config.optimizer.lr
    half = options.search_points // 2
    losses = {}
    for exponent in range(-half, half + 1):
        lr = float(f"{default * STEP_FACTOR**exponent:.3g}")
        run = Run.prepare(configure(options, method, options.search_steps, lr, SEARCH_SEED))
        losses[repr(lr)] = math.inf if train(run) else run.validate()
    return losses


def final(options: Options, method: str, lr: float, seed: int) -> RunRecord:
    """The record of a run with the chosen learning rate, with its loss on test answers."""
    started_at = now()
    run = Run.prepare(configure(options, method, options.steps, lr, seed))
    failure = train(run)
    loss = math.nan
    if failure is None:
        run.evaluate()
        loss = test_loss(run, options)
    record = build_record(
        run_id=f"{method}-s{seed}",
        sweep="comparison",
        sweep_id="comparison",
        config=run.config,
        status="finished" if failure is None else "failed",
        failure=failure,
        outcome=run.outcome(),
        started_at=started_at,
    )
    record.metrics[ANSWER_LOSS] = loss
    if not options.speed:
        record.metrics = {
            name: value for name, value in record.metrics.items() if not name.startswith(("throughput/", "time/"))
        }
    return record


def search_once(options: Options, method: str) -> float:
    """The learning rate of a method: from its file, or searched now and written there."""
    file = options.output / SEARCH / f"{method}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(search(options, method), indent=1) + "\n")
    return next(float(search.best) for search in load_rate_searches(options.output) if search.method == method)


def write_results(options: Options) -> str:
    """Rates, table, page and pictures from the files of all searches and runs so far; returns the table."""
    searches = load_rate_searches(options.output)
    (options.output / SETTINGS).write_text(render_settings(searches), encoding="utf-8")
    records = read_records(options.output)
    first = records[0]
    precision = "float32" if options.matmul_precision == "highest" else "float32 with TF32 products"
    heading = (
        f"# All methods on {', '.join(options.tasks)}\n\n{options.model}, {precision}, batch {options.batch_size}, "
        f"{options.steps} steps on {(first.data or {})['train']['description']}, "
        f"seeds {', '.join(map(str, options.seeds))}; learning rate: best of "
        f"{options.search_points} on {options.held_out} held-out training rows after {options.search_steps} steps; "
        f"at most {options.limit} test questions a task. {first.hardware}; "
        f"torch {first.versions['torch']}, commit {(first.git_commit or '-')[:10]}.\n\n"
    )
    done = {record.config["method"]["name"] for record in records}
    if missing := [name for name in METHODS if name not in done]:
        heading += f"Not measured yet: {', '.join(missing)}; the same command goes on with them.\n\n"
    tables = build_leaderboard(records)
    text = heading + "\n".join([*rate_table(records, searches), "", render(tables, "markdown")])
    (options.output / "README.md").write_text(text + "\n", encoding="utf-8")
    write_summary(records, tables, options.output)
    (options.output / "leaderboard.html").write_text(render(tables, "html", records=records), encoding="utf-8")
    return text


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    places = options.output / RECORDS
    places.mkdir(parents=True, exist_ok=True)
    for method in options.methods:
        started = time.perf_counter()
        lr = search_once(options, method) if METHODS[method].trains else METHODS[method].config.optimizer.lr
        for seed in options.seeds if METHODS[method].trains else options.seeds[:1]:
            place = places / f"{method}-s{seed}.json"
            if not place.exists():
                place.write_text(final(options, method, lr, seed).model_dump_json() + "\n", encoding="utf-8")
        print(f"{method}: {time.perf_counter() - started:.0f} s", flush=True)
    if options.results:
        print(write_results(options))


if __name__ == "__main__":
    main()
