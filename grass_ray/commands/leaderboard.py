"""``grass-ray leaderboard``: rank the runs of tracking stores, or compare two sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from grass_ray.commands.flags import RunFilters
from grass_ray.config import ConfigError

if TYPE_CHECKING:
    from grass_ray.results.record import RunRecord


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
    peft: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of results of peft's method comparison, shown below as reference rows."""
    format: Literal["table", "markdown", "csv", "json", "html", "peft"] = "table"
    """Output format. peft writes a file per run in the form of its method comparison."""
    output: Path | None = None
    """File to write, or with --format peft a folder. Defaults to the terminal."""

    def run(self) -> int:
        """Print or write the table and return the exit code."""
        import shutil

        from grass_ray.results.leaderboard import build_leaderboard
        from grass_ray.results.rendering import render, render_comparison
        from grass_ray.results.sweep_comparison import compare_sweeps

        selection = self.runs.selection(self.sort, self.reverse)
        if self.compare is not None and (self.sort or self.runs.method or self.runs.status):
            raise ConfigError("--compare shows all rows of two sweeps; leave --sort, --method and --status out")
        self._check_peft()
        records = selection.records(self.runs.load(series=self.format in ("html", "peft")))
        if self.format == "peft":
            return self._write_peft(records)
        width = max(100, shutil.get_terminal_size().columns)
        if self.compare is not None:
            text = render_comparison(compare_sweeps(records, *self.compare), self.format, width=width)
        else:
            text = render(selection.tables(build_leaderboard(records)), self.format, width=width, records=records)
        if self.peft is not None:
            from grass_ray.results.peft_comparison import read_peft_results, render_reference

            shown: Literal["table", "markdown"] = "markdown" if self.format == "markdown" else "table"
            text += "\n\n" + render_reference(read_peft_results(self.peft), shown, width)
        if self.output is None:
            print(text)
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(text, encoding="utf-8")
            print(f"wrote {self.output}: {len(records)} runs")
        return 0

    def _check_peft(self) -> None:
        if self.peft is not None and self.format not in ("table", "markdown"):
            raise ConfigError("--peft is shown in the formats table and markdown; leave it out, or choose one of them")
        if self.format == "peft" and (self.output is None or self.compare is not None):
            raise ConfigError(
                "--format peft writes a file per run; give a folder with --output, and leave --compare out"
            )

    def _write_peft(self, records: list[RunRecord]) -> int:
        import sys

        from grass_ray.results.peft_comparison import write_peft_results

        assert self.output is not None
        files, left_out = write_peft_results(records, self.output)
        for reason in left_out:
            print(reason, file=sys.stderr)
        print(f"wrote {self.output}: {len(files)} run{'s' * (len(files) > 1)} in the form of peft's method comparison")
        return 0
