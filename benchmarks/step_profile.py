"""Where the time of a training step goes: matrix products, attention, other kernels, the optimizer, Python in between.

    python -m benchmarks run step_profile                # SmolLM2-135M: full, lora, grass
    python -m benchmarks run step_profile --model tiny --steps 2 --output /tmp/step_profile

Each method's steps are recorded by torch's profiler after the warm-up, and each event's own time is put under what it
is. What no event covers is Python: the loop, modules, autograd's own work, and what the profiler itself costs. With
py-spy installed, the Python and C++ stacks of the last method's steps are drawn as a flame graph, too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import recording
import torch
import tyro
from matplotlib.figure import Figure
from recording import Measure
from torch.profiler import ProfilerActivity, profile

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.report import WARM_UP_STEPS
from grass_ray.training.run import Run

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
FLAME_HZ = 20
ROOT = "fit"  # the frame of the loop; what is around it and before it is not drawn
PLUMBING = ("_wrapped_call_impl", "_call_impl", "wrapper", "decorate_context", "inner")  # between modules
NARROWEST = 0.004  # share of samples
PARTS = (
    "matrix products, forward",
    "matrix products, backward",
    "attention",
    "other kernels, forward",
    "other kernels, backward",
    "optimizer",
    "Python between kernels",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "smollm2-135m"
    methods: tuple[str, ...] = ("full", "lora", "grass")
    steps: Annotated[int, tyro.conf.arg(help="recorded steps; also the layers' sampling period")] = 6
    batch_size: int = 4
    threads: int = 1
    flame: Annotated[bool, tyro.conf.arg(help="draw the last method's stacks with py-spy, if it is installed")] = True
    output: Annotated[Path, tyro.conf.arg(help="written with .json, .md and .png")] = Path(
        "benchmarks/results/step_profile"
    )


def configure(method: str, options: Options) -> RunConfig:
    settings = [
        f"training.steps={WARM_UP_STEPS + options.steps + 1}",
        f"training.batch_size={options.batch_size}",
        "training.warmup_steps=0",
    ]
    if METHODS[method].config.sampler.kind == "grad_norm":
        settings += ["method.sampler.probing_steps=1", f"method.sampler.period={options.steps}"]
    config = RunConfig(method=METHODS[method].config, model=ModelConfig(name=options.model))
    return config.override(parse(settings))


def warm_up(method: str, options: Options) -> Any:
    """The steps of a run, with those of the warm-up done."""
    torch.set_num_threads(options.threads)
    run = Run.prepare(configure(method, options))
    reports = run.fit()
    while run.state.trained < WARM_UP_STEPS:
        next(reports)
    return reports


def measure(method: str, options: Options) -> dict[str, float]:
    """Milliseconds of a step, by part."""
    reports = warm_up(method, options)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.steps):
            next(reports)
    spent: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
    for event in profiler.events():
        spent[part_of(event)] += event.self_cpu_time_total
    whole = max(e.time_range.end for e in profiler.events()) - min(e.time_range.start for e in profiler.events())
    spent["Python between kernels"] += whole - sum(spent.values())
    return {part: spent[part] / 1000 / options.steps for part in PARTS}


def part_of(event: Any) -> str:
    """The part of a step that an event's own time belongs to."""
    around, parent = [event.name], event.cpu_parent
    while parent is not None:
        around.append(parent.name)
        parent = parent.cpu_parent
    if any(name.startswith("Optimizer.step") for name in around):
        return "optimizer"
    if "scaled_dot_product" in event.name:
        return "attention"
    if not event.name.startswith("aten::"):
        return "Python between kernels"
    kind = "matrix products" if event.name in PRODUCTS else "other kernels"
    return f"{kind}, {'backward' if any(name.startswith('autograd::engine') for name in around) else 'forward'}"


