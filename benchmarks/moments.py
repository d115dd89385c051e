"""What moments of fewer bits do to a training: bfloat16 weights and every precision that keeps a master of them.

    python benchmarks/moments.py                  # a few minutes; writes results/moments.md and .json
    python benchmarks/moments.py --steps 100 --output /tmp/moments

1. A small random model learns generated problems, all layers at every step, from the same weights on the same batches.
   Trainings drift apart by themselves; how far is shown by an exact one whose first weights differ in their last bits.
2. AdamW's updates from random gradients over three decades, whose level stays, falls, or falls in one half of every
   block and rises in the other; with bitsandbytes, if it is installed, also from the maps of its 8-bit optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import recording
import torch
import tyro
from torch import Tensor
from tyro.conf import arg

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.optim.kernels import REMAINDER, join
from grass_ray.optim.quantized import BLOCK, SPANS, pack, unpack
from grass_ray.optim.rounding import hash_bits, round_stochastically
from grass_ray.overrides import parse
from grass_ray.training.run import Run

RESULTS = Path(__file__).parent / "results"
TRAININGS = ("exact", "int8", "exact, first weights a little different", "rem16")
LEVELS: dict[str, Callable[[int], Tensor]] = {
    "stays": lambda step: torch.ones(2),
    "falls to a tenth": lambda step: torch.full((2,), 1.0 if step < 1000 else 0.1),
    "falls in one half, rises in the other": lambda step: torch.tensor([0.1, 10.0] if step >= 1000 else [1.0, 1.0]),
}

# ------------------------------------------------------------------------------------------------ a training, measured


def follow(training: str, steps: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Master weights before and after a training, and its losses."""
    settings = [f"training.steps={steps}", "training.batch_size=4", "training.warmup_steps=0"]
    settings.append(f"method.optimizer.precision={training.split(',')[0]}")
    model = ModelConfig(name="tiny", dtype="bfloat16")
    run = Run.prepare(RunConfig(method=METHODS["full"].config, model=model).override(parse(settings)))
    parameters = list(run.state.model.parameters())
    with torch.no_grad():
        for parameter in parameters if "," in training else ():
            parameter[0] *= 1 + 2**-8
    start = [p.detach().float().clone() for p in parameters]
    losses = [report.loss for report in run.fit()]
    states = run.state.optimizer.state
    ends = [
        join(p.detach(), states[p][REMAINDER]) if REMAINDER in states[p] else p.detach().float() for p in parameters
    ]
    return start, ends, losses


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(left, right, strict=True)))


def compare_trainings(steps: int) -> Iterator[dict[str, Any]]:
    """How far each training ends from the exact one, as a share of the way, and the losses at its end."""
    for training in TRAININGS:
        start, end, losses = follow(training, steps)
        if training == "exact":
            exact, way = end, distance(end, start)
        tail = losses[-max(1, steps // 10) :]
        row = {"training": training, "apart": distance(end, exact) / way, "loss": fmean(tail)}
        print(row, flush=True)
        yield row


# --------------------------------------------------------------------------------------------------- updates, simulated

Moment = Callable[[Tensor, int], Tensor]


def in_8_bits(name: str) -> Moment:
    def moment(values: Tensor, step: int) -> Tensor:
        random = (
            hash_bits(values.numel(), torch.tensor(float(step)), 0, values.device) if name == "exp_avg_sq" else None
        )
        return unpack(*pack(values, SPANS[name], random), SPANS[name])

    return moment


def pairs() -> dict[str, tuple[Moment, Moment]]:
    """How each precision keeps both moments."""
    found: dict[str, tuple[Moment, Moment]] = {
        "rem16": (
            lambda m, step: m.bfloat16().float(),
            lambda v, step: round_stochastically(v, torch.tensor(float(step))).float(),
        ),
        "int8": (in_8_bits("exp_avg"), in_8_bits("exp_avg_sq")),
        "bfloat16, rounded to the nearest": (
            lambda m, step: m.bfloat16().float(),
            lambda v, step: v.bfloat16().float(),
        ),
    }
    try:
        from bitsandbytes import functional
    except ImportError:
        return found

    def mapped(signed: bool) -> Moment:
        code = functional.create_dynamic_map(signed=signed)

        def moment(values: Tensor, step: int) -> Tensor:
            kept: Tensor = functional.dequantize_blockwise(
                *functional.quantize_blockwise(values, code=code, blocksize=BLOCK)
            )
            return kept

        return moment

    return {**found, "bitsandbytes": (mapped(True), mapped(False))}


def simulate(level: Callable[[int], Tensor], steps: int, blocks: int = 64) -> dict[str, float]:
    """Distance of the sum of all updates from that of float32 moments, as a share of its length."""
    generator = torch.Generator().manual_seed(0)
    count = blocks * BLOCK
    size = 10 ** (0.5 * torch.randn(count, generator=generator) - 4)
    drift = 0.1 * torch.randn(count, generator=generator)
    kept = pairs()
    state = {name: [torch.zeros(count), torch.zeros(count), torch.zeros(count)] for name in ("exact", *kept)}
    for step in range(1, steps + 1):
        gradient = (torch.randn(count, generator=generator) + drift) * size * level(step).repeat(count // 2)
        for name, (m, v, total) in state.items():
            m.lerp_(gradient, 0.1)
            v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            total += (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            if name != "exact":
                for moment, keep in zip((m, v), kept[name], strict=True):
                    moment.copy_(keep(moment, step))
    exact = state["exact"][2]
    return {name: float((total - exact).norm() / exact.norm()) for name, (_, _, total) in state.items() if name in kept}


# ------------------------------------------------------------------------------------------------------------ the table


def main(
    steps: Annotated[int, arg(help="steps of each training and simulation")] = 3000,
    output: Annotated[Path, arg(help="written with .json and .md")] = RESULTS / "moments",
) -> None:
    """Train, simulate, and write the tables."""
    torch.set_num_threads(1)
    trainings = list(compare_trainings(steps))
    simulated = {name: simulate(level, steps) for name, level in LEVELS.items()}
    lines = [
        "# Moments of fewer bits",
        "",
        f"`python benchmarks/moments.py --steps {steps}`, commit {recording.commit()}, bfloat16 weights, CPU.",
        "",
        f"The tiny model on generated problems, all layers, {steps} steps. Distance: of the master weights from those "
        "of `exact`, as a share of the way that these went. Loss: mean of the last tenth of the steps.",
        "",
        "| training | distance | loss |",
        "|---|---|---|",
        *(f"| {row['training']} | {row['apart']:.3f} | {row['loss']:.4f} |" for row in trainings),
        "",
        f"Sum of {steps} updates from random gradients: distance from that of float32 moments, relative to its length.",
        "",
        "| gradients | " + " | ".join(simulated["stays"]) + " |",
        "|---" * (1 + len(simulated["stays"])) + "|",
        *(
            f"| level {name} | " + " | ".join(f"{v:.3f}" for v in row.values()) + " |"
            for name, row in simulated.items()
        ),
    ]
    values = recording.facts() | {"steps": steps, "trainings": trainings, "simulated": simulated}
    recording.write(output, values, "\n".join(lines))


if __name__ == "__main__":
    tyro.cli(main)
