"""``grass-ray plot``: draw a figure of the runs of a tracking store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional
from tyro.extras import literal_type_from_choices

from grass_ray.commands.flags import RunFilters
from grass_ray.config import ConfigError
from grass_ray.results.figures.registry import FIGURES

if TYPE_CHECKING:
    FigureName = str
else:
    FigureName = literal_type_from_choices(FIGURES)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw a figure of the runs of a tracking store, and write its numbers as CSV beside it.

    For example:
      grass-ray plot pareto --experiment quickstart
      grass-ray plot loss --method full grass --output loss.svg
      grass-ray plot sampling --model smollm2-135m --output sampling.png
    """

    kind: Positional[FigureName]
    """Figure to draw."""
    runs: RunFilters
    output: Path | None = None
    """File to write: .png, .svg or .pdf. Defaults to KIND.png."""

    def run(self) -> int:
        """Write the figures and return the exit code."""
        from grass_ray.results.figures.figure import check_suffix
        from grass_ray.results.figures.registry import draw_kind
        from grass_ray.results.leaderboard import build_leaderboard

        output = self.output or Path(f"{self.kind}.png")
        check_suffix(output)
        selection = self.runs.selection()
        records = selection.records(self.runs.load())
        figures = draw_kind(self.kind, selection.tables(build_leaderboard(records)), records)
        if not figures:
            raise ConfigError(f"there is nothing to draw: {FIGURES[self.kind].missing}")
        for figure in figures:
            suffix = figure.name.removeprefix(self.kind) if len(figures) > 1 else ""
            written = figure.save(output.with_stem(output.stem + suffix))
            print(f"wrote {' and '.join(map(str, written))}: {figure.description}")
        return 0
