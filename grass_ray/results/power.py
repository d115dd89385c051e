"""Which differences a comparison could have seen, and how many seeds and questions would see a given one.

::

    smallest_difference(sides=[(3, 0.0001), (3, 0.0001)], questions=[(300, 0.09)])       # with 80 % power at .05
    spread = Spread(seeds=0.0001, questions=0.09, disagreement=0.01)
    Design(seeds=5, questions=300).smallest(spread)
    questions_needed(0.02, spread, seeds=5), seeds_needed(0.02, spread, questions=300)

The power is that of the two-level t-test as :mod:`grass_ray.results.paired` runs it, of two methods whose averages are
normal: the test does not know the spread over seeds and estimates it from a few, so the power is averaged over the
estimates that so few seeds may give. Without seeds it is the power of the paired t-test over questions; the exact tests
of right and wrong answers are close to it. ``benchmarks/power.py`` simulates all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, stdtrit

from grass_ray.results.paired import LEVEL, Answers, Comparison
from grass_ray.results.statistics import disagreement, seed_variance, total_variance

POWER = 0.8  # how often a difference is found that is there
_GRID = 24  # estimates of a side's spread that are averaged over, equally likely
_MOST_SEEDS, _MOST_QUESTIONS = 200, 1_000_000

Sides = Sequence[tuple[int, float]]
Questions = Sequence[tuple[int, float]]


def power(difference: float, sides: Sides, questions: Questions, *, level: float = LEVEL) -> float:
    """How often the t-test finds a true difference.

    Args:
        difference: between the two methods.
        sides: for each side that was trained several times its seeds and the true variance of a training's average.
            Empty if the result is to cover these runs alone.
        questions: for each task how many, and the true variance of the difference over questions.
        level: of the two-sided test.
    """
    return _found(difference, sqrt(float(total_variance(sides, questions)[0])), _thresholds(sides, questions, level))


def smallest_difference(
    sides: Sides, questions: Questions, *, wanted: float = POWER, level: float = LEVEL
) -> float | None:
    """The smallest true difference that is found with the wanted power; None where nothing is known of its spread.

    Args:
        sides: as for :func:`power`.
        questions: as for :func:`power`.
        wanted: share of such comparisons that find it.
        level: of the two-sided test.
    """
    true = sqrt(float(total_variance(sides, questions)[0]))
    if true == 0:
        return None
    thresholds = _thresholds(sides, questions, level)
    most = float(thresholds.max()) + 10 * true
    return float(brentq(lambda difference: _found(difference, true, thresholds) - wanted, 0.0, most, xtol=1e-6 * true))


def _thresholds(sides: Sides, questions: Questions, level: float) -> NDArray[np.float64]:
    """How large a difference must look to be found, for equally likely estimates of the sides' spreads."""
    places = (np.arange(_GRID) + 0.5) / _GRID
    ratios = [chdtri(n - 1, places) / (n - 1) for n, _ in sides]  # of an estimate to the true variance
    grids = [ratio.ravel() for ratio in np.meshgrid(*ratios)]
    estimates = [(n, variance * ratio) for (n, variance), ratio in zip(sides, grids, strict=True)]
    total, degrees = total_variance(estimates, questions)
    return np.atleast_1d(stdtrit(degrees, 1 - level / 2) * np.sqrt(total))


def _found(difference: float, true: float, thresholds: NDArray[np.float64]) -> float:
    above, below = ndtr((difference - thresholds) / true), ndtr((-thresholds - difference) / true)
    return float(np.mean(above + below))


