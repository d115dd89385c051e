"""How figures look: one style per method, grids of panels, legends and titles that fit the figure's width.

::

    style = style_of("grass")
    axes.plot(steps, losses, **style.line())

Forty colours cannot all be told apart, least of all without red or green: methods of similar colours differ in marker
and dash. ``tests/results/figures/test_colours.py`` compares them as colour-blind readers see them.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure as Drawing

DPI = 150
SOFT = "#444444"  # notes
EDGE = "#999999"  # helper lines
HOLE = "#e4e4e4"  # nothing measured
_CHARACTERS_PER_INCH = 12  # of a title

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
    "rslora": Style("#355522", "#aad094", "_", DOTTED),
    "pissa": Style("#ab0eec", "#be50ec", "s", LONG),
    "vera": Style("#052bba", "#5d7cf2", "^", DASH_DOT_DOT),
    "randlora": Style("#4a97c8", "#9bc2dc", "v", DOTTED),
    "loha": Style("#0fbd8b", "#71ecc9", "<", LONG),
    "lokr": Style("#168b38", "#a0ebb6", "D", DASHED),
    "miss": Style("#6d0609", "#f17d81", ">", DASH_DOT_DOT),
    "oft": Style("#4f396b", "#957bb4", "d", SOLID),
    "c3a": Style("#482e8e", "#8e76cc", "p", DOTTED),
    "fourierft": Style("#db26a5", "#d84aad", "H", DASHED),
    "ia3": Style("#8ab90b", "#c3ec56", "*", DASH_DOT),
    "ln-tuning": Style("#6312a8", "#ab64e7", "h", SOLID),
    "lisa": Style("#0072b2", "#4aa3dd", "D", SOLID),
    "lisa-keep": Style("#56b4e9", "#7cc6ef", "d", LONG),
    "ows": Style("#009e73", "#2bbd92", "P", SOLID),
    "ows-galore": Style("#44aa99", "#5cc4b3", "p", DASHED),
    "galore": Style("#117733", "#3fa35f", ">", DASH_DOT),
    "apollo": Style("#5a8f29", "#82b552", "H", LONG),
    "lift": Style("#332288", "#9486e0", "1", DASH_DOT),
    "hift": Style("#7a6ad8", "#b3a8f5", "2", DOTTED),
    "badam": Style("#882255", "#cc6699", "*", LONG),
    "bread": Style("#704785", "#ba9cc9", "8", LONG),
    "misa": Style("#aa4499", "#cc70bd", "X", DASH_DOT_DOT),
    "grass": Style("#d55e00", "#f07f2a", "o", SOLID),
    "grass-static": Style("#cc79a7", "#dd94bb", "3", DASH_DOT),
    "grass-fresh": Style("#a63d00", "#e8906a", "4", DASHED),
    "uniform": Style("#4477aa", "#77aadd", ".", DASHED),
    "top": Style("#bb5566", "#dd7788", "+", DASH_DOT),
    "inverse": Style("#225555", "#66aaaa", "|", DASH_DOT_DOT),
    "first-third": Style("#595e15", "#dfe48d", "1", LONG),
    "middle-third": Style("#5c1f91", "#b27be2", "2", LONG),
    "last-third": Style("#84500c", "#f4c88d", "3", DASH_DOT_DOT),
    "adagradselect": Style("#690a07", "#f57c78", "x", LONG),
    "grades": Style("#0cbd7c", "#55f4b9", "4", DASH_DOT),
    "sgd": Style("#04156e", "#90a1fa", "+", DASH_DOT_DOT),
    "muon": Style("#705b09", "#f4dc7f", ".", DOTTED),
    "grass-muon": Style("#69360b", "#f2bb8e", "|", SOLID),
}
_OTHER_COLOURS = (("#661100", "#cc7766"), ("#6699cc", "#7fb0e0"), ("#888800", "#bbbb44"), ("#996677", "#bf8f9f"))
_OTHER_MARKERS = ("4", "+", "d", "H", "8")
_OTHER_DASHES = (LONG, DASH_DOT, DOTTED)


def style_of(method: str) -> Style:
    """The method's style, the same in every figure and process; derived from the name if ``STYLES`` has none."""
    if method in STYLES:
        return STYLES[method]
    number = zlib.crc32(method.encode())
    colour, on_dark = _OTHER_COLOURS[number % len(_OTHER_COLOURS)]
    marker = _OTHER_MARKERS[number // 7 % len(_OTHER_MARKERS)]
    return Style(colour, on_dark, marker, _OTHER_DASHES[number // 41 % len(_OTHER_DASHES)])


def dark_colours() -> dict[str, str]:
    """Every method's colour on light paper to the one on dark."""
    pairs = [(style.colour, style.on_dark) for style in STYLES.values()]
    return dict([*pairs, *_OTHER_COLOURS])


# ------------------------------------------------------------------------------------------------------ panels and text


class Block(NamedTuple):
    """Panels that belong together, such as those of one leaderboard table: how many, and heights in inches."""

    panels: int
    panel_height: float
    extra_height: float = 0.4  # title and legend


def draw_blocks(
    blocks: Sequence[Block], *, width: float, panel_width: float, share_y: bool = True
) -> tuple[Drawing, list[tuple[Any, list[Any]]]]:
    """An empty drawing of blocks of panels, one block above the other.

    Args:
        blocks: at least one.
        width: of the drawing in inches.
        panel_width: in inches; as many panels stand side by side as ``width`` has room for.
        share_y: whether the panels of a block share their y axis.

    Returns:
        The drawing, and for each block matplotlib's ``SubFigure`` and the ``Axes`` in it.
    """
    across = max(1, min(int(width / panel_width), max(block.panels for block in blocks)))
    downs = [math.ceil(block.panels / across) for block in blocks]
    heights = [down * block.panel_height + block.extra_height for down, block in zip(downs, blocks, strict=True)]
    drawing = Drawing(figsize=(min(width, max(6.0, across * panel_width)), sum(heights)), layout="constrained")
    parts = drawing.subfigures(len(blocks), squeeze=False, height_ratios=heights)[:, 0]
    found = []
    for part, down, block in zip(parts, downs, blocks, strict=True):
        axes = list(part.subplots(down, across, sharey=share_y, squeeze=False).flat)
        for surplus in axes[block.panels :]:
            surplus.set_visible(False)
        found.append((part, axes[: block.panels]))
    return drawing, found


def legend(part: Any, handles: Sequence[Any], width: float) -> None:
    """A legend below a drawing or a block, in as many columns as ``width`` inches have room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(width / (0.65 + 0.075 * longest))))
    part.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, handlelength=3)


def plain(text: str) -> str:
    """Text for a figure: what matplotlib would read as a formula stays text."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: float) -> str:
    """:func:`plain` text with line breaks, so that a title fits into ``width`` inches."""
    return plain(textwrap.fill(text, max(20, int(_CHARACTERS_PER_INCH * width))))


def tidy(axes: Any, *, axis: Literal["both", "x"] = "both") -> None:
    """A light grid and no frame above and to the right."""
    axes.grid(alpha=0.25, axis=axis)
    axes.spines[["top", "right"]].set_visible(False)


def is_number(text: str) -> bool:
    """Whether a setting's text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def spans_decades(values: Sequence[float]) -> bool:
    """Whether values are positive and so far apart that a logarithmic axis shows them better."""
    return bool(values) and min(values) > 0 and max(values) >= 8 * min(values)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` finite values at each position; NaN where there is none."""
    smoothed = []
    for end in range(1, len(values) + 1):
        seen = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        smoothed.append(sum(seen) / len(seen) if seen else math.nan)
    return smoothed
