"""GRASS's arithmetic by hand: importance, softmax, refresh, and the settings it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from grass_ray import GradNormSampler

NAN = math.nan


def observed(sampler: GradNormSampler, *steps: list[float]) -> GradNormSampler:
    for norms in steps:
        sampler.observe(torch.tensor(norms))
    return sampler


def test_importance_is_the_mean_over_probing_steps() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=2)
    sampler.start([1] * 3)
    observed(sampler, [1.0, 2.0, 3.0])
    assert sampler.probing
    assert not sampler.due
    observed(sampler, [3.0, 4.0, 5.0])
    assert not sampler.probing
    assert sampler.due
    assert sampler.importance() == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(("normalise", "scale"), [("mean", 3.0), ("none", 1.0)])
def test_probabilities_are_the_softmax(normalise: str, scale: float) -> None:
    sampler = GradNormSampler(1, 5, probing_steps=1, temperature=0.5, normalise=normalise)  # type: ignore[arg-type]
    sampler.start([1] * 3)
    observed(sampler, [2.0, 3.0, 4.0])
    weights = [math.exp(m / scale / 0.5) for m in (2.0, 3.0, 4.0)]
    assert sampler.probabilities() == pytest.approx([w / sum(weights) for w in weights])


def test_normalising_makes_temperature_independent_of_the_gradients_scale() -> None:
    large, small = (GradNormSampler(1, 5, probing_steps=1) for _ in range(2))
    for sampler, scale in ((large, 1.0), (small, 1e-4)):
        sampler.start([1] * 3)
        observed(sampler, [2.0 * scale, 3.0 * scale, 4.0 * scale])
    assert large.probabilities() == pytest.approx(small.probabilities(), rel=1e-5)


def test_refresh_moves_only_layers_that_were_active_in_the_window() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=1, refresh_period=2, ema=0.25)
    sampler.start([1] * 3)
    observed(sampler, [1.0, 2.0, 3.0], [NAN, 4.0, NAN])
    assert sampler.importance() == (1.0, 2.0, 3.0)
    observed(sampler, [NAN, 6.0, NAN])
    assert sampler.importance() == (1.0, 0.25 * 5.0 + 0.75 * 2.0, 3.0)
    assert sampler.refreshes == 2


def test_the_window_begins_anew_after_a_refresh() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=1, refresh_period=1, ema=1.0)
    sampler.start([1] * 2)
    observed(sampler, [1.0, 1.0], [8.0, NAN], [2.0, NAN])
    assert sampler.importance() == (2.0, 1.0)


def test_static_never_refreshes() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=1, refresh_period=None)
    sampler.start([1] * 2)
    observed(sampler, [1.0, 2.0], *[[9.0, NAN]] * 50)
    assert sampler.importance() == (1.0, 2.0)
    assert sampler.refreshes == 1


def test_an_unmeasured_layer_counts_as_an_average_one() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=0, refresh_period=1)
    sampler.start([1] * 3)
    assert sampler.probabilities() == pytest.approx([1 / 3] * 3)
    observed(sampler, [1.0, 3.0, NAN])
    low, high, unknown = sampler.probabilities()
    assert low < unknown < high
    assert unknown == pytest.approx(math.sqrt(low * high))


def test_exploration_is_a_floor() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=1, temperature=0.01, exploration=0.2)
    sampler.start([1] * 4)
    observed(sampler, [1.0, 1.0, 1.0, 9.0])
    assert sampler.probabilities() == pytest.approx([0.05, 0.05, 0.05, 0.85])


def test_extreme_temperatures_still_draw_distinct_layers() -> None:
    """Probabilities that underflow to zero must not break drawing gamma layers."""
    sampler = GradNormSampler(3, 5, probing_steps=1, temperature=1e-6)
    sampler.start([1] * 4)
    observed(sampler, [1.0, 2.0, 3.0, 4.0])
    assert sampler.sample() == (1, 2, 3)


def test_very_large_temperature_visits_layers_as_lisa_does() -> None:
    from scipy.stats import chisquare

    sampler = GradNormSampler(2, 1, probing_steps=1, refresh_period=None, temperature=1e6)
    sampler.start([1] * 6)
    observed(sampler, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    visits = [0] * 6
    for _ in range(3000):
        for layer in sampler.sample():
            visits[layer] += 1
    assert chisquare(visits).pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_active_layers": 0}, "num_active_layers is 0; it must be at least 1"),
        ({"period": 0}, "period is 0; it must be at least 1"),
        ({"probing_steps": -1}, "probing_steps is -1"),
        ({"refresh_period": 0}, "refresh_period is 0; it must be at least 1 or None"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"ema": 0.0}, "ema is 0.0; it must be above 0 and at most 1"),
        ({"normalise": "max"}, "normalise is 'max'; it must be 'mean' or 'none'"),
        ({"exploration": 1.5}, "exploration is 1.5; it must be between 0 and 1"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradNormSampler(**settings)  # type: ignore[arg-type]
