"""A figure with the numbers behind it: saved as PNG or SVG with a CSV file beside it, or put into a page as SVG.

::

    figure = draw_accuracy_memory(Runs.of(records))  # None if there is nothing to draw
    figure.save(Path("pareto.svg"))                  # and pareto.csv
    html = figure.inline_svg("f1")                   # follows the page's light or dark colours
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib import rc_context

from grass_ray.config import ConfigError, write_whole
from grass_ray.results.figures.style import DPI, EDGE, HOLE, SOFT, dark_colours
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable, build_leaderboard
from grass_ray.results.record import RunRecord

SUFFIXES = (".png", ".svg", ".pdf")
# Colours that follow the page when a figure is part of one.
_PAGE = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    SOFT: "var(--soft)",
    EDGE: "var(--edge)",
    HOLE: "var(--hole)",
}


@dataclass(frozen=True)
class Runs:
    """What a figure of many runs is drawn from: leaderboard tables, and the records they were built from.

    Attributes:
        tables: built from ``records``.
        records: of all runs; may be without what was measured at every step.
        whole: finds the whole record of one of them; None if all are whole.
    """

    tables: Sequence[LeaderboardTable]
    records: Sequence[RunRecord]
    whole: Callable[[RunRecord], RunRecord] | None = None

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> Runs:
        """The records with the tables built from them."""
        return cls(build_leaderboard(records), records)

    @cached_property
    def _by_id(self) -> dict[str, RunRecord]:
        return {record.run_id: record for record in self.records}

    def seeds(self, row: LeaderboardRow) -> list[RunRecord]:
        """The records of a row, one per seed."""
        return [self._by_id[run_id] for run_id in row.run_ids]

    def whole_seeds(self, row: LeaderboardRow) -> list[RunRecord]:
        """The same with what was measured at every step."""
        return self.seeds(row) if self.whole is None else list(map(self.whole, self.seeds(row)))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawn figure and its numbers.

    Attributes:
        name: of its file, without suffix.
        title: what it shows, in a few words.
        description: the same in one or two sentences, for readers who cannot see it.
        drawing: matplotlib's figure.
        header: names of the columns of ``rows``.
        rows: the numbers that are drawn.
    """

    name: str
    title: str
    description: str
    drawing: matplotlib.figure.Figure
    header: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def save(self, path: Path, *, with_csv: bool = True) -> list[Path]:
        """Write the figure in the format of the path's suffix, and the CSV beside it; returns the files written.

        Raises:
            ConfigError: matplotlib cannot write this suffix here.
        """
        check_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link is replaced, not followed
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.drawing.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
        if not with_csv:
            return [path]
        numbers = path.with_suffix(".csv")
        write_whole(numbers, self.csv())
        return [path, numbers]

    def csv(self) -> str:
        """The numbers as CSV; cells are empty where there is no number."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return out.getvalue()

    def _repr_png_(self) -> bytes:
        """The figure as a notebook shows it."""
        out = io.BytesIO()
        self.drawing.savefig(out, format="png", dpi=DPI)
        return out.getvalue()

    def inline_svg(self, key: str) -> str:
        """The figure as an ``<svg>`` element for an HTML page.

        Args:
            key: letters and digits, different for every figure of the page: ids inside begin with it.
        """
        out = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
            self.drawing.savefig(out, format="svg", metadata={"Date": None}, dpi=DPI, transparent=False)
        return _for_page(out.getvalue(), key, self.description)


def check_suffix(path: Path) -> None:
    """Raise :class:`ConfigError` unless figures can be written in the format of the path's suffix."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"cannot write a picture as {path}; the name must end in {', '.join(SUFFIXES)}")


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _for_page(svg: str, key: str, description: str) -> str:
    """What matplotlib wrote as part of an HTML page: no prologue, no addresses, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\sid="([^"]+)"', lambda found: f' id="{key}-{found[1]}"', svg)
    svg = re.sub(r'href="#([^"]+)"', lambda found: f'href="#{key}-{found[1]}"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{key}-{found[1]})", svg)
    svg = re.sub(r"font: ([^;\"]*?)(\d+(?:\.\d+)?)px [^;\"]*", r"font: \1\2px system-ui, sans-serif", svg)
    names = _PAGE | {light: f"var(--{_variable(light)})" for light in dark_colours()}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: names.get(found[0], found[0]), svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    head = f'<svg {size[0]} width="{size[1]}" height="{size[2]}" role="img" aria-label="{escape(description)}"'
    return re.sub(r"<svg[^>]*", lambda _: head, svg, count=1)


def _variable(colour: str) -> str:
    return f"c{colour.removeprefix('#')}"


def page_colour(colour: str) -> str:
    """A method's colour as a page with :func:`page_colours` in its style names it."""
    return f"var(--{_variable(colour)})"


def page_colours(*, dark: bool) -> str:
    """CSS declarations of every method's colour, for a page that holds figures."""
    pairs = dark_colours().items()
    return "; ".join(f"--{_variable(light)}: {on_dark if dark else light}" for light, on_dark in pairs)
