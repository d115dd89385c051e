"""Settings that change over training: their values by hand, and samplers that are driven by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grass_ray import GradNormSampler, UniformSampler
from grass_ray.layerwise.sampler import Sampler
from grass_ray.layerwise.schedules import Cosine, Linear, Schedule, Step, bounds_of, count_at, value_at

NAN = math.nan


def draws(sampler: Sampler, steps: int, units: int = 6) -> list[tuple[int, int]]:
    """(step, number of layers) of every draw."""
    found = []
    for step in range(steps):
        if sampler.due:
            found.append((step, len(sampler.sample())))
        sampler.observe(torch.full((units,), NAN))
    return found


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(1.0, 0.2, steps=4), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Linear(2.0, 6.0, steps=2), [2.0, 4.0, 6.0, 6.0]),
        (Cosine(0.0, 2.0, steps=4), [0.0, 1 - math.sqrt(0.5), 1.0, 1 + math.sqrt(0.5), 2.0, 2.0]),
        (Cosine(3.0, 1.0, steps=2), [3.0, 2.0, 1.0, 1.0]),
        (Step([5.0, 3.0, 4.0], [0.25, 0.75], steps=4), [5.0, 3.0, 3.0, 4.0, 4.0, 4.0]),
        (Step([7.0], [], steps=1), [7.0, 7.0]),
    ],
)
def test_values_at_every_step_and_beyond_the_end(schedule: Schedule, values: list[float]) -> None:
    assert [schedule.at(step) for step in range(len(values))] == pytest.approx(values)
    assert schedule.at(10**9) == pytest.approx(values[-1])
    assert value_at(schedule, 1) == schedule.at(1)
    assert bounds_of(schedule) == pytest.approx((min(values), max(values)))


def test_a_number_is_a_schedule_that_stays() -> None:
    assert value_at(0.5, 3) == 0.5
    assert bounds_of(2) == (2, 2)


def test_counts_round_halves_up() -> None:
    assert [count_at(Linear(1, 3, steps=4), step) for step in range(5)] == [1, 2, 2, 3, 3]
    assert count_at(2.4, 0) == 2


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Linear, (1.0, 2.0, 0), "a schedule over 0 steps; it must be at least 1"),
        (Cosine, (1.0, 2.0, -3), "a schedule over -3 steps; it must be at least 1"),
        (Step, ([1.0], [], 0), "a schedule over 0 steps"),
        (Step, ([], [], 5), r"a step schedule of values \[\] has boundaries \[\]"),
        (Step, ([1.0, 2.0], [], 5), "one fewer than values"),
        (Step, ([1.0, 2.0], [0.2, 0.4], 5), "one fewer than values"),
        (Step, ([1.0, 2.0, 3.0], [0.5, 0.5], 5), "ascending"),
        (Step, ([1.0, 2.0, 3.0], [0.6, 0.5], 5), "ascending"),
        (Step, ([1.0, 2.0], [0.0], 5), "each between 0 and 1"),
        (Step, ([1.0, 2.0], [1.0], 5), "each between 0 and 1"),
    ],
)
def test_refuses_bad_schedules(kind: Any, settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_active_layers": Linear(2, 0, 9)}, "num_active_layers is Linear.*it must be at least 1"),
        ({"period": Step([4, 0], [0.5], 9)}, "period is Step.*it must be at least 1"),
        ({"temperature": Cosine(1.0, 0.0, 9)}, "temperature is Cosine.*it must be above 0"),
        ({"temperature": Linear(1.0, -1.0, 9)}, "temperature is Linear.*it must be above 0"),
        ({"ema": Linear(0.5, 1.5, 9)}, "ema is Linear.*above 0 and at most 1"),
    ],
)
def test_samplers_refuse_schedules_that_leave_the_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradNormSampler(**settings)


def test_a_schedule_that_once_asks_for_more_layers_than_there_are_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"gamma.* is 5, but the model has 4 decoder layers"):
        UniformSampler(Linear(1, 5, steps=100)).start([1] * 4)


def test_a_growing_period_counts_from_the_draw_it_began_with() -> None:
    """1 + 0.3 step, rounded at the draw: 1, 1 (1.3), 2 (1.6), 2 (2.2), 3 (2.8), 4 (3.7), 4, ..."""
    sampler = UniformSampler(1, Linear(1, 4, steps=10))
    sampler.start([1] * 6)
    assert [step for step, _ in draws(sampler, 20)] == [0, 1, 2, 4, 6, 9, 13, 17]


def test_gamma_shrinks_at_the_draws() -> None:
    """4 - step / 2, halves up: 4, 4 (3.5), 3, 3 (2.5), 2, 2 (1.5), 1, 1."""
    sampler = UniformSampler(Linear(4, 1, steps=6), 1)
    sampler.start([1] * 6)
    assert [count for _, count in draws(sampler, 8)] == [4, 4, 3, 3, 2, 2, 1, 1]
    slow = UniformSampler(Step([3, 1], [0.5], steps=6), 4)
    slow.start([1] * 6)
    assert draws(slow, 9) == [(0, 3), (4, 1), (8, 1)], "the boundary at step 3 waits for the next draw"


def test_probing_uses_up_no_part_of_a_schedule() -> None:
    sampler = GradNormSampler(Step([3, 1], [0.5], steps=4), 1, probing_steps=5, refresh_period=None)
    sampler.start([1] * 6)
    assert [count for _, count in draws(sampler, 10)] == [3, 3, 1, 1, 1]


def test_temperature_at_the_step_of_the_draw() -> None:
    sampler = GradNormSampler(
        1, 5, probing_steps=1, refresh_period=None, temperature=Linear(2.0, 0.5, steps=10), normalise="none"
    )
    sampler.start([1] * 3)
    sampler.observe(torch.tensor([1.0, 2.0, 3.0]))
    for tau in (2.0, 1.25, 0.5):
        weights = [math.exp(m / tau) for m in (1.0, 2.0, 3.0)]
        assert sampler.probabilities() == pytest.approx([w / sum(weights) for w in weights])
        for _ in range(5):
            sampler.observe(torch.full((3,), NAN))


def test_alpha_at_the_step_of_the_refresh() -> None:
    """Refreshes after steps 2 and 4, where alpha is 0.5 and 0.2."""
    sampler = GradNormSampler(1, 5, probing_steps=1, refresh_period=2, ema=Linear(0.8, 0.2, steps=4))
    sampler.start([1] * 2)
    for norms in ([4.0, 1.0], [8.0, NAN], [8.0, NAN]):
        sampler.observe(torch.tensor(norms))
    assert sampler.importance() == pytest.approx((0.5 * 8 + 0.5 * 4, 1.0))
    for norms in ([1.0, NAN], [1.0, 3.0]):
        sampler.observe(torch.tensor(norms))
    assert sampler.importance() == pytest.approx((0.2 * 1 + 0.8 * 6, 0.2 * 3 + 0.8 * 1))
