"""How numbers and words read in tables for people: the only formatters of percent, limits, p-values and Markdown.

::

    percent(0.615), limits(0.58, 0.65), p_text(0.0004)        # "61.5", "58.0-65.0", "<.001"
    lines = markdown_table(["method", "acc. %"], [["grass", "61.5"]], words={"method"})
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from html import escape

NONE = "-"  # what a cell without a value shows
NOT_TOLD = "≈1"  # the rank of a row that cannot be told from the first


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """``scale * value`` with a fixed number of digits."""
    return NONE if value is None else f"{scale * value:.{digits}f}"


def gib(value: float | None) -> str:
    """Gibibytes with enough digits for small models too."""
    return NONE if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def p_text(value: float | None) -> str:
    """A p-value with three digits."""
    return NONE if value is None else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def percent(value: float | None) -> str:
    """A share (0 to 1) in percent, without the percent sign."""
    return NONE if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return NONE if value is None else f"{100 * value:+.1f}"


def nats(value: float | None) -> str:
    """A loss."""
    return number(value, 3)


def nats_more(value: float | None) -> str:
    """A difference of losses, with its sign."""
    return NONE if value is None else f"{value:+.3f}"


def limits(low: float | None, high: float | None, form: Callable[[float | None], str] = percent) -> str:
    """An interval of what ``form`` writes; of a share in percent, ``58.0-65.0``."""
    if low is None or high is None:
        return NONE
    return f"{form(low)}{'-' if form is percent else ' to '}{form(high)}"


def times(value: float | None) -> str:
    """A ratio, as ``x1.25``."""
    return NONE if value is None else f"x{value:.2f}"


def scope(covers_training: bool | None) -> str:
    """What a p-value covers: other training runs (seeds) too, or these runs alone."""
    return NONE if covers_training is None else "any seed" if covers_training else "these runs"


def markdown_text(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    for mark in "\\|*_`#[":
        text = text.replace(mark, "\\" + mark)
    return escape(" ".join(text.split()), quote=False)


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str]) -> list[str]:
    """Lines of a Markdown table; columns named in ``words`` are aligned left, the others, numbers, right."""
    lines = ["| " + " | ".join(map(markdown_text, names)) + " |"]
    lines.append("|" + "|".join(" --- " if name in words else " ---: " for name in names) + "|")
    return lines + ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows]
