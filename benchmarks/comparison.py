"""Every method on real commonsense questions with SmolLM2-135M, learning rates searched with the same budget.

    python benchmarks/comparison.py --data-dir LLM-Adapters             # over an hour on one core; goes on if stopped
    python benchmarks/comparison.py --data-dir LLM-Adapters --methods grass lora --steps 300 --batch-size 16   # GPU

Training rows of ARC-easy, ARC-challenge and OpenBookQA are split once, by seed: a part is held out for the search and
never trained on. Each method tries the same number of learning rates around its row's default (a factor of
sqrt(10) apart) for ``search-steps`` steps with one seed, keeps the one with the lowest loss on the held-out answers,
and trains with two other seeds for ``steps`` steps. Test questions are seen by those runs alone. Sampling periods are
scaled with the length of the training, for every method alike. Needs neither ray nor mlflow.
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

from grass_ray.config import ConfigError, FolderSource, ModelConfig, RunConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.methods import METHODS
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.provenance import build_record, git_state, hardware, now, versions
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
    search_points: Annotated[int, tyro.conf.arg(help="learning rates a method tries; odd")] = 3
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


def final(options: Options, method: str, lr: float, seed: int, split: Path) -> tuple[RunRecord, float]:
    """The record of a run with the chosen learning rate, and its loss on the test answers."""
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
    return record, loss


def summarise(options: Options, found: dict[str, Any], records: list[RunRecord]) -> str:
    """The result in Markdown: losses and learning rates, then the leaderboard with its intervals."""
    lines = [
        "| method | loss on test answers, mean of seeds | spread | learning rate | at the grid's edge | s a step |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for method, entry in found.items():
        losses = [loss for loss in entry["test_losses"].values() if math.isfinite(loss)]
        mean = statistics.fmean(losses) if losses else math.inf
        rates = list(entry["search"])
        edge = "yes" if entry["lr"] and repr(entry["lr"]) in (rates[0], rates[-1]) else "no"
        own = [r.metrics["time/train_s"] for r in records if r.config["method"]["name"] == method and entry["lr"]]
        step_s = f"{statistics.fmean(own) / options.steps:.2f}" if entry["lr"] else "-"
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-"
        rate, edge = (f"{entry['lr']:g}", edge) if entry["lr"] else ("-", "-")
        rows.append((mean, f"| {method} | {mean:.4f} | {spread} | {rate} | {edge} | {step_s} |"))
    lines += [text for _, text in sorted(rows)]
    return "\n".join(lines) + "\n\n" + render(build_leaderboard(records), "markdown")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    state = options.output / "comparison.json"
    found: dict[str, Any] = json.loads(state.read_text())["methods"] if state.exists() else {}
    commit, dirty = git_state()
    split = split_training_rows(options)
    facts = {
        "options": {key: str(value) for key, value in vars(options).items() if key not in ("data_dir", "output")},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
    }
    for method in options.methods:
        entry = found.setdefault(method, {"search": {}, "lr": None, "test_losses": {}, "commit": commit})
        started = time.perf_counter()
        if METHODS[method].trains and entry["lr"] is None:
            entry["search"] = search(options, method, split)
            entry["lr"] = float(min(entry["search"], key=entry["search"].__getitem__))
        for seed in options.seeds if METHODS[method].trains else options.seeds[:1]:
            if str(seed) in entry["test_losses"]:
                continue
            lr = entry["lr"] or METHODS[method].config.optimizer.lr
            record, entry["test_losses"][str(seed)] = final(options, method, lr, seed, split)
            record.save(options.output / f"{record.run_id}.record.json")
            state.write_text(json.dumps(facts | {"methods": found}, indent=1))
        print(f"{method}: {json.dumps(entry)} in {time.perf_counter() - started:.0f} s", flush=True)
    records = [RunRecord.load(path) for path in sorted(options.output.glob("*.record.json"))]
    heading = (
        f"# All methods on {', '.join(TASK_KEYS)}\n\n{options.model}, float32, batch {options.batch_size}, "
        f"{options.steps} steps, seeds {', '.join(map(str, options.seeds))}; learning rate: best of "
        f"{options.search_points} on {options.held_out * len(TASK_KEYS)} held-out training rows after "
        f"{options.search_steps} steps; {options.limit} test questions a task. {hardware()}, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, commit {(commit or '-')[:10]}"
        f"{' (modified)' if dirty else ''}.\n\n"
    )
    missing = [name for name in METHODS if name not in found or not found[name]["test_losses"]]
    if missing:
        heading += f"Not measured yet: {', '.join(missing)}; the same command goes on with them.\n\n"
    text = heading + summarise(options, found, records)
    (options.output / "README.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
