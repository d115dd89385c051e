"""How the units that a sampler picks from are ordered and named on an axis: layers, both ends, or weight matrices.

::

    rows = unit_rows(record.layers)
    axes.pcolormesh(edges, range(len(rows.order) + 1), values[rows.order])
    rows.label(axes)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from grass_ray.training.report import LayerTrace

MOST_NAMED = 60  # more units than that are weight matrices, and drawn in blocks of one kind


@dataclass(frozen=True, kw_only=True)
class UnitRows:
    """The rows of an axis, from the bottom up.

    Attributes:
        what: the units in the plural, "layers" or "weight matrices".
        names: of the units, in their own order.
        order: the unit of each row.
        place: the row of each unit.
        blocks: (name, first row, number of rows) of each kind of weight matrix; empty for layers.
    """

    what: str
    names: list[str]
    order: list[int]
    place: dict[int, int]
    blocks: list[tuple[str, int, int]]

    @property
    def height_inches(self) -> float:
        """A figure's height in inches in which every row can be seen."""
        per_row = 0.13 if len(self.order) <= MOST_NAMED else 0.042
        return min(max(2.6, 1.3 + per_row * len(self.order)), 11)

    def label(self, axes: Any, *, across: bool = False) -> None:
        """Name the rows on the y axis, or on the x axis with ``across``."""
        axis = axes.xaxis if across else axes.yaxis
        if self.blocks:
            axis.set_ticks([first + count / 2 - 0.5 for _, first, count in self.blocks])
            axis.set_ticklabels([name for name, _, _ in self.blocks], fontsize=8.5)
            for _, first, _ in self.blocks[1:]:
                axes.axhline(first - 0.5, color="white", linewidth=1.6)
                axes.axhline(first - 0.5, color="black", linewidth=0.6)
            axis.set_label_text("weight matrices, each block from the first layer up")
        elif any(not name.startswith("layer ") for name in self.names):
            last = len(self.order) - 1
            shown = sorted({0, last, *range(1, last, max(1, last // 8))})
            axis.set_ticks(shown)
            axis.set_ticklabels([self.names[self.order[row]] for row in shown], fontsize=8.5, rotation=45 * across)
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_label_text("layer")


def unit_rows(layers: LayerTrace) -> UnitRows:
    """Order and name the units of a run; records without names have layers."""
    names = layers.units or [f"layer_{index:02d}" for index in range(len(layers.visits))]
    matrices = [name.partition(".") for name in names]
    if len(names) <= MOST_NAMED or not all(inner for _, _, inner in matrices):
        order = list(range(len(names)))
        blocks: list[tuple[str, int, int]] = []
    else:
        kinds = list(dict.fromkeys(inner for _, _, inner in matrices))
        # within a kind the units keep their own order, that of the layers
        order = [unit for kind in kinds for unit, (_, _, inner) in enumerate(matrices) if inner == kind]
        counts = [sum(inner == kind for _, _, inner in matrices) for kind in kinds]
        firsts = [sum(counts[:index]) for index in range(len(kinds))]
        blocks = list(zip([_short(kind) for kind in kinds], firsts, counts, strict=True))
    return UnitRows(
        what="weight matrices" if any(inner for _, _, inner in matrices) else "layers",
        names=[_plain(name) for name in names],
        order=order,
        place={unit: row for row, unit in enumerate(order)},
        blocks=blocks,
    )


def _short(kind: str) -> str:
    """``self_attn.q_proj.weight`` as ``q_proj``."""
    parts = [part for part in kind.split(".") if part != "weight"]
    return parts[-1] if parts else kind


def _plain(name: str) -> str:
    """``layer_07.self_attn.q_proj.weight`` as ``layer 7 q_proj``."""
    layer, _, inner = name.partition(".")
    number = layer.removeprefix("layer_")
    head = f"layer {int(number)}" if layer.startswith("layer_") and number.isdigit() else layer
    return f"{head} {_short(inner)}" if inner else head
