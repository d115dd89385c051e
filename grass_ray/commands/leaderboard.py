"""``grass-ray leaderboard``: rank the runs of tracking stores, or compare two sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from grass_ray.commands.flags import RunFilters
from grass_ray.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Rank the runs of a tracking store by accuracy, with memory and speed.

    For example:
      grass-ray leaderboard --experiment quickstart --format html --output page.html
      grass-ray leaderboard --method full grass lora --sort peak_allocated_gib
      grass-ray leaderboard --compare SWEEP_ID_A SWEEP_ID_B --tracking-uri STORE_A --tracking-uri STORE_B
    """

    runs: RunFilters
    sort: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Sort by a key of the json format or by a task, best first."""
    reverse: bool = False
    """Reverse the order of --sort."""
    compare: Annotated[tuple[str, str] | None, arg(metavar="A B")] = None
    """Compare two sweeps, given by sweep ids or experiments, question by question."""
    format: Literal["table", "markdown", "csv", "json", "html"] = "table"
    """Output format."""
    output: Path | None = None
    """File to write. Defaults to the terminal."""

    def run(self) -> int:
        """Print or write the table and return the exit code."""
        import shutil

        from grass_ray.results.leaderboard import build_leaderboard
        from grass_ray.results.rendering import render, render_comparison
        from grass_ray.results.sweep_comparison import compare_sweeps

        selection = self.runs.selection(self.sort, self.reverse)
        if self.compare is not None and (self.sort or self.runs.method or self.runs.status):
            raise ConfigError("--compare shows all rows of two sweeps; leave --sort, --method and --status out")
        records = selection.records(self.runs.load(series=self.format == "html"))
        width = max(100, shutil.get_terminal_size().columns)
        if self.compare is not None:
            text = render_comparison(compare_sweeps(records, *self.compare), self.format, width=width)
        else:
            text = render(selection.tables(build_leaderboard(records)), self.format, width=width, records=records)
        if self.output is None:
            print(text)
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(text, encoding="utf-8")
            print(f"wrote {self.output}: {len(records)} runs")
        return 0
