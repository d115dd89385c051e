"""Settings that change over training: ``Linear(1.0, 0.2, steps=1000)`` wherever a sampler takes a number.

A schedule maps the optimizer step (probing left out) to a value. Beyond ``steps`` it keeps its last value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A value over training."""

    steps: int

    def at(self, step: int) -> float:
        """The value at optimizer step ``step``, from 0."""

    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value it takes."""


Scheduled = float | Schedule


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in equal steps.

    Raises:
        ValueError: ``steps`` is below 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def at(self, step: int) -> float:
        """The value at ``step``."""
        return self.start + (self.end - self.start) * _progress(step, self.steps)

    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.start, self.end), max(self.start, self.end)


@dataclass(frozen=True)
class Cosine(Linear):
    """From ``start`` to ``end`` along half a cosine: slow, fast, slow.

    Raises:
        ValueError: ``steps`` is below 1.
    """

    def at(self, step: int) -> float:
        """The value at ``step``."""
        share = (1 - math.cos(math.pi * _progress(step, self.steps))) / 2
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Step:
    """``values`` one after another; ``at_progress`` says at which shares of ``steps`` the next one begins.

    Raises:
        ValueError: the boundaries are not one fewer than the values, ascending and inside (0, 1), or ``steps`` is
            below 1.
    """

    values: Sequence[float]
    at_progress: Sequence[float]
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        check_boundaries(self.values, self.at_progress)

    def at(self, step: int) -> float:
        """The value at ``step``."""
        progress = _progress(step, self.steps)
        return self.values[sum(progress >= boundary for boundary in self.at_progress)]

    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.values), max(self.values)


def value_at(value: Scheduled, step: int) -> float:
    """The number a setting stands for at ``step``."""
    return value if isinstance(value, int | float) else value.at(step)


def count_at(value: Scheduled, step: int) -> int:
    """As :func:`value_at`, rounded to the nearest whole number (halves up)."""
    return math.floor(value_at(value, step) + 0.5)


def bounds_of(value: Scheduled) -> tuple[float, float]:
    """The smallest and the largest number a setting stands for."""
    return (value, value) if isinstance(value, int | float) else value.bounds()


def described(value: Scheduled) -> str:
    """A number as it is, a schedule by its kind."""
    return f"{value}" if isinstance(value, int | float) else type(value).__name__.lower()


def check_boundaries(values: Sequence[float], at_progress: Sequence[float]) -> None:
    """Raise ValueError unless ``at_progress`` separates ``values``."""
    ascending = all(a < b for a, b in zip([0.0, *at_progress], [*at_progress, 1.0], strict=True))
    if not values or len(at_progress) != len(values) - 1 or not ascending:
        raise ValueError(
            f"a step schedule of values {list(values)} has boundaries {list(at_progress)}; it needs one fewer than "
            "values, ascending, each between 0 and 1 (share of training)"
        )


def _progress(step: int, steps: int) -> float:
    return min(max(step, 0) / steps, 1.0)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a schedule over {steps} steps; it must be at least 1")
