"""MISA's arithmetic by hand: the first sweep, the budget, importance, and what happens to states."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from small import backward, make_llama, make_optimizer

from grass_ray import MatrixNormSampler

NAN = math.nan


def started(sizes: list[int], total: int | None = None, **settings: Any) -> MatrixNormSampler:
    sampler = MatrixNormSampler(**settings)
    sampler.start(sizes, total)
    return sampler


def drive(
    sampler: MatrixNormSampler, steps: int, rms: list[float], active: tuple[int, ...] = ()
) -> list[tuple[int, ...]]:
    """The active set of every step; an active unit's gradient has the RMS given for it."""
    sets = []
    for _ in range(steps):
        if sampler.due:
            active = sampler.sample()
        sets.append(active)
        sampler.observe(torch.tensor([rms[unit] if unit in active else NAN for unit in range(len(rms))]))
    return sets


def test_the_first_sweep_visits_every_matrix_once_one_step_a_group() -> None:
    """Room for 8 of 40 parameters: two of four, two of four, and the six alone, which then stays for a period."""
    sampler = started([4, 4, 4, 4, 6], 40, budget=0.2, period=3)
    assert drive(sampler, 5, [1.0] * 5) == [(0, 1), (2, 3), (4,), (4,), (4,)]


def test_room_that_the_unvisited_leave_is_filled() -> None:
    """Room for 6: 0 and 1; then 2, and with what is left one of those before."""
    sampler = started([3, 3, 3], 10, budget=0.6, period=3)
    first, second, *_ = drive(sampler, 3, [1.0] * 3)
    assert first == (0, 1)
    assert second in [(0, 2), (1, 2)]


def test_the_least_recently_used_come_first() -> None:
    """Forced: the two longest unused, the lower index first; with room for two that is all there is room for."""
    sampler = started([1] * 5, 5, budget=0.4, period=1, forced=2)
    groups = drive(sampler, 8, [1.0] * 5)
    assert groups[:2] == [(0, 1), (2, 3)]
    filled = groups[2][0]
    assert groups[2] == (filled, 4)
    rest = [unit for unit in (0, 1, 2, 3) if unit != filled]
    assert groups[3] == (rest[0], rest[1])


def test_a_matrix_that_is_never_likely_is_visited_all_the_same() -> None:
    rms = [9.0, 0.0, 0.0, 0.0]
    greedy = drive(started([1] * 4, 4, budget=0.25, period=1, forced=0), 60, rms)
    fair = drive(started([1] * 4, 4, budget=0.25, period=1, forced=1), 60, rms)
    assert sum(group == (0,) for group in greedy) > 50, "exp(5) to 1"
    assert [sum(group == (unit,) for group in fair) for unit in range(4)] == [15] * 4


def test_the_budget_is_kept_and_filled() -> None:
    generator = random.Random(0)
    for seed in range(20):
        sizes = [generator.randint(1, 30) for _ in range(9)]
        room = max(max(sizes), generator.randint(30, 60))
        total = 1000
        sampler = started(sizes, total, budget=room / total, period=1, seed=seed)
        for active in drive(sampler, 40, [generator.random() for _ in sizes]):
            used = sum(sizes[unit] for unit in active)
            assert used <= room
            assert all(sizes[unit] > room - used for unit in range(9) if unit not in active)


def test_importance_is_the_corrected_mean_over_visits_of_the_mean_over_steps() -> None:
    """Matrix 0 of 4 parameters, Frobenius norm 2 RMS: a visit of one step at 3, then one of two steps at 1 and 2."""
    sampler = started([4, 4], 8, budget=0.5, period=2, beta=0.8, forced=1)
    active = sampler.sample()
    assert active == (0,)
    assert all(map(math.isnan, sampler.importance()))
    sampler.observe(torch.tensor([3.0, NAN]))
    assert sampler.sample() == (1,)
    assert sampler.importance()[0] == pytest.approx(6.0), "one visit: the correction cancels beta"
    for rms in (5.0, 7.0):
        sampler.observe(torch.tensor([NAN, rms]))
    assert sampler.sample() == (0,)
    assert sampler.importance() == pytest.approx((6.0, 12.0))
    for rms in (1.0, 2.0):
        sampler.observe(torch.tensor([rms, NAN]))
    sampler.sample()
    second = (0.2 * 3.0 + 0.8 * 0.2 * 6.0) / (1 - 0.8**2)
    assert sampler.importance() == pytest.approx((second, 12.0))
    assert sampler.refreshes == 3


def test_a_constant_norm_stays_what_it_is() -> None:
    """The public code stores its corrected mean and corrects it again: a norm of 1 becomes 1, 2.8, 5.0, ... 10."""
    sampler = started([1, 1], 2, budget=1.0, period=1)
    for _ in range(12):
        drive(sampler, 1, [1.0, 0.5])
    assert sampler.importance() == pytest.approx((1.0, 0.5))


def test_probabilities_by_the_formula_with_its_limit() -> None:
    """exp(min(5, eta G^2)) over the sum, squared only here; an unvisited matrix counts as G = 0."""
    sampler = started([1] * 4, 4, budget=0.75, period=9, eta=0.5)
    drive(sampler, 1, [1.0, 2.0, 100.0, 0.0])
    sampler.sample()
    weights = [math.exp(0.5), math.exp(2.0), math.exp(5.0), 1.0]
    assert sampler.probabilities() == pytest.approx([w / sum(weights) for w in weights])
    assert math.isnan(sampler.importance()[3])


