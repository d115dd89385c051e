"""What every method costs: step time relative to full fine-tuning, states, trainable share and peak memory.

    python benchmarks/methods.py                         # SmolLM2-135M, on whatever device there is
    python benchmarks/methods.py --model tiny --rounds 1 --steps 4 --output /tmp/methods
    python benchmarks/methods.py --model TinyLlama/TinyLlama_v1.1 --dtype bfloat16 --batch-size 16 --rounds 5

Machines drift, so in every round each method is built anew and takes a few steps, in a new order, and ratios are taken
within a round. A step's time is the wall clock around one item of ``fit`` once warm-up and probing are over: measuring,
sampling, one switch, moving states and proving the engagement are all in it. ``bare`` is what a layer-wise method could
cost at best: a plain loop over torch's fused AdamW on two layers in the middle, nothing measured, nothing drawn.
Needs neither ray nor mlflow.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import recording
import torch
import tyro
from recording import Measure, costs

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.report import GIB, WARM_UP_STEPS
from grass_ray.training.run import Run

TRAINED = tuple(name for name, row in METHODS.items() if row.trains)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    methods: tuple[str, ...] = TRAINED
    rounds: Annotated[int, tyro.conf.arg(help="interleaved rounds")] = 3
    steps: Annotated[int, tyro.conf.arg(help="timed steps a round; also the layers' sampling period")] = 5
    batch_size: int = 4
    threads: Annotated[int | None, tyro.conf.arg(help="CPU threads; default: torch's own")] = None
    output: Annotated[Path, tyro.conf.arg(help="written with .json and .md")] = Path("benchmarks/results/methods")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One method in one round. Times in seconds, memory in GiB."""

    step_s: float
    measure_share: float
    trainable_share: float
    resident_state_gib: float
    host_state_gib: float
    peak_allocated_gib: float
    peak_reserved_gib: float


def configure(method: str, options: Options, seed: int) -> RunConfig:
    """A run whose period is the number of timed steps, so that every round has one switch in it."""
    row = METHODS[method].config
    sampler = row.sampler.model_dump()
    settings = [
        f"training.steps={WARM_UP_STEPS + options.steps + 1}",
        f"training.batch_size={options.batch_size}",
        "training.warmup_steps=0",
    ]
    if (sampler.get("period") or 0) > 1:
        settings.append(f"method.sampler.period={options.steps}")
    if sampler.get("refresh_period") and sampler["kind"] == "grad_norm":
        settings.append(f"method.sampler.refresh_period={options.steps}")
    if "probing_steps" in sampler:
        settings.append("method.sampler.probing_steps=1")
    if options.model == "tiny":  # four small random layers: larger shares, fewer outliers
        small = {
            "matrix_norm": ["method.sampler.budget=0.1"],
            "outlier": ["method.sampler.num_active_layers=2", "method.sampler.threshold=4"],
        }
        settings += small.get(sampler["kind"], [])
    model = ModelConfig(name=options.model, dtype=options.dtype)
    return RunConfig(method=row, model=model, seed=seed).override(parse(settings))


def measure(method: str, options: Options, seed: int) -> Cost:
    """Build the run, let it warm up, time its steps."""
    run = Run.prepare(configure(method, options, seed))
    reports = run.fit()
    while run.state.trained < WARM_UP_STEPS:
        next(reports)
    seconds, measured = [], 0.0
    for _ in range(options.steps):
        started = time.perf_counter()
        report = next(reports)
        seconds.append(time.perf_counter() - started)
        measured += report.measure_s
    resident, host = run.state.optimizer.state_bytes()
    return Cost(
        step_s=statistics.fmean(seconds),
        measure_share=measured / sum(seconds),
        trainable_share=run.state.tracer.trace.trainable_share,
        resident_state_gib=resident / GIB,
        host_state_gib=host / GIB,
        peak_allocated_gib=run.state.memory.peak_allocated_gib,
        peak_reserved_gib=run.state.memory.peak_reserved_gib,
    )


def measure_bare(options: Options, seed: int) -> float:
    """Seconds a step of a plain loop over two layers."""
    state = Run.prepare(configure("full", options, seed)).state
    layers = state.optimizer.stack.layers
    for parameter in state.model.parameters():
        parameter.requires_grad_(False)
    middle = len(layers) // 2
    trained = [p for layer in layers[middle - 1 : middle + 1] for p in layer]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    state.model.train()
    seconds = []
    for step in range(WARM_UP_STEPS + options.steps):
        started = time.perf_counter()
        accumulate_gradients(state.model, state.batches[step], state.device)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.fmean(seconds[WARM_UP_STEPS:])


def measure_all(options: Options) -> tuple[dict[str, list[Cost]], list[float]]:
    """Every method in every round, and the bare loop's seconds a step."""
    order = [*options.methods, "bare"]
    shuffler = random.Random(0)
    taken: dict[str, list[Cost]] = {method: [] for method in options.methods}
    bare: list[float] = []
    for index in range(options.rounds):
        shuffler.shuffle(order)
        for name in order:
            if name == "bare":
                bare.append(measure_bare(options, index))
            else:
                taken[name].append(measure(name, options, index))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        done = "  ".join(f"{name} {own[-1].step_s:.2f}" for name, own in taken.items())
        print(f"round {index + 1}/{options.rounds}, seconds a step: {done}  bare {bare[-1]:.2f}", flush=True)
    return taken, bare


def table(costs: dict[str, list[Cost]], bare: list[float]) -> str:
    """The result in Markdown, ordered by peak memory."""
    lines = [
        "| method | step / full: median (min-max) | step / bare | measuring % | trains % | states on device MiB "
        "| states on host MiB | peak allocated GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(costs, key=lambda name: max(cost.peak_allocated_gib for cost in costs[name])):
        taken = costs[name]
        last = taken[-1]
        to_full = [own.step_s / full.step_s for own, full in zip(taken, costs.get("full", taken), strict=True)]
        to_bare = statistics.median(own.step_s / other for own, other in zip(taken, bare, strict=True))
        lines.append(
            f"| {name} | {statistics.median(to_full):.2f} ({min(to_full):.2f}-{max(to_full):.2f}) | {to_bare:.2f} "
            f"| {100 * statistics.fmean(cost.measure_share for cost in taken):.1f} | {100 * last.trainable_share:.2f} "
            f"| {max(cost.resident_state_gib for cost in taken) * 1024:.0f} "
            f"| {max(cost.host_state_gib for cost in taken) * 1024:.0f} "
            f"| {max(cost.peak_allocated_gib for cost in taken):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    taken, bare = measure_all(options)
    heading = (
        f"# What every method costs\n\n{options.model}, {options.dtype}, batch {options.batch_size}, generated "
        f"problems, {options.rounds} interleaved rounds of {options.steps} steps, {torch.get_num_threads()} threads on "
        f"{recording.made_on()}.\n"
        f"`bare`: a plain loop over torch's fused AdamW on two layers in the middle. Host states are those of layers "
        f"drawn so far. `measuring`: extra passes before a step, as a share of its time.\n\n"
    )
    values = {name: [asdict(cost) for cost in own] for name, own in taken.items()}
    units = {"step_s": "s", "peak_allocated_gib": "GiB", "resident_state_gib": "GiB", "host_state_gib": "GiB"}
    measures = [one for name, own in taken.items() for one in costs(own, name, units)]
    recording.write(
        options.output,
        recording.facts(options) | {"costs": values, "bare_step_s": bare},
        heading + table(taken, bare),
        measures=[*measures, Measure("bare step_s", "s", bare)],
    )


if __name__ == "__main__":
    main()
