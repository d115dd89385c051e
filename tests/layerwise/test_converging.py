"""GradES: what freezes, when, and for how long."""

from __future__ import annotations

import pytest
import torch

from grass_ray import ConvergingSampler

UNITS = 4


def active_sets(sampler: ConvergingSampler, steps: int, growth: list[list[float]]) -> list[tuple[int, ...]]:
    """The active set of every step. Unit ``u``'s norm in period ``k`` is its last one times ``growth[k][u]``."""
    sampler.start([10] * UNITS)
    norms, active, sets = [1.0] * UNITS, (), []
    for step in range(steps):
        if sampler.due:
            active = sampler.sample()
        period, within = divmod(step, int(sampler.period))
        if period and not within:
            norms = [n * g for n, g in zip(norms, growth[min(period, len(growth)) - 1], strict=True)]
        sets.append(active)
        sampler.observe(torch.tensor([n if unit in active else float("nan") for unit, n in enumerate(norms)]))
    return sets


def test_a_unit_freezes_for_good_when_its_norm_stands_still() -> None:
    sampler = ConvergingSampler(threshold=0.1, grace=0.0, period=2)
    # unit 1 stands still in the third period, unit 3 in the second; both move again later, which nobody sees
    growth = [[2.0, 2.0, 2.0, 1.05], [0.5, 0.95, 0.5, 9.0], [2.0, 9.0, 2.0, 9.0]]
    sets = active_sets(sampler, 12, growth)
    assert sets[:4] == [(0, 1, 2, 3)] * 4, "two periods must end before two norms can be compared"
    assert sets[4:6] == [(0, 1, 2)] * 2
    assert set(sets[6:]) == {(0, 2)}


def test_nothing_freezes_in_the_grace_period() -> None:
    still = [[1.0] * UNITS]
    sets = active_sets(ConvergingSampler(threshold=0.1, grace=0.5, period=2, training_steps=20), 20, still)
    assert set(sets[:10]) == {(0, 1, 2, 3)}
    assert len(sets[10]) == 1


def test_the_unit_that_changes_most_trains_to_the_end() -> None:
    growth = [[1.0, 1.01, 1.05, 1.02]]
    sets = active_sets(ConvergingSampler(threshold=0.1, grace=0.0, period=2), 12, growth)
    assert set(sets[4:]) == {(2,)}


def test_a_norm_that_was_not_measured_freezes_nothing() -> None:
    sampler = ConvergingSampler(threshold=0.1, grace=0.0, period=1)
    sampler.start([10] * UNITS)
    for _ in range(6):
        assert sampler.sample() == (0, 1, 2, 3)
        sampler.observe(torch.full((UNITS,), float("nan")))


def test_settings_without_effect_are_told() -> None:
    assert list(ConvergingSampler(grace=0.5, period=10, training_steps=100).without_effect(100)) == []
    (told,) = ConvergingSampler(grace=0.5, period=10, training_steps=20).without_effect(20)
    assert told.startswith("threshold=0.05: no norms are compared")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 0.0}, "threshold is 0.0; it must be above 0"),
        ({"grace": 1.0}, "grace is 1.0; it must be at least 0 and below 1"),
        ({"grace": 0.5}, "grace is 0.5; it must be 0, or training_steps must be given"),
        ({"grace": 0.0, "period": 0}, "period is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConvergingSampler(**settings)  # type: ignore[arg-type]