def draw(taken: dict[str, dict[str, float]], path: Path) -> None:
    """A bar per method."""
    figure = Figure(figsize=(9, 0.8 + 0.6 * len(taken)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(taken, 0.0)
    for part in PARTS:
        axes.barh(list(taken), [spent[part] for spent in taken.values()], left=list(left.values()), label=part)
        left = {method: left[method] + spent[part] for method, spent in taken.items()}
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step, as recorded")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)


def flame(options: Options, path: Path) -> bool:
    """Draw the stacks of the last method's steps, the widest at the top; whether py-spy could record them."""
    recorder = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if not options.flame or recorder is None:
        return False
    flags = ["--model", options.model, "--steps", str(options.steps), "--methods", options.methods[-1], "--stacks"]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "stacks"
        command = [recorder, "record", "--native", "--rate", str(FLAME_HZ), "--format", "raw", "--output", str(raw)]
        done = subprocess.run([*command, "--", sys.executable, __file__, *flags], stdout=sys.stderr)
        lines = raw.read_text().splitlines() if done.returncode == 0 else []
    stacks = Counter[tuple[str, ...]]()
    for line in lines:
        frames, _, samples = line.rpartition(" ")
        names = [frame.partition(" (")[0] for frame in frames.split(";")]
        if ROOT in names:
            own = tuple(name for name in names[names.index(ROOT) :] if name not in PLUMBING)
            stacks[own] += int(samples)
    if stacks:
        draw_flame(stacks, path)
    return bool(stacks)


def draw_flame(stacks: Counter[tuple[str, ...]], path: Path) -> None:
    """Callers above, callees below; the width is the share of samples."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots()
    whole = stacks.total()

    def draw_level(below: Counter[tuple[str, ...]], left: float, depth: int) -> None:
        names = Counter[str]()
        for stack, samples in below.items():
            names[stack[0]] += samples
        for name, samples in names.most_common():
            width = samples / whole
            if width < NARROWEST:
                break
            axes.barh(
                -depth, width, left=left, height=1, color=f"C{hash_of(name) % 10}", alpha=0.6, edgecolor="w", lw=0.5
            )
            letters = int(width * 190)
            if letters > 3:
                axes.text(left + width / 2, -depth, name[:letters], ha="center", va="center", fontsize=6)
            inner = Counter({stack[1:]: n for stack, n in below.items() if stack[0] == name and len(stack) > 1})
            draw_level(inner, left, depth + 1)
            left += width

    draw_level(stacks, 0.0, 0)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    figure.savefig(path, dpi=130)


def hash_of(name: str) -> int:
    """The same number for the same name in every process."""
    return sum(name.encode())


def main(options: Options) -> None:
    taken = {method: measure(method, options) for method in options.methods}
    header = ["", *options.methods]
    rows: list[list[str]] = []
    for part in PARTS:
        rows.append([part, *(f"{s[part]:.1f} ms, {100 * s[part] / sum(s.values()):.1f} %" for s in taken.values())])
    rows.append(["a step", *(f"{sum(spent.values()):.0f} ms" for spent in taken.values())])
    name = options.output.name
    options.output.parent.mkdir(parents=True, exist_ok=True)
    drawn = flame(options, options.output.with_name(f"{name}_flame.png"))
    page = (
        f"# Where the time of a step goes\n\n{options.model}, float32, batch {options.batch_size}, generated problems, "
        f"{options.steps} steps, {options.threads} threads on {recording.made_on()}. Made by `python -m benchmarks run "
        f"step_profile`.\n\n{recording.table(header, rows)}\n\n![Where the time of a step goes]({name}.png)"
    )
    if drawn:
        page += f"\n\nThe stacks of `{options.methods[-1]}`, Python and C++:\n\n![flame graph]({name}_flame.png)"
    measures = [Measure(f"{method}: {part}", "ms", [spent[part]]) for method, spent in taken.items() for part in spent]
    values = recording.facts(options) | {"ms_a_step": taken}
    recording.write(options.output, values, page, measures=measures, draw=lambda path: draw(taken, path))


if __name__ == "__main__":
    if "--stacks" in sys.argv:
        sys.argv.remove("--stacks")
        asked = tyro.cli(Options)
        for _ in warm_up(asked.methods[-1], asked):
            pass
    else:
        main(tyro.cli(Options, description=__doc__))
