"""What every sampler must do. Each check takes a function that builds the sampler from a seed.

::

    for name, check in CHECKS.items():
        check(lambda seed: TopHeavySampler(2, 3, seed=seed), SIZES)      # raises BrokenError

A sampler is driven as the optimizer drives it, with made-up gradient norms and losses that depend on the step alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grass_ray.contract.broken import BrokenError, demand
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import Sampler
from grass_ray.layerwise.uniform import UniformSampler

Make = Callable[[int], Sampler]
Active = tuple[int, ...] | None
SIZES = (10, 20, 30, 10, 20, 30)
MOST_REPEATS = 8  # of SIZES, where a sampler trains more units at a time
STOPS = range(1, 12)  # steps after which a sampler is stopped and resumed


class MadeUpPasses:
    """What a training loop would measure at a step, made up from the step and the question alone."""

    def __init__(self, step: int, units: int) -> None:
        self._step = step
        self._units = units

    def loss(self, scales: Mapping[int, float]) -> float:
        """A loss that damping raises."""
        return 1.0 + 0.1 * sum(layer * (1 - scale) for layer, scale in scales.items()) / (1 + self._step)

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        """Scores that grow with depth."""
        return tuple(float(1 + layer) for layer in range(self._units))


def norms_at(step: int, active: Active, units: int) -> Tensor:
    """Made-up RMS gradients of a step, shape (units,); frozen units are NaN."""
    values = torch.rand(units, generator=torch.Generator().manual_seed(step)) * 1e-3
    if active is not None:
        values[[unit for unit in range(units) if unit not in active]] = math.nan
    return values


def drive(sampler: Sampler, steps: int, active: Active = None, start: int = 0) -> list[list[Any]]:
    """Drive a started sampler as the optimizer does.

    Returns:
        For each step the active set, probabilities, number of refreshes, importance and ages.
    """
    said: list[list[Any]] = []
    units = sampler._num_units
    for step in range(start, start + steps):
        if active is None and sampler.due:
            active = sampler.sample()
        sampler.probe(MadeUpPasses(step, units))
        if sampler.due:
            active = sampler.sample()
        sampler.observe(norms_at(step, None if sampler.probing else active, units))
        if sampler.due:
            active = sampler.sample()
        said.append([active, sampler.probabilities(), sampler.refreshes, sampler.importance(), sampler.ages()])
    return said


def as_json(said: object) -> str:
    """What was said as text, so that NaN equals NaN."""
    return json.dumps(said)


def sizes_for(make: Make) -> tuple[int, ...]:
    """Sizes of as many units as the sampler needs. Raises ValueError if it takes none of the numbers that are tried."""
    for repeats in range(1, MOST_REPEATS):
        try:
            make(0).start(SIZES * repeats)
        except ValueError:
            continue
        return SIZES * repeats
    make(0).start(SIZES * MOST_REPEATS)
    return SIZES * MOST_REPEATS


def started(make: Make, sizes: Sequence[int], steps: int = 0) -> Sampler:
    """A sampler that was driven for ``steps`` steps."""
    sampler = make(3)
    sampler.start(sizes)
    drive(sampler, steps)
    return sampler


def held(sampler: Sampler) -> str:
    """Everything that a sampler holds and says, as text."""
    values = [sampler.state_dict(), sampler.due, sampler.probing, sampler.refreshes]
    return as_json([*values, sampler.probabilities(), sampler.importance(), sampler.ages()])


def check_refused(sampler: Sampler, state: Mapping[str, Any], what: str, words: Sequence[str] = ()) -> None:
    """A state is refused with a ValueError that has one of the words, and the sampler stays as it was."""
    before = held(sampler)
    try:
        sampler.load_state_dict(state)
    except ValueError as error:
        demand(not words or any(word in str(error) for word in words), f"{what}: the message is {error}")
    else:
        raise BrokenError(f"load_state_dict takes {what} without a ValueError")
    demand(held(sampler) == before, f"load_state_dict refuses {what}, but has changed the sampler")


# ------------------------------------------------------------------------------------------------------------- checks


def check_draws(make: Make, sizes: Sequence[int]) -> None:
    """Active sets are distinct, ascending indices of units; probabilities are not negative and sum to 1."""
    sampler = make(0)
    sampler.start(sizes)
    for step, (active, probabilities, *_) in enumerate(drive(sampler, 40)):
        if active is not None:
            right = list(active) == sorted(set(active)) and set(active) <= set(range(len(sizes)))
            demand(right, f"step {step}: the active set is {active}")
        if probabilities is not None:
            right = math.isclose(sum(probabilities), 1.0, rel_tol=1e-9) and min(probabilities) >= 0
            demand(right, f"step {step}: the probabilities are {probabilities}")


def check_seed(make: Make, sizes: Sequence[int]) -> None:
    """The same seed gives the same draws, and another seed others if anything is drawn at random."""
    first, again, other = make(0), make(0), make(1)
    for sampler in (first, again, other):
        sampler.start(sizes)
    said = drive(first, 60)
    demand(as_json(said) == as_json(drive(again, 60)), "two samplers with the same seed draw differently")
    if first.probabilities() is not None:
        demand(as_json(said) != as_json(drive(other, 60)), "another seed gives the same draws")


def check_resume(make: Make, sizes: Sequence[int], stops: Sequence[int] = STOPS) -> None:
    """A sampler that goes on from a saved state says what one says that never stopped, wherever it stops."""
    whole = make(3)
    whole.start(sizes)
    expected = as_json(drive(whole, 30))
    for stop in stops:
        first = make(3)
        first.start(sizes)
        said = drive(first, stop)
        resumed = make(3)
        resumed.start(sizes)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found = as_json(said + drive(resumed, 30 - stop, said[-1][0], start=stop))
        demand(found == expected, f"resumed after step {stop} it goes on differently: is all it holds in state_dict?")


def check_foreign_state(make: Make, sizes: Sequence[int], other: Sampler | None = None) -> None:
    """The state of another kind of sampler, or of another number of units, is refused."""
    theirs = other or _Other(1, 3)
    if other is None:
        theirs.start(sizes)
        drive(theirs, 7)
    sampler = started(make, sizes, 5)
    if type(theirs) is type(sampler):
        sampler.load_state_dict(theirs.state_dict())
        return
    ours, state = type(sampler).__name__, theirs.state_dict()
    told = f"the saved state is of a {type(theirs).__name__}, this sampler is a {ours}"
    check_refused(sampler, state, f"the state of a {type(theirs).__name__}", [told])
    unnamed = {key: value for key, value in state.items() if key not in ("sampler", "units")}
    if unnamed.keys() != sampler.state_dict().keys() - {"sampler", "units"}:
        told = f"the saved state is not one of a {ours}"
        check_refused(sampler, unnamed, f"the unnamed state of a {type(theirs).__name__}", [told])


class _Other(UniformSampler):
    """A sampler that nobody else has."""


def check_other_model(make: Make, sizes: Sequence[int]) -> None:
    """The state of a model with more units is refused."""
    sampler, theirs, more = started(make, sizes, 5), make(3), len(sizes) + 2
    theirs.start([10] * more)
    told = [f"the saved state is of {more} units, this model has {len(sizes)}"]
    check_refused(sampler, theirs.state_dict(), f"a state of {more} units", told)
    unnamed = {key: value for key, value in theirs.state_dict().items() if key not in ("sampler", "units")}
    if type(sampler).PER_UNIT:
        check_refused(sampler, unnamed, f"an unnamed state of {more} units", told)


def check_damaged_state(make: Make, sizes: Sequence[int]) -> None:
    """A state with a value missing, cut short, of the wrong type, or too many, is refused."""
    good = json.loads(json.dumps(started(make, sizes, 7).state_dict()))
    fresh = started(make, sizes)
    for key in good:
        if key not in ("sampler", "units", "measured_at"):  # the last is not in every earlier state
            without = {name: value for name, value in good.items() if name != key}
            check_refused(fresh, without, f"a state without {key}", ["missing or unknown"])
        if isinstance(good[key], list) and good[key]:
            check_refused(fresh, good | {key: good[key][:-1]}, f"a state with one value less in {key}")
        if isinstance(good[key], int) and not isinstance(good[key], bool) and key != "measured_at":
            check_refused(fresh, good | {key: "many"}, f"a state whose {key} is text")
    check_refused(fresh, good | {"more": 1}, "a state with an unknown value", ["more missing or unknown"])
    if "window" in good:
        wrong = good["window"] | {"values": [[99, 0, 1.0]]}
        check_refused(fresh, good | {"window": wrong}, "a damaged window", ["damaged"])
    fresh.load_state_dict(good)
    demand(held(fresh) == held(started(make, sizes, 7)), "a state that is right is not taken over after refusals")


def check_start_again(make: Make, sizes: Sequence[int], steps: Sequence[int] = (1, 2, 5, 12)) -> None:
    """``start`` begins anew, whatever went before."""
    for number in steps:
        used, fresh = started(make, sizes, number), started(make, sizes)
        used.start(sizes)
        demand(held(used) == held(fresh), f"started again after {number} steps it is not as new")
        same = as_json(drive(used, 20)) == as_json(drive(fresh, 20))
        demand(same, f"started again after {number} steps it goes on differently")


def check_not_finite(
    make: Make, sizes: Sequence[int], when: Sequence[int] = range(10), bad: Sequence[float] = (math.inf, math.nan)
) -> None:
    """Gradient norms that are not finite at one step leave finite probabilities and importance."""
    for step, value in ((step, value) for step in when for value in bad):
        sampler, active = make(0), None
        sampler.start(sizes)
        for now in range(16):
            sampler.probe(MadeUpPasses(now, len(sizes)))
            if sampler.due:
                active = sampler.sample()
            norms = norms_at(now, None if sampler.probing else active, len(sizes))
            sampler.observe(torch.full_like(norms, value) if now == step else norms)
        p, importance = sampler.probabilities(), sampler.importance()
        right = p is None or math.isclose(sum(p), 1, rel_tol=1e-6)
        demand(right, f"after norms of {value} at step {step} the probabilities are {p}")
        right = all(entry < 1e4 or math.isnan(entry) for entry in importance or ())
        demand(right, f"after norms of {value} at step {step} the importance is {importance}")


def check_largest_sets(make: Make, sizes: Sequence[int]) -> None:
    """No active set is heavier than the heaviest one of ``largest_active_sets``, whatever the units weigh."""
    units = len(sizes)
    for weights in ([1] * units, list(sizes), list(sizes)[::-1], [1] * (units - 1) + [50]):
        sampler = make(0)
        sampler.start(sizes)
        sets = sampler.largest_active_sets(weights)
        right = all(list(active) == sorted(set(active)) and len(active) <= units for active in sets)
        demand(right and sets, f"largest_active_sets are {sets}")
        most = max(sum(weights[unit] for unit in active) for active in sets)
        drawn = {active for active, *_ in drive(sampler, 80) if active}
        lowest = min(unit for active in drawn for unit in active)
        demand(lowest >= min(sets[0]), f"largest_active_sets are {sets}; the first must have unit {lowest}")
        for active in drawn:
            weight = sum(weights[unit] for unit in active)
            demand(weight <= most, f"it draws {active}, which weighs {weight}; largest_active_sets say {most} at most")


def check_frequencies(make: Make, sizes: Sequence[int]) -> None:
    """Units are drawn as often as their probabilities say, where one is drawn at a time."""
    sampler = make(0)
    if not isinstance(sampler, PeriodicSampler):
        return
    sampler.num_active_layers = 1
    sampler.start(sizes)
    drive(sampler, 12)
    if sampler.probabilities() is not None:
        p_value = first_draws(sampler)[1]
        demand(p_value > 1e-4, f"first draws do not follow probabilities() (chi-square p = {p_value:.2g})")


def first_draws(sampler: PeriodicSampler, draws: int = 6000) -> tuple[list[int], float]:
    """How often each unit is drawn, and the p value of a chi-square test against the sampler's probabilities."""
    from scipy.stats import chisquare

    p = sampler.probabilities()
    assert p is not None
    counts = [0] * len(p)
    for _ in range(draws):
        (unit,) = sampler.pick()
        sampler._draws += 1
        counts[unit] += 1
    possible = [unit for unit in range(len(p)) if p[unit] > 0]
    if sum(counts[unit] for unit in possible) < draws:
        return counts, 0.0
    found = chisquare([counts[unit] for unit in possible], [p[unit] * draws for unit in possible])
    return counts, float(found.pvalue)


CHECKS: Mapping[str, Callable[[Make, Sequence[int]], None]] = {
    "draws distinct units; probabilities sum to 1": check_draws,
    "draws from its seed alone": check_seed,
    "draws as often as its probabilities say": check_frequencies,
    "draws nothing heavier than largest_active_sets": check_largest_sets,
    "resumes from its state at any step": check_resume,
    "refuses the state of another sampler": check_foreign_state,
    "refuses the state of another model": check_other_model,
    "refuses a damaged state": check_damaged_state,
    "begins anew with start": check_start_again,
    "survives norms that are not finite": check_not_finite,
}
