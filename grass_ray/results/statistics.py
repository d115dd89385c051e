"""Statistics of accuracies: Wilson intervals, paired tests and intervals, Benjamini-Hochberg. Pure functions.

::

    low, high = wilson_interval(successes=700, n=1319)
    p = mcnemar(correct_of_grass, correct_of_full)        # the same questions in the same order
    p = sign_flip([differences_of_task_one, differences_of_task_two])
    low, high = paired_bootstrap([differences_of_task_one, differences_of_task_two])
    low, high, p = two_level([(seeds_by_questions, theirs)], vary=(True, True))      # where both sides have seeds
    average = mean_of_shares([17 / 24, 5 / 24])
    adjusted = benjamini_hochberg([p, 0.2, 0.01])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import isfinite, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, false_discovery_control, norm
from scipy.stats import t as student

RESAMPLES = 2000
# Sums of thirds in another order must count as equal; averages over questions are never this close by chance.
_ROUNDING = 1e-8
# Shares are counts over so many answers at most; in doubles no two such fractions look alike.
_MOST_ANSWERS = 10_000_000


def mean_of_shares(shares: Iterable[float]) -> float:
    """Unweighted mean of shares that are counts over counts, rounded once.

    Averages that are equal as fractions are equal in every bit, whatever order and detour they came by, so that ties
    are ties. NaN where there is no share, or one that is not finite.
    """
    found = list(shares)
    if not found or not all(map(isfinite, found)):
        return nan
    return float(sum((Fraction(share).limit_denominator(_MOST_ANSWERS) for share in found), Fraction()) / len(found))


@lru_cache(maxsize=100_000)  # a leaderboard asks for the same few counts again and again
def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, without continuity correction; a mean over seeds need not be a whole number.

    Raises:
        ValueError: more successes than ``n``, or fewer than 0.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must be from 0 to n, and n at least 1; got {successes} of {n}")
    share, z = successes / n, float(norm.ppf((1 + confidence) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def average_interval(
    accuracies: Sequence[float], sizes: Sequence[int], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the unweighted mean of several tasks' accuracies; of one task it is Wilson's own.

    With task t's accuracy ``a_t``, Wilson limits ``l_t, u_t`` over its ``n_t`` questions, and T tasks, the limits are
    ``mean(a) - sqrt(sum((a_t - l_t)^2)) / T`` and ``mean(a) + sqrt(sum((u_t - a_t)^2)) / T``: the independent distances
    add in squares (Newcombe's combination), so that, unlike a normal interval, it has a width at 0 % and 100 % too.
    """
    mean = sum(accuracies) / len(accuracies)
    below = above = 0.0
    for accuracy, n in zip(accuracies, sizes, strict=True):
        low, high = wilson_interval(min(accuracy * n, n), n, confidence)
        below += (accuracy - low) ** 2
        above += (high - accuracy) ** 2
    return max(0.0, mean - sqrt(below) / len(sizes)), min(1.0, mean + sqrt(above) / len(sizes))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of paired correctness; 1 if the two never disagree."""
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    return 1.0 if only_first + only_second == 0 else _coin(only_first, only_first + only_second)


@lru_cache(maxsize=100_000)
def _coin(heads: int, throws: int) -> float:
    return float(binomtest(heads, throws, 0.5).pvalue)


def sign_flip(differences: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a paired difference that is averaged over tasks or seeds; McNemar's test, generalised.

    Where the two methods do not differ, each question's difference is as likely to be its own negative. The test
    flips signs at random, question by question, and counts how often the average is as large as the one seen. With one
    task and one seed that is McNemar's exact test drawn instead of computed. It keeps its level when few questions
    differ, where a p-value read off the bootstrap is too small.

    Args:
        differences: for each task, for each question, the first method's accuracy minus the second's, the mean over
            seeds (-1 to 1). The statistic is the unweighted mean over tasks of the means over questions.
        resamples: how many sign patterns are drawn; the smallest p-value is ``1 / (resamples + 1)``.
        seed: of the draws; the same seed gives the same p-value.
    """
    rng = np.random.default_rng(seed)
    flipped = np.zeros(resamples)
    for task in differences:
        sizes, counts = _distinct(np.abs(np.asarray(task, dtype=float)))
        for size, count in zip(sizes, counts, strict=True):  # equal sizes together: binomial instead of one by one
            if size > 0:
                flipped += size * (2 * rng.binomial(count, 0.5, size=resamples) - count) / len(task)
    seen = abs(sum(float(np.mean(task)) for task in differences))
    return float((np.count_nonzero(np.abs(flipped) >= seen - _ROUNDING) + 1) / (resamples + 1))


def paired_bootstrap(
    differences: Sequence[Sequence[float]], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a paired difference: questions are drawn again, with replacement, within each task.

    Args:
        differences: as for :func:`sign_flip`.
        confidence: share of resamples inside.
        resamples: how many.
        seed: of the draws; the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for task in differences:
        values, counts = _distinct(np.asarray(task, dtype=float))
        # drawing questions is drawing how often each distinct value comes up
        means += rng.multinomial(len(task), counts / counts.sum(), size=resamples) @ values / len(task)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means / len(differences), [tail, 1 - tail])
    return float(low), float(high)


