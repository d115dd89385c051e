"""A check: numbers that were given and what they come to when they are computed again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

# processors and versions of numpy differ in the last bits of a sum
_SAME = 1e-9
_LONGEST = 100  # characters of a value in a message


@dataclass(kw_only=True)
class Check:
    """One group of numbers.

    Attributes:
        what: was checked.
        numbers: how many were compared.
        disagreements: one sentence each.
        remarks: what a reader should know, although no number is wrong.
    """

    what: str
    numbers: int = 0
    disagreements: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def same(self, name: str, given: Any, recomputed: Any) -> None:
        """Compare a number, or anything else, with what it comes to."""
        self.numbers += 1
        if not same(given, recomputed):
            self.disagreements.append(f"{name}: {_shown(given)} given, {_shown(recomputed)} recomputed")

    def holds(self, name: str, given: Any, rule: str, kept: bool) -> None:
        """Note whether a value keeps a rule."""
        self.numbers += 1
        if not kept:
            self.disagreements.append(f"{name}: {_shown(given)} given, must be {rule}")


def same(given: Any, recomputed: Any) -> bool:
    """Whether values are equal; numbers to nine significant digits, and none that is not a number differs from another.

    Texts, and numbers that were rounded to be shown, must be equal in every character.
    """
    if isinstance(given, bool) or isinstance(recomputed, bool):
        return given is recomputed
    if isinstance(given, int | float) and isinstance(recomputed, int | float):
        both_nan = math.isnan(given) and math.isnan(recomputed)
        return both_nan or math.isclose(given, recomputed, rel_tol=_SAME, abs_tol=1e-12)
    if isinstance(given, list | tuple) and isinstance(recomputed, list | tuple):
        return len(given) == len(recomputed) and all(map(same, given, recomputed))
    if isinstance(given, dict) and isinstance(recomputed, dict):
        return given.keys() == recomputed.keys() and all(same(given[key], recomputed[key]) for key in given)
    return bool(given == recomputed)


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
