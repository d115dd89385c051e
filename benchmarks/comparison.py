"""Every method on real commonsense questions with SmolLM2-135M, learning rates searched with the same budget.

    python benchmarks/comparison.py --data-dir LLM-Adapters             # two hours on one core; goes on if stopped
    python benchmarks/comparison.py --data-dir LLM-Adapters --methods grass lora --steps 300 --batch-size 16   # GPU

Training rows of ARC-easy, ARC-challenge and OpenBookQA are split once, by seed: a part is held out for the search and
never trained on. Each method tries the same number of learning rates around its row's default (a factor of
sqrt(10) apart) for ``search-steps`` steps with one seed, keeps the one with the lowest loss on the held-out answers,
and trains with two other seeds for ``steps`` steps. Test questions are seen by those runs alone. Sampling periods are
scaled with the length of the training, for every method alike. Needs neither ray nor mlflow.

Every search and every run has a file of its own in the output folder, so several processes with other ``--methods``
may share the work; ``settings.yaml`` (the rates found) is read by every sweep's ``--settings``.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import yaml

from grass_ray.config import ConfigError, FolderSource, ModelConfig, RunConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.methods import METHODS
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import write_summary
from grass_ray.results.provenance import build_record, now
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.tasks.folder import DataFolder
from grass_ray.tasks.suites import TASKS
from grass_ray.training.batches import Batches
from grass_ray.training.loop import summed_loss
from grass_ray.training.report import TrainingFailure
from grass_ray.training.run import Run

TASK_KEYS = ("arc_easy", "arc_challenge", "openbookqa")
STEP_FACTOR = math.sqrt(10)
SEARCH_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    data_dir: Annotated[Path, tyro.conf.arg(help="folder in the published layout")]
    methods: tuple[str, ...] = tuple(METHODS)
    model: str = "smollm2-135m"
    steps: int = 30
    search_steps: int = 15
    search_points: Annotated[int, tyro.conf.arg(help="learning rates a method tries; odd")] = 5
    seeds: tuple[int, ...] = (1, 2)
    batch_size: int = 4
    held_out: Annotated[int, tyro.conf.arg(help="training rows a task that only the search sees")] = 16
    limit: Annotated[int, tyro.conf.arg(help="test questions a task")] = 32
    threads: int | None = None
    output: Path = Path("benchmarks/results/comparison")


def split_training_rows(options: Options) -> Path:
    """Write the published files with the training rows split: held-out rows play the test set of the search."""
    source, folder = DataFolder(str(options.data_dir)), options.output / "split"
    for key in TASK_KEYS:
        file = source.find_task_file(TASKS[key], "train")
        if file is None:
            raise ConfigError(f"{options.data_dir} has no training rows of {key}; it holds {source.describe()}")
        rows = json.loads(file.read_text(encoding="utf-8"))
        order = torch.randperm(len(rows), generator=keyed_generator("held-out", key)).tolist()
        target = folder / "dataset" / TASKS[key].folder
        target.mkdir(parents=True, exist_ok=True)
        for name, chosen in (("test", order[: options.held_out]), ("train", order[options.held_out :])):
            (target / f"{name}.json").write_text(json.dumps([rows[index] for index in sorted(chosen)]))
    return folder


def configure(options: Options, method: str, steps: int, lr: float, seed: int, source: Path) -> RunConfig:
    """The run of one method, with sampling periods a sixth of the training and refreshes a third."""
    row = METHODS[method].config
    sampler = row.sampler.model_dump()
    settings = [
        f"training.steps={steps if METHODS[method].trains else 0}",
        f"training.batch_size={options.batch_size}",
        f"training.warmup_steps={max(1, steps // 10)}",
        f"method.optimizer.lr={lr!r}",
        f"evaluation.limit={options.limit}",
    ]
    if (sampler.get("period") or 0) > 1:
        settings.append(f"method.sampler.period={max(1, steps // 6)}")
    if sampler["kind"] == "grad_norm":
        settings.append(f"method.sampler.probing_steps={max(1, steps // 10)}")
    if sampler["kind"] == "grad_norm" and sampler["refresh_period"]:
        settings.append(f"method.sampler.refresh_period={max(1, steps // 3)}")
    config = RunConfig(method=row, model=ModelConfig(name=options.model), seed=seed)
    data = config.data.model_copy(
        update={"suite": "commonsense", "tasks": TASK_KEYS, "source": FolderSource(path=str(source))}
    )
    return config.model_copy(update={"data": data}).override(settings)


@torch.no_grad()
def answer_loss(run: Run, rows: Any) -> float:
    """Mean cross-entropy of the answers' tokens over ``rows``, in nats."""
    batches = Batches(
        rows, run.tokenizer, run.config.data, batch_size=len(rows), accumulation_steps=len(rows) // 8, seed=0
    )
    run.state.model.eval()
    micro_batches = batches[0]
    total = sum(float(summed_loss(run.state.model, batch.to(run.state.device))) for batch in micro_batches)
    return total / sum(batch.num_labels for batch in micro_batches)


