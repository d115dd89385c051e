"""What old importance does to GRASS's draws when all gradients grow or shrink in training, and what corrects it.

    python benchmarks/staleness.py             # a minute; writes results/staleness.md

No model is trained: 22 layers have true gradient norms (lognormal, the largest about five times the smallest) that all
follow one trend, a step's norms are noisy, and only those of active layers are seen. Counted are layers never drawn in
1,000 steps, and the total variation between the sampler's probabilities and those of the true norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated

import recording
import torch
import tyro
from tyro.conf import arg

from grass_ray.layerwise.grad_norm import TEMPERATURE, GradNormSampler
from grass_ray.methods import METHODS

RESULTS = Path(__file__).parent / "results"
LAYERS, STEPS = 22, 1000
# the level of all gradients at each share of the training; 0 is probing, too
TRENDS: Mapping[str, Callable[[float], float]] = {
    "stationary": lambda progress: 1.0,
    "rises three times": lambda progress: 1 + 2 * progress,
    "falls to a third": lambda progress: 1 / (1 + 2 * progress),
    "falls to a third in 50 steps": lambda progress: max(1 / 3, 1 - progress * 20 * 2 / 3),
    "three times larger after probing": lambda progress: 1 / 3 if progress == 0 else 1.0,
}
SETTINGS: Mapping[str, list[str]] = {
    "grass": [],
    "exploration 0.05": ["exploration=0.05"],
    "staleness level": ["staleness=level"],
    "grass-fresh": [],
}


def make_sampler(setting: str, seed: int) -> GradNormSampler:
    """A row's sampler, or that of ``grass`` with one setting changed."""
    method = METHODS[setting if setting in METHODS else "grass"].config
    changes = dict(change.split("=") for change in SETTINGS[setting])
    config = type(method.sampler).model_validate(method.sampler.model_dump() | changes)
    sampler = config.build(seed=seed, train_steps=STEPS)
    assert isinstance(sampler, GradNormSampler)
    return sampler


def simulate(trend: str, sampler: GradNormSampler, seed: int, noise: float = 0.1) -> tuple[int, float]:
    """(layers never drawn, total variation between the probabilities at the end and those of the true norms)."""
    sampler.start([1] * LAYERS)
    probing = sampler.probing_steps
    true = torch.exp(torch.randn(LAYERS, generator=torch.Generator().manual_seed(99)) * 0.35)
    noises = torch.exp(torch.randn(STEPS + probing, LAYERS, generator=torch.Generator().manual_seed(seed)) * noise)
    visited: set[int] = set()
    active: list[int] = []
    for step in range(STEPS + probing):
        norms = true * TRENDS[trend](max(0, step - probing) / STEPS) * noises[step]
        seen = torch.full((LAYERS,), math.nan)
        seen[active] = norms[active]
        sampler.observe(norms if sampler.probing else seen)
        if sampler.due:
            active = list(sampler.sample())
            visited |= set(active)
    wanted = torch.softmax(true / true.mean() / TEMPERATURE, 0)
    return LAYERS - len(visited), 0.5 * float((torch.tensor(sampler.probabilities()) - wanted).abs().sum())


def main(
    seeds: Annotated[int, arg(help="runs of each case")] = 10,
    output: Annotated[Path, arg(help="written with .json and .md")] = RESULTS / "staleness",
) -> None:
    """Simulate every trend with every setting and write the table."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    rows = ["| gradients | " + " | ".join(SETTINGS) + " |", "|---" * (len(SETTINGS) + 1) + "|"]
    for trend in TRENDS:
        cells = []
        for setting in SETTINGS:
            runs = [simulate(trend, make_sampler(setting, seed), seed) for seed in range(seeds)]
            mean = fmean(never for never, _ in runs), fmean(distance for _, distance in runs)
            found.setdefault(trend, {})[setting] = mean
            cells.append(f"{mean[0]:.1f} / {mean[1]:.2f}")
        rows.append(f"| {trend} | " + " | ".join(cells) + " |")
        print(rows[-1])
    head = (
        "# Old importance, and what corrects it\n\n"
        f"`python benchmarks/staleness.py --seeds {seeds}`, commit {recording.commit()}. "
        f"Each cell: layers of {LAYERS} never drawn in {STEPS} steps / total variation between the probabilities and "
        f"those of the true norms, means of {seeds} seeds. Simulated samplers, no model is trained.\n\n"
    )
    recording.write(output, recording.facts() | {"seeds": seeds, "found": found}, head + "\n".join(rows))


if __name__ == "__main__":
    tyro.cli(main)