def test_a_matrix_larger_than_the_budget_is_refused_and_the_advice_works() -> None:
    """Also where the least budget is no round number: 12,345 of a million parameters, 29 of 100."""
    for sizes, total in (([12_345, 10], 1_000_000), ([29, 5], 100), ([7, 3], 22)):
        with pytest.raises(ValueError, match=rf"but the largest matrix has {sizes[0]:,}; it must be") as refusal:
            started(sizes, total, budget=0.9 * sizes[0] / total)
        advised = float(str(refusal.value).rsplit(" ", 1)[1])
        assert advised == pytest.approx(sizes[0] / total, abs=1e-4)
        assert 0 in started(sizes, total, budget=advised).sample()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0; it must be above 0 and at most 1"),
        ({"budget": 1.1}, "budget is 1.1"),
        ({"eta": 0.0}, "eta is 0.0"),
        ({"beta": 1.0}, "beta is 1.0; it must be at least 0 and below 1"),
        ({"forced": -1}, "forced is -1"),
        ({"period": 0}, "period is 0"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixNormSampler(**settings)


# ----------------------------------------------------------------------------------------------------- with optimizer


def test_every_matrix_follows_its_own_adamw_kept_only_while_it_stays() -> None:
    """A plain reference: one torch AdamW a matrix, made anew whenever the matrix enters the active set."""
    ours, theirs = make_llama(), make_llama()
    sampler = MatrixNormSampler(0.5, 2, eta=50.0, forced=1, seed=1)
    optimizer = make_optimizer(
        ours, sampler, lr=1e-3, weight_decay=0.1, granularity="matrix", inactive_states="reset", offload="none"
    )
    units = [unit.name for unit in optimizer.units]
    assert all(parameter.ndim == 2 for unit in optimizer.units for parameter in unit.parameters)
    matrices = [p for name, p in theirs.named_parameters() if "layers" in name and p.ndim == 2]
    assert len(units) == len(matrices) == 4 * 7
    references: dict[int, torch.optim.AdamW] = {}
    retained = left = 0
    previous: set[int] = set()
    for step in range(24):
        active = set(optimizer.active_units)
        retained += len(active & previous) if active != previous else 0
        left += len(previous - active)
        previous = active
        for unit in [unit for unit in references if unit not in active]:
            del references[unit]
        for unit in active - set(references):
            references[unit] = torch.optim.AdamW([matrices[unit]], lr=1e-3, weight_decay=0.1, fused=True)
        backward(ours, step)
        optimizer.step()
        optimizer.zero_grad()
        held = {unit for unit in range(28) if optimizer.units[unit].parameters[0] in optimizer.state}
        assert held <= active & set(optimizer.active_units) | active, "a matrix that left has no state"
        backward(theirs, step)
        for reference in references.values():
            reference.step()
        theirs.zero_grad()
        if set(optimizer.active_units) != active:
            gone = active - set(optimizer.active_units)
            assert not any(optimizer.units[unit].parameters[0] in optimizer.state for unit in gone)
    assert retained > 20, "the case must see matrices that stay"
    assert left > 20, "and ones that leave"
    for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name


@pytest.mark.parametrize("limit", [0.01, None])
def test_norms_are_those_of_the_accumulated_gradients_after_clipping(limit: float | None) -> None:
    model = make_llama()
    sampler = MatrixNormSampler(0.3, 2)
    optimizer = make_optimizer(model, sampler, lr=1e-3, granularity="matrix", max_grad_norm=limit)
    seen: list[torch.Tensor] = []
    observe = sampler.observe

    def noting(norms: torch.Tensor) -> None:
        seen.append(norms.clone())
        observe(norms)

    sampler.observe = noting  # type: ignore[method-assign]
    sizes = torch.tensor([float(unit.size) for unit in optimizer.units])
    for step in range(3):
        backward(model, step)
        backward(model, step + 10)
        active = list(optimizer.active_units)
        gradients = [optimizer.units[unit].parameters[0].grad for unit in active]
        norms = torch.stack([g.norm() for g in gradients if g is not None])
        factor = 1.0 if limit is None else min(1.0, limit / (float(norms.square().sum().sqrt()) + 1e-6))
        assert (factor < 1) == (limit is not None)
        optimizer.step()
        optimizer.zero_grad()
        frobenius = seen[-1] * sizes.sqrt()
        torch.testing.assert_close(frobenius[active], norms * factor, rtol=1e-5, atol=1e-9)
        assert [unit for unit in range(len(sizes)) if not frobenius[unit].isnan()] == active


def test_the_optimizer_keeps_the_budget_of_the_whole_model() -> None:
    model = make_llama()
    whole = sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, MatrixNormSampler(0.1, 1), lr=1e-3, granularity="matrix")
    visited: set[int] = set()
    for step in itertools.islice(itertools.count(), 40):
        visited |= set(optimizer.active_units)
        assert sum(p.numel() for p in optimizer.active_parameters()) <= 0.1 * whole
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert len(visited) == len(optimizer.units)