def two_level(
    tasks: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    vary: tuple[bool, bool],
    confidence: float = 0.95,
    shares: bool = True,
) -> tuple[float, float, float]:
    """Interval and two-sided p-value of a difference between two methods that were trained several times each.

    Both other trainings and other questions would give another difference. Its variance is the sum of the variances
    of both sides' means over their seeds (``s^2 / seeds``, s the spread of the seeds' averages) and of the variance
    over questions that is left when the seeds' own disagreement about each question, which is in the first part
    already, is taken out. Limits and p-value are those of Student's t (:func:`total_variance`). If neither side
    varies, the test is over questions alone: of one task the paired t-test.

    Where only few questions are answered differently, t would be too sure: of right and wrong answers the p-value is
    never below that of :func:`sign_flip` on the means over seeds.

    ``benchmarks/training_variance.py`` simulates level and power.

    Args:
        tasks: for each task both sides' values, seeds by questions; the same questions in the same order.
        vary: whether a side was trained several times; what was not has no spread over trainings.
        confidence: of the interval.
        shares: whether the values are 0 or 1, for wrong and right; else any numbers, such as losses.

    Returns:
        Lower limit, upper limit, p-value. The interval holds 0 where the p-value is above ``1 - confidence``.
    """
    differences = [first.mean(axis=0) - second.mean(axis=0) for first, second in tasks]
    seen = float(np.mean([task.mean() for task in differences]))
    sides = [
        (values.shape[0], seed_variance([task[side] for task in tasks]))
        for side, values in enumerate(tasks[0])
        if vary[side] and values.shape[0] > 1
    ]
    questions = [
        (task.shape[0], question_variance(*pair, vary=vary)) for task, pair in zip(differences, tasks, strict=True)
    ]
    total, degrees = (float(value) for value in total_variance(sides, questions))
    half, p_value = 0.0, 1.0
    if total > 0:
        spread = student(degrees)
        half = float(spread.ppf((1 + confidence) / 2)) * sqrt(total)
        p_value = float(2 * spread.sf(abs(seen) / sqrt(total)))
    low, high = seen - half, seen + half
    if shares:
        p_value = max(p_value if total > 0 else 0.0, sign_flip([task.tolist() for task in differences]))
        low, high = max(-1.0, low), min(1.0, high)
    return *holding_zero((low, high), p_value, confidence), p_value


def total_variance(
    sides: Sequence[tuple[int, Any]], questions: Sequence[tuple[int, float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variance of a difference of means over seeds, tasks and questions, and the degrees of freedom of its t-test.

    With two or three seeds the estimate is rough, and a bootstrap over so few would be far too narrow. The degrees of
    freedom are, for the seeds, half-way (as harmonic mean) between Welch's, which take the spreads as they were seen
    and waste much where two or three seeds look more or less alike by chance, and Bell and McCaffrey's for sides of one
    spread (2 for two against two, 4 for three against three), which are too many where one side has all of it; then
    Satterthwaite's combination with the questions, which are many.

    Args:
        sides: for each side that was trained several times its seeds and the variance of its seeds' averages, a number
            or an array of possible ones.
        questions: for each task how many, and their variance.
    """
    of_seeds = sum((variance / n for n, variance in sides), np.zeros(()))
    squares = np.zeros(())
    if sides:
        alike = sum(1 / n for n, _ in sides) ** 2 / sum(1 / (n * n * (n - 1)) for n, _ in sides)
        as_seen = sum((variance / n) ** 2 / (n - 1) for n, variance in sides)
        squares = (as_seen + of_seeds**2 / alike) / 2
    of_questions = 0.0
    for n, variance in questions:
        if n > 1:
            own = variance / n / len(questions) ** 2
            of_questions += own
            squares = squares + own**2 / (n - 1)
    total = of_seeds + of_questions
    return total, np.divide(total**2, squares, out=np.ones_like(total), where=squares > 0)


def seed_variance(tasks: Sequence[NDArray[np.float64]]) -> float:
    """Variance over seeds of the average over tasks; of each task the values, seeds by questions."""
    return float(np.mean([values.mean(axis=1) for values in tasks], axis=0).var(ddof=1))


def question_variance(
    first: NDArray[np.float64], second: NDArray[np.float64], *, vary: tuple[bool, bool] = (True, True)
) -> float:
    """Variance over questions of a task's difference, without what the seeds of sides that vary disagree about."""
    if first.shape[1] < 2:
        return 0.0
    own = float((first.mean(axis=0) - second.mean(axis=0)).var(ddof=1))
    for values, varies in zip((first, second), vary, strict=True):
        if varies:
            own -= disagreement(values) / len(values)
    return max(0.0, own)


def disagreement(values: NDArray[np.float64]) -> float:
    """Variance of one seed's value for one question, without what all questions of a seed, or all seeds, share.

    Args:
        values: seeds by questions. Of one seed, or one question, nothing is known: 0.
    """
    seeds, questions = values.shape
    if min(seeds, questions) < 2:
        return 0.0
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float((rest**2).sum() / ((seeds - 1) * (questions - 1)))


def holding_zero(limits: tuple[float, float], p_value: float, confidence: float = 0.95) -> tuple[float, float]:
    """The limits, extended to 0 if the p-value is above ``1 - confidence``, so that interval and test agree."""
    low, high = limits
    return (min(low, 0.0), max(high, 0.0)) if p_value > 1 - confidence + 1e-12 else (low, high)


def _distinct(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    found, counts = np.unique(np.round(values, 9), return_counts=True)
    return found, counts


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the false discovery rate, in the given order."""
    if not p_values:
        return []
    return [float(p) for p in false_discovery_control(list(p_values), method="bh")]
