"""benchmarks/staleness.py: draws recover from old importance with grass-fresh, and do not with the paper's rule."""

from __future__ import annotations

from statistics import fmean

import pytest

from benchmarks import staleness as benchmark

SEEDS = range(3)
TRENDS = ["stationary", "rises three times", "falls to a third", "three times larger after probing"]


def simulated(trend: str, setting: str, noise: float = 0.1) -> tuple[float, float]:
    """Layers never drawn of 22, and the distance of the probabilities from those of the true norms; means of seeds."""
    runs = [benchmark.simulate(trend, benchmark.make_sampler(setting, seed), seed, noise) for seed in SEEDS]
    return fmean(never for never, _ in runs), fmean(distance for _, distance in runs)


@pytest.mark.parametrize("trend", TRENDS)
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_fresh_importance_draws_as_the_true_one_would(trend: str, noise: float) -> None:
    never, distance = simulated(trend, "grass-fresh", noise)
    assert never <= 5
    assert distance < 0.12


@pytest.mark.parametrize(("trend", "least"), [("rises three times", 5), ("three times larger after probing", 8)])
def test_without_the_correction_age_decides_as_much_as_importance(trend: str, least: float) -> None:
    never, distance = simulated(trend, "grass")
    assert never >= least
    assert distance > 0.25