# ------------------------------------------------------------------------------------------------------------ planning


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The variances that a difference between two trained methods is made of, in squares of the metric's unit.

    Attributes:
        seeds: of a training's average that holds for all questions alike; None where no method has several seeds.
        questions: over questions of the difference between two methods, whatever their seeds; where no method has
            several seeds, of the difference between two runs.
        disagreement: of one training's value for one question, beyond what the training and the question explain.
    """

    seeds: float | None
    questions: float
    disagreement: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Design:
    """An experiment that compares two methods: seeds of each (None: these runs alone), questions of each task."""

    seeds: int | None
    questions: int
    tasks: int = 1

    def parts(self, spread: Spread) -> tuple[Sides, Questions]:
        """What :func:`power` takes."""
        questions = [(self.questions, spread.questions)] * self.tasks
        if self.seeds is None or spread.seeds is None:
            return [], questions
        training = spread.seeds + spread.disagreement / self.questions / self.tasks
        return [(self.seeds, training)] * 2, questions

    def power(self, difference: float, spread: Spread, *, level: float = LEVEL) -> float:
        """How often it finds a true difference."""
        return power(difference, *self.parts(spread), level=level)

    def smallest(self, spread: Spread, *, wanted: float = POWER, level: float = LEVEL) -> float | None:
        """The smallest difference that it finds with the wanted power."""
        return smallest_difference(*self.parts(spread), wanted=wanted, level=level)


def questions_needed(
    difference: float,
    spread: Spread,
    *,
    seeds: int | None,
    tasks: int = 1,
    wanted: float = POWER,
    level: float = LEVEL,
) -> int | None:
    """How many questions of each task find the difference with so many seeds; None if not even a million do."""

    def enough(questions: int) -> bool:
        design = Design(seeds=seeds, questions=questions, tasks=tasks)
        return design.power(difference, spread, level=level) >= wanted

    return _fewest(enough, 2, _MOST_QUESTIONS)


def seeds_needed(
    difference: float,
    spread: Spread,
    *,
    questions: int,
    tasks: int = 1,
    wanted: float = POWER,
    level: float = LEVEL,
) -> int | None:
    """How many seeds of each method find the difference with so many questions; None if not even two hundred do."""

    def enough(seeds: int) -> bool:
        design = Design(seeds=seeds, questions=questions, tasks=tasks)
        return design.power(difference, spread, level=level) >= wanted

    return _fewest(enough, 2, _MOST_SEEDS)


def _fewest(enough: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number that is enough, where more is never worse."""
    if not enough(most):
        return None
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle + 1, most)
    return least


# ---------------------------------------------------------------------------------------------- of a table's records


class SeedSpread:
    """The spread over seeds of a table's rows, pooled: a row's own two or three seeds would say too little."""

    def __init__(self) -> None:
        self._degrees = 0
        self._averages = self._disagreement = self._questions = 0.0

    def add(self, answers: Answers) -> None:
        """Take in a row; one that was not trained, or once, says nothing."""
        tasks = [task.values for task in answers.tasks.values() if task.values.shape[1]]
        seeds = min((len(values) for values in tasks), default=0)
        if answers.trained and seeds > 1:
            self._degrees += seeds - 1
            self._averages += (seeds - 1) * seed_variance(tasks)
            own = [disagreement(values) for values in tasks]
            self._disagreement += (seeds - 1) * fmean(own)
            of_averages = sum(one / values.shape[1] for one, values in zip(own, tasks, strict=True)) / len(tasks) ** 2
            self._questions += (seeds - 1) * of_averages

    @property
    def of_averages(self) -> float | None:
        """Variance of a training's average over these questions; None if no row has several seeds."""
        return self._averages / self._degrees if self._degrees else None

    def spread(self, compared: Iterable[Comparison]) -> Spread | None:
        """All variances, those over questions from comparisons; None if there are none."""
        found = list(compared)
        several = [comparison for comparison in found if len(comparison.seeds) == 2] or found
        if not several:
            return None
        questions = fmean(fmean(variance for _, variance in comparison.questions) for comparison in several)
        if not self._degrees or not several[0].seeds:
            return Spread(seeds=None, questions=questions)
        rest = self._disagreement / self._degrees
        if self._averages < self._questions:
            # seeds disagree about questions in ways that cancel in an average, such as a liking for one of the options
            return Spread(seeds=0.0, questions=questions, disagreement=rest * self._averages / self._questions)
        return Spread(seeds=(self._averages - self._questions) / self._degrees, questions=questions, disagreement=rest)


def with_detectable(found: Mapping[int, Comparison], seeds: SeedSpread) -> dict[int, Comparison]:
    """The comparisons with the smallest difference that each could have seen."""
    averages = seeds.of_averages or 0.0
    return {
        key: replace(
            comparison, detectable=smallest_difference([(n, averages) for n in comparison.seeds], comparison.questions)
        )
        for key, comparison in found.items()
    }
