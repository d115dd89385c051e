"""One colour-blind-safe colour a method in every figure, and the smoothing of curves.

::

    axes.plot(steps, smooth(losses, 5), color=colour_of("grass"))
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

# The palette of Okabe and Ito, black and grey for the two reference points.
_COLOURS = {
    "base": "#8a8a8a",
    "full": "#000000",
    "lora": "#E69F00",
    "lisa": "#0072B2",
    "grass": "#D55E00",
    "grass-static": "#CC79A7",
}
_OTHERS = ("#009E73", "#56B4E9", "#B8A600", "#882255", "#44AA99", "#332288", "#117733", "#AA4499")


def colour_of(method: str) -> str:
    """The method's colour, the same in every figure and process."""
    return _COLOURS.get(method) or _OTHERS[zlib.crc32(method.encode()) % len(_OTHERS)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` finite values up to each place; NaN where there is none."""
    smoothed = []
    for end in range(1, len(values) + 1):
        seen = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        smoothed.append(sum(seen) / len(seen) if seen else math.nan)
    return smoothed