def read_rows(folder: Path, split: str, limit: int) -> list[Any]:
    """The first rows of every task's file of ``split``, as many as make whole groups of eight."""
    source = DataFolder(str(folder))
    rows: list[Any] = []
    for key in TASK_KEYS:
        file = source.find_task_file(TASKS[key], split)  # type: ignore[arg-type]
        assert file is not None
        rows += source.read(file, TASKS[key])[0][:limit]
    return rows[: len(rows) // 8 * 8]


def train(run: Run) -> str | None:
    """Train to the end; the reason when that fails."""
    try:
        for _ in run.fit():
            pass
    except TrainingFailure as failure:
        return failure.reason
    return None


def search(options: Options, method: str, split: Path) -> dict[str, float]:
    """Loss on the held-out answers by learning rate; infinite where training failed."""
    if not METHODS[method].trains:
        return {}
    default = METHODS[method].config.optimizer.lr
    half = options.search_points // 2
    rows = read_rows(split, "test", options.held_out)
    losses = {}
    for exponent in range(-half, half + 1):
        lr = float(f"{default * STEP_FACTOR**exponent:.3g}")
        run = Run.prepare(configure(options, method, options.search_steps, lr, SEARCH_SEED, split))
        losses[repr(lr)] = math.inf if train(run) else answer_loss(run, rows)
    return losses


def final(options: Options, method: str, lr: float, seed: int, split: Path) -> RunRecord:
    """The record of a run with the chosen learning rate, with its loss on the test answers."""
    started_at = now()
    config = configure(options, method, options.steps, lr, seed, split)
    run = Run.prepare(config)
    failure = train(run)
    loss = math.nan
    if failure is None:
        loss = answer_loss(run, read_rows(options.data_dir, "test", options.limit))
        # the split holds the training rows; questions of the published test sets are asked now
        asked = config.data.model_copy(update={"source": FolderSource(path=str(options.data_dir))})
        run.config = config.model_copy(update={"data": asked})
        run.evaluate()
        run.config = config
    record = build_record(
        run_id=f"{method}-s{seed}",
        sweep="comparison",
        sweep_id="comparison",
        config=config,
        status="finished" if failure is None else "failed",
        failure=failure,
        outcome=run.outcome(),
        started_at=started_at,
    )
    record.metrics["test/answer_loss"] = loss
    return record


def summarise(options: Options, found: dict[str, dict[str, float]], records: list[RunRecord]) -> str:
    """The result in Markdown: losses and learning rates, then the leaderboard with its intervals."""
    lines = [
        "| method | test answer loss, mean of seeds | spread | learning rate | at the edge | held-out loss by rate |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for method in METHODS:
        losses = [record.metrics["test/answer_loss"] for record in records if record.config["method"]["name"] == method]
        if not losses:
            continue
        mean = statistics.fmean(losses)
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-"
        rate = edge = searched = "-"
        if tried := found.get(method):
            best = min(tried, key=tried.__getitem__)
            rate, edge = best, "yes" if best in (next(iter(tried)), list(tried)[-1]) else "no"
            searched = ", ".join(f"{lr}: {loss:.3f}" for lr, loss in tried.items())
        rows.append((mean, f"| {method} | {mean:.4f} | {spread} | {rate} | {edge} | {searched} |"))
    lines += [text for _, text in sorted(rows)]
    return "\n".join(lines) + "\n\n" + render(build_leaderboard(records), "markdown")


def search_once(options: Options, method: str, split: Path) -> float:
    """The learning rate of a method: from its file, or searched now and written there."""
    file = options.output / "search" / f"{method}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(search(options, method, split), indent=1) + "\n")
    found: dict[str, float] = json.loads(file.read_text())
    return float(min(found, key=found.__getitem__)) if found else METHODS[method].config.optimizer.lr


def write_results(options: Options) -> str:
    """Rates, table, page and pictures from the files of all searches and runs so far; returns the table."""
    files = sorted((options.output / "search").glob("*.json"))
    found = {file.stem: json.loads(file.read_text()) for file in files}
    settings = {
        method: [f"method.optimizer.lr={min(tried, key=tried.__getitem__)}"] for method, tried in found.items() if tried
    }
    (options.output / "settings.yaml").write_text(yaml.safe_dump({"methods": settings}), encoding="utf-8")
    records = [RunRecord.load(path) for path in sorted((options.output / "records").glob("*.json"))]
    first = records[0]
    heading = (
        f"# All methods on {', '.join(TASK_KEYS)}\n\n{options.model}, float32, batch {options.batch_size}, "
        f"{options.steps} steps, seeds {', '.join(map(str, options.seeds))}; learning rate: best of "
        f"{options.search_points} on {options.held_out * len(TASK_KEYS)} held-out training rows after "
        f"{options.search_steps} steps; {options.limit} test questions a task. {first.hardware}; "
        f"torch {first.versions['torch']}, commit {(first.git_commit or '-')[:10]}.\n\n"
    )
    done = {record.config["method"]["name"] for record in records}
    if missing := [name for name in METHODS if name not in done]:
        heading += f"Not measured yet: {', '.join(missing)}; the same command goes on with them.\n\n"
    text = heading + summarise(options, found, records)
    (options.output / "README.md").write_text(text + "\n", encoding="utf-8")
    tables = build_leaderboard(records)
    write_summary(records, tables, options.output)
    (options.output / "leaderboard.html").write_text(render(tables, "html", records=records), encoding="utf-8")
    return text


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    places = options.output / "records"
    places.mkdir(parents=True, exist_ok=True)
    split = split_training_rows(options)
    for method in options.methods:
        started = time.perf_counter()
        lr = search_once(options, method, split) if METHODS[method].trains else METHODS[method].config.optimizer.lr
        for seed in options.seeds if METHODS[method].trains else options.seeds[:1]:
            place = places / f"{method}-s{seed}.json"
            if not place.exists():
                place.write_text(final(options, method, lr, seed, split).model_dump_json() + "\n", encoding="utf-8")
        print(f"{method}: {time.perf_counter() - started:.0f} s", flush=True)
    print(write_results(options))


if __name__ == "__main__":
    main()
