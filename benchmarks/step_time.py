"""Step time of every method relative to full fine-tuning, interleaved in one process.

    python benchmarks/step_time.py                       # SmolLM2-135M, batch 8, on whatever device there is
    python benchmarks/step_time.py --model tiny --rounds 1 --steps 4 --output /tmp/step_time

Machines drift, so every method takes a few steps in turn, round after round in a new order, and ratios are taken
within a round. A step's time is the wall clock around one item of ``fit``: measuring, sampling, switching, moving
states and proving the engagement are all in it. ``bare`` is what a layer-wise method could cost at best: a plain loop
over torch's fused AdamW on just the layers that grass trains in that round, nothing measured, nothing drawn.
Needs neither ray nor mlflow.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.results.provenance import git_state, hardware, versions
from grass_ray.training.loop import WARM_UP_STEPS, accumulate_gradients
from grass_ray.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "smollm2-135m"
    methods: tuple[str, ...] = ("full", "lora", "lisa", "grass", "grass-static")
    rounds: Annotated[int, tyro.conf.arg(help="interleaved rounds")] = 6
    steps: Annotated[int, tyro.conf.arg(help="steps a method takes in a round; also the layers' sampling period")] = 5
    batch_size: int = 8
    threads: Annotated[int | None, tyro.conf.arg(help="CPU threads; default: torch's own")] = None
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/step_time")


def prepare(method: str, options: Options) -> Run:
    """A run that is past probing and past the steps that are watched for memory."""
    settings = [
        f"training.steps={WARM_UP_STEPS + (options.rounds + 2) * options.steps}",
        f"training.batch_size={options.batch_size}",
    ]
    sampler = METHODS[method].config.sampler.model_dump()
    if "period" in sampler:
        settings.append(f"method.sampler.period={options.steps}")
    if sampler.get("refresh_period"):
        settings.append(f"method.sampler.refresh_period={2 * options.steps}")
    if "probing_steps" in sampler:
        settings.append("method.sampler.probing_steps=1")
    config = RunConfig(method=METHODS[method].config, model=ModelConfig(name=options.model)).override(settings)
    return Run.prepare(config)


def take_steps(reports: Iterator[object], count: int) -> list[float]:
    """Wall-clock seconds of each of the next ``count`` steps, everything included."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        next(reports)
        seconds.append(time.perf_counter() - started)
    return seconds


class BareLoop:
    """A plain loop over the layers that another run has active."""

    def __init__(self, options: Options) -> None:
        self.run = prepare("full", options)
        self._step = 0

    def steps(self, active_layers: tuple[int, ...], count: int) -> list[float]:
        """Seconds of ``count`` plain steps on ``active_layers``; making the optimizer is not counted."""
        state = self.run.state
        layers = state.optimizer.stack.layers
        for parameter in state.model.parameters():
            parameter.requires_grad_(False)
        trained = [p for index in active_layers for p in layers[index]]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            accumulate_gradients(state.model, state.batches[self._step], state.device)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if state.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            self._step += 1
        return seconds


def measure(options: Options) -> dict[str, list[list[float]]]:
    """Seconds of every step by method and round."""
    runs = {method: prepare(method, options) for method in options.methods}
    bare = BareLoop(options)
    reports = {method: run.fit() for method, run in runs.items()}
    for method, run in runs.items():
        while run.state.trained < WARM_UP_STEPS:
            next(reports[method])
        # come to the beginning of a sampling period, so that a round has one active set
        while run.state.trained % options.steps:
            next(reports[method])
    bare.run.state.model.train()
    order = [*options.methods, "bare"]
    shuffler = random.Random(0)
    seconds: dict[str, list[list[float]]] = {name: [] for name in order}
    for index in range(options.rounds):
        shuffler.shuffle(order)
        active = runs["grass"].state.optimizer.active_layers if "grass" in runs else (0, 1)
        for name in order:
            taken = bare.steps(active, options.steps) if name == "bare" else take_steps(reports[name], options.steps)
            seconds[name].append(taken)
        done = "  ".join(f"{name} {statistics.median(seconds[name][-1]):.3f}" for name in seconds)
        print(f"round {index + 1}/{options.rounds}, median seconds a step: {done}", flush=True)
    return seconds


def ratios(seconds: dict[str, list[list[float]]], name: str, reference: str) -> list[float]:
    """Mean step time of ``name`` over that of ``reference``, round by round (switches are part of a mean)."""
    pairs = zip(seconds[name], seconds[reference], strict=True)
    return [statistics.fmean(own) / statistics.fmean(other) for own, other in pairs]


def table(seconds: dict[str, list[list[float]]]) -> str:
    """The result in Markdown."""
    lines = [
        "| method | step / full: median (min-max) | step / bare: median (min-max) | seconds a step, median |",
        "|---|---|---|---|",
    ]
    for name in seconds:
        cells = []
        for reference in ("full", "bare"):
            values = ratios(seconds, name, reference) if reference in seconds else []
            cells.append(f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else "-")
        every = [step for taken in seconds[name] for step in taken]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {statistics.median(every):.3f} |")
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    seconds = measure(options)
    commit, dirty = git_state()
    facts = {
        "model": options.model,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(facts | {"seconds": seconds}, indent=1))
    heading = (
        f"# Step time\n\n{options.model}, float32, batch {options.batch_size}, generated problems, "
        f"{options.rounds} interleaved rounds of {options.steps} steps, {torch.get_num_threads()} threads on "
        f"{hardware()}; torch {torch.__version__}, commit {(commit or '-')[:10]}{' (modified)' if dirty else ''}.\n"
        "`bare`: a plain loop over torch's fused AdamW on the layers that grass trains in that round.\n\n"
    )
    options.output.with_suffix(".md").write_text(heading + table(seconds) + "\n")
    print("\n" + table(seconds))


if __name__ == "__main__":
    main()
