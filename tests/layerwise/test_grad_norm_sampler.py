"""GRASS's arithmetic by hand: importance, softmax, refresh, and the settings it refuses."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from grass_ray import GradNormSampler
from grass_ray.layerwise.schedules import Linear
from grass_ray.methods import METHODS

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


def test_a_negative_temperature_prefers_layers_of_small_importance() -> None:
    high, low = (GradNormSampler(1, 5, probing_steps=1, temperature=tau) for tau in (0.5, -0.5))
    for sampler, values in ((high, [1.0, 2.0, 4.0]), (low, [-1.0, -2.0, -4.0])):
        sampler.start([1] * 3)
        sampler.normalise = "none"
        observed(sampler, values)
    assert low.probabilities() == pytest.approx(high.probabilities())


def test_the_controls_of_grass_draw_what_they_say() -> None:
    drawn = {}
    for name in ("grass", "uniform", "top", "inverse"):
        sampler = METHODS[name].config.sampler.build(seed=0, train_steps=100)
        sampler.start([1] * 6)
        observed(sampler, *[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 10)
        drawn[name] = sampler.probabilities(), sampler.sample()
    assert drawn["uniform"][0] == pytest.approx([1 / 6] * 6)
    assert drawn["top"][1] == (4, 5)
    assert list(drawn["grass"][0]) == sorted(drawn["grass"][0])
    assert drawn["inverse"][0] == pytest.approx(drawn["grass"][0][::-1])


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


# --------------------------------------------------------------------------------------------- a target for the entropy


def effective(probabilities: tuple[float, ...]) -> float:
    return math.exp(-sum(p * math.log(p) for p in probabilities if p))


@pytest.mark.parametrize("exploration", [0.0, 0.2])
@pytest.mark.parametrize("target", [1.5, 4.0, 8.0, 21.9])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
@pytest.mark.parametrize("normalise", ["mean", "none"])
def test_effective_layers_are_as_many_as_asked_for(
    target: float, exploration: float, scale: float, normalise: Literal["mean", "none"]
) -> None:
    sampler = GradNormSampler(
        2, 5, probing_steps=1, effective_layers=target, exploration=exploration, normalise=normalise
    )
    sampler.start([1] * 22)
    sampler.observe(torch.exp(torch.randn(22, generator=torch.Generator().manual_seed(1)) * 0.4) * scale)
    fewest = effective((1 - exploration * 21 / 22, *[exploration / 22] * 21))
    assert effective(sampler.probabilities()) == pytest.approx(max(target, fewest), rel=1e-3)


def test_effective_layers_at_their_limits() -> None:
    for target, expected in ((1, [0.0, 0.0, 1.0]), (3, [1 / 3] * 3)):
        sampler = GradNormSampler(1, 5, probing_steps=1, effective_layers=target)
        sampler.start([1] * 3)
        observed(sampler, [1.0, 2.0, 3.0])
        assert sampler.probabilities() == pytest.approx(expected, abs=1e-6)
    equal = GradNormSampler(1, 5, probing_steps=1, effective_layers=1)
    equal.start([1] * 3)
    observed(equal, [2.0, 2.0, 2.0])
    assert equal.probabilities() == pytest.approx([1 / 3] * 3), "no temperature tells equal layers apart"


def test_effective_layers_follow_a_schedule_and_the_importance() -> None:
    sampler = GradNormSampler(1, 1, probing_steps=1, refresh_period=1, effective_layers=Linear(6, 2, 10))
    sampler.start([1] * 8)
    observed(sampler, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    for step in range(11):
        assert effective(sampler.probabilities()) == pytest.approx(6 - 0.4 * step, rel=1e-3)
        observed(sampler, [float(step + 1)] + [NAN] * 7)


def test_more_effective_layers_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="effective_layers is 5, but there are 4 layers; choose 1 to 4"):
        GradNormSampler(1, 5, effective_layers=Linear(1, 5, 10)).start([1] * 4)


# ---------------------------------------------------------------------------------------------------------- staleness


def test_ages_count_the_steps_since_a_layer_was_last_measured() -> None:
    sampler = GradNormSampler(1, 5, probing_steps=2, refresh_period=3)
    sampler.start([1] * 3)
    assert str(sampler.ages()) == "(nan, nan, nan)"
    observed(sampler, [1.0, 1.0, math.inf], [1.0, NAN, NAN])
    assert str(sampler.ages()) == "(0.0, 1.0, nan)"
    observed(sampler, [NAN, 1.0, NAN], [1.0, NAN, NAN])
    assert str(sampler.ages()) == "(2.0, 3.0, nan)", "what is in the open window is not in the importance yet"
    observed(sampler, [math.inf, NAN, NAN])
    assert str(sampler.ages()) == "(1.0, 2.0, nan)"


def test_level_brings_old_values_to_the_level_of_those_measured() -> None:
    """Layers 0 and 1 grew by 2 and 8, a geometric mean of 4; then ema mixes what was measured."""
    sampler = GradNormSampler(1, 5, probing_steps=1, refresh_period=1, ema=0.25, staleness="level")
    sampler.start([1] * 4)
    observed(sampler, [1.0, 2.0, 3.0, NAN], [2.0, 16.0, NAN, NAN])
    assert sampler.importance()[:3] == pytest.approx((0.25 * 2 + 0.75 * 4, 0.25 * 16 + 0.75 * 8, 12.0))
    assert math.isnan(sampler.importance()[3])
    assert str(sampler.ages()) == "(0.0, 0.0, 1.0, nan)"


def test_level_changes_nothing_where_the_measured_layers_stayed_as_they_were() -> None:
    plain, level = (GradNormSampler(1, 5, probing_steps=1, refresh_period=1, staleness=s) for s in ("none", "level"))
    for sampler in (plain, level):
        sampler.start([1] * 3)
        observed(sampler, [1.0, 2.0, 3.0], [NAN, 2.0, NAN], [NAN, NAN, NAN])
    assert plain.importance() == level.importance() == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_active_layers": 0}, "num_active_layers is 0; it must be at least 1"),
        ({"period": 0}, "period is 0; it must be at least 1"),
        ({"probing_steps": -1}, "probing_steps is -1"),
        ({"refresh_period": 0}, "refresh_period is 0; it must be at least 1 or None"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0, or below 0 throughout"),
        ({"ema": 0.0}, "ema is 0.0; it must be above 0 and at most 1"),
        ({"normalise": "max"}, "normalise is 'max'; it must be 'mean' or 'none'"),
        ({"exploration": 1.5}, "exploration is 1.5; it must be between 0 and 1"),
        ({"staleness": "shrink"}, "staleness is 'shrink'; it must be 'none' or 'level'"),
        ({"effective_layers": 0.9}, "effective_layers is 0.9; it must be at least 1"),
        ({"effective_layers": Linear(4, 0.5, 10)}, "effective_layers is .*; it must be at least 1"),
        ({"effective_layers": 4, "temperature": 0.5}, "temperature is 0.5; it must be left out where effective_layers"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradNormSampler(**settings)  # type: ignore[arg-type]
