"""One style a method in every figure: a colour, a marker and a dash that colour-blind readers can tell apart.

::

    style = style_of("grass")
    axes.plot(steps, smooth(losses, 5), color=style.colour, linestyle=style.dash)

Nineteen colours cannot all be told apart, least of all without red or green: methods whose colours come close differ
in marker and dash. tests/results/test_colours.py looks through simulated colour-blind eyes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Dash = str | tuple[float, tuple[float, ...]]

SOLID: Dash = "-"
DASHED: Dash = (0, (5, 2))
DOTTED: Dash = (0, (1, 1.4))
DASH_DOT: Dash = (0, (6, 1.6, 1.4, 1.6))
LONG: Dash = (0, (9, 2.5))
DASH_DOT_DOT: Dash = (0, (5, 1.4, 1.2, 1.4, 1.2, 1.4))


class Style(NamedTuple):
    """How a method looks. ``on_dark`` is the same hue, readable on a dark page."""

    colour: str
    on_dark: str
    marker: str
    dash: Dash

    def line(self) -> dict[str, Any]:
        """Arguments of a matplotlib line."""
        return {"color": self.colour, "linestyle": self.dash}


# The palette of Okabe and Ito first (black and grey for the two reference points), then Tol's muted one.
STYLES: Mapping[str, Style] = {
    "base": Style("#7d7d7d", "#a0a0a0", "x", DOTTED),
    "full": Style("#000001", "#f2f2f2", "s", SOLID),
    "lora": Style("#e69f00", "#e69f00", "^", SOLID),
    "dora": Style("#b37400", "#cf9030", "v", DASHED),
    "ist": Style("#8a6d00", "#b89a2e", "<", DASH_DOT),
    "prefix": Style("#b8a600", "#cfc03a", "h", DOTTED),
    "prompt": Style("#999933", "#b5b55a", "8", DASH_DOT_DOT),
    "lisa": Style("#0072b2", "#4aa3dd", "D", SOLID),
    "lisa-keep": Style("#56b4e9", "#7cc6ef", "d", LONG),
    "ows": Style("#009e73", "#2bbd92", "P", SOLID),
    "ows-galore": Style("#44aa99", "#5cc4b3", "p", DASHED),
    "galore": Style("#117733", "#3fa35f", ">", DASH_DOT),
    "apollo": Style("#5a8f29", "#82b552", "H", LONG),
    "lift": Style("#332288", "#9486e0", "1", DASH_DOT),
    "hift": Style("#7a6ad8", "#b3a8f5", "2", DOTTED),
    "badam": Style("#882255", "#cc6699", "*", LONG),
    "misa": Style("#aa4499", "#cc70bd", "X", DASH_DOT_DOT),
    "grass": Style("#d55e00", "#f07f2a", "o", SOLID),
    "grass-static": Style("#cc79a7", "#dd94bb", "3", DASH_DOT),
    "grass-fresh": Style("#a63d00", "#e8906a", "4", DASHED),
}
_OTHER_COLOURS = (("#661100", "#cc7766"), ("#6699cc", "#7fb0e0"), ("#888800", "#bbbb44"), ("#996677", "#bf8f9f"))
_OTHER_MARKERS = ("4", "+", "d", "H", "8")
_OTHER_DASHES = (LONG, DASH_DOT, DOTTED)


def style_of(method: str) -> Style:
    """The method's style, the same in every figure and process; for unknown names one made from the name."""
    if method in STYLES:
        return STYLES[method]
    number = zlib.crc32(method.encode())
    colour, on_dark = _OTHER_COLOURS[number % len(_OTHER_COLOURS)]
    marker = _OTHER_MARKERS[number // 7 % len(_OTHER_MARKERS)]
    return Style(colour, on_dark, marker, _OTHER_DASHES[number // 41 % len(_OTHER_DASHES)])


def colour_of(method: str) -> str:
    """The method's colour."""
    return style_of(method).colour


def dark_colours() -> dict[str, str]:
    """Every method's colour on light paper to the one on dark."""
    pairs = [(style.colour, style.on_dark) for style in STYLES.values()]
    return dict([*pairs, *_OTHER_COLOURS])


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` finite values up to each place; NaN where there is none."""
    smoothed = []
    for end in range(1, len(values) + 1):
        seen = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        smoothed.append(sum(seen) / len(seen) if seen else math.nan)
    return smoothed
