"""A picture with the numbers behind it: saved as PNG or SVG with a CSV file beside it, or put into a page as SVG.

::

    picture = draw_accuracy_memory(tables)            # None where there is nothing to draw
    picture.save(Path("pareto.svg"))                  # and pareto.csv
    html = picture.inline_svg()                       # follows the page's light or dark colours
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from grass_ray.config import ConfigError
from grass_ray.results.figures.colours import dark_colours

DPI = 150
SOFT = "#444444"  # notes
EDGE = "#999999"  # helper lines
HOLE = "#e4e4e4"  # nothing measured
SUFFIXES = (".png", ".svg", ".pdf")
# Colours that follow the page when a picture stands in one.
_PAGE = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    SOFT: "var(--soft)",
    EDGE: "var(--edge)",
    HOLE: "var(--hole)",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure: ``description`` says in words what it shows, ``header`` and ``rows`` are its numbers."""

    name: str
    title: str
    description: str
    figure: Figure
    header: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def save(self, path: Path, *, with_csv: bool = True) -> list[Path]:
        """Write the picture, in the format of the path's suffix, and the CSV beside it; returns the files written.

        Raises:
            ConfigError: a suffix that is no picture's.
        """
        check_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
        if not with_csv:
            return [path]
        numbers = path.with_suffix(".csv")
        numbers.write_text(self.csv(), encoding="utf-8")
        return [path, numbers]

    def csv(self) -> str:
        """The numbers as CSV, empty where there is none."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return out.getvalue()

    def inline_svg(self, key: str) -> str:
        """The picture as an element of a page.

        Args:
            key: letters and digits, different for every picture of the page: ids inside begin with it.
        """
        out = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
            self.figure.savefig(out, format="svg", metadata={"Date": None}, dpi=DPI, transparent=False)
        return _for_page(out.getvalue(), key, self.description)


def check_suffix(path: Path) -> None:
    """Raise :class:`ConfigError` unless the path's suffix is a picture's."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"cannot write a picture as {path}; the name must end in {', '.join(SUFFIXES)}")


def plain(text: str) -> str:
    """Text for a picture: what matplotlib would read as a formula stays text."""
    return text.replace("$", r"\$")


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


def page_colours(*, dark: bool) -> str:
    """CSS declarations of every method's colour, for a page that holds pictures."""
    pairs = dark_colours().items()
    return "; ".join(f"--{_variable(light)}: {on_dark if dark else light}" for light, on_dark in pairs)


def tidy(axes: Any) -> None:
    """A light grid and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
