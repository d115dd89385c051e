"""Statistics of accuracies: Wilson intervals, exact McNemar, Benjamini-Hochberg. Pure functions over scipy.

::

    low, high = wilson_interval(successes=700, n=1319)
    p = mcnemar(correct_of_grass, correct_of_full)        # the same questions in the same order
    adjusted = benjamini_hochberg([p, 0.2, 0.01])
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from scipy.stats import binomtest, false_discovery_control


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, without continuity correction."""
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


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
        successes = round(accuracy * n)  # a mean over seeds need not be a whole number of questions
        low, high = wilson_interval(successes, n, confidence)
        below += (successes / n - low) ** 2
        above += (high - successes / n) ** 2
    return max(0.0, mean - sqrt(below) / len(sizes)), min(1.0, mean + sqrt(above) / len(sizes))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of paired correctness; 1 where the two never disagree."""
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the false discovery rate, in the given order."""
    if not p_values:
        return []
    return [float(p) for p in false_discovery_control(list(p_values), method="bh")]
