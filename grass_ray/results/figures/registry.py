"""Every kind of figure, once: ``grass-ray plot``, the page, and the files of a sweep and of a run follow this table.

::

    figures = draw_kind("pareto", tables, records)      # one, or one per method for kinds that show one run
    for figure in figures: figure.save(folder / f"{figure.name}.svg")
    write_sweep_plots(Runs(tables, records), folder)    # accuracy_memory.png, loss_comparison.png, ...
    write_run_plots(record, folder)                     # sampling.png, loss.png, ...

A new figure is a function and its entry in ``FIGURES``. Functions are named, not imported, so that the command line's
choices load no matplotlib.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_ray.config import slug

if TYPE_CHECKING:
    from grass_ray.results.figures.figure import Figure, Runs
    from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
    from grass_ray.results.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Plot:
    """How a figure is drawn and where it is written.

    Attributes:
        function: ``module:name`` of the function that draws it; it returns None if there is nothing to draw.
        file: name of its PNG in the folder of a sweep or of a run.
        numbers: whether the CSV is written beside the PNG, too.
    """

    function: str
    file: str
    numbers: bool = False

    def __call__(self, of: Runs | RunRecord, *, width: float | None = None) -> Figure | None:
        """Draw it, ``width`` inches wide if given."""
        sized: dict[str, Any] = {} if width is None else {"width": width}
        drawn: Figure | None = pkgutil.resolve_name(self.function)(of, **sized)
        return drawn

    def write(self, of: Runs | RunRecord, folder: Path) -> list[Path]:
        """Write it into ``folder``; returns the files written, none if there is nothing to draw."""
        drawn = self(of)
        return [] if drawn is None else drawn.save(folder / self.file, with_csv=self.numbers)


@dataclass(frozen=True, kw_only=True)
class FigureKind:
    """A kind of figure.

    Attributes:
        missing: why there may be nothing to draw.
        of_sweep: draws many runs, from :class:`grass_ray.results.figures.figure.Runs`.
        of_run: draws one run, from its record.
        heading: of the figure on the leaderboard page; empty for kinds that show one run, which stand together there.
        caption: of the figure on the leaderboard page; empty for its title.
    """

    missing: str
    of_sweep: Plot | None = None
    of_run: Plot | None = None
    heading: str = ""
    caption: str = ""


_HERE = "grass_ray.results.figures"
FIGURES: dict[str, FigureKind] = {
    "pareto": FigureKind(
        missing="no ranked row has an accuracy and a peak memory",
        of_sweep=Plot(function=f"{_HERE}.sweep:draw_accuracy_memory", file="accuracy_memory.png"),
        heading="Accuracy and memory",
        caption="Accuracy over peak allocated memory with 95 % intervals; ringed: on the Pareto front",
    ),
    "loss": FigureKind(
        missing="no run has a loss",
        of_sweep=Plot(function=f"{_HERE}.sweep:draw_loss_comparison", file="loss_comparison.png"),
        of_run=Plot(function=f"{_HERE}.run:draw_loss", file="loss.png"),
        heading="Loss",
        caption="Training loss against step and against training time, the highest row of each method; "
        "bands: from the lowest to the highest seed",
    ),
    "tasks": FigureKind(
        missing="no run was evaluated",
        of_sweep=Plot(function=f"{_HERE}.sweep:draw_tasks", file="tasks.png"),
        heading="Tasks",
        caption="Accuracy by task with Wilson intervals, the highest row of each method",
    ),
    "step-time": FigureKind(
        missing="no run has step times",
        of_sweep=Plot(function=f"{_HERE}.breakdown:draw_step_time", file="step_time.png"),
        heading="Step time",
        caption="Where training time goes, and how long a step takes; one run of the highest row of each method. "
        "Dots: medians; hollow: steps that end in a switch; lines: the middle 90 % of steps",
    ),
    "sensitivity": FigureKind(
        missing="no method has rows that differ in a setting",
        of_sweep=Plot(function=f"{_HERE}.breakdown:draw_sensitivity", file="sensitivity.png"),
        heading="Hyperparameters",
        caption="Accuracy over each setting that differs between rows of a method, with 95 % intervals",
    ),
    "search": FigureKind(
        missing="no run is of a search that was judged by held-out rows",
        of_sweep=Plot(function=f"{_HERE}.search:draw_search", file="search.png", numbers=True),
        heading="Search",
        caption="Loss on held-out rows of every trial, in the order of the search and over each setting",
    ),
    "rungs": FigureKind(
        missing="no run is of a search with --scheduler asha",
        of_sweep=Plot(function=f"{_HERE}.search:draw_rungs", file="rungs.png", numbers=True),
        heading="Trials stopped early",
        caption="Loss on held-out rows at the rungs of ASHA, and how far each trial came",
    ),
    "population": FigureKind(
        missing="no run is of a search with --scheduler pbt",
        of_sweep=Plot(function=f"{_HERE}.search:draw_population", file="population.png", numbers=True),
        heading="Population",
        caption="Loss on held-out rows and settings along each member's lineage; triangles: weights were taken over",
    ),
    "sampling": FigureKind(
        missing="no run drew layers", of_run=Plot(function=f"{_HERE}.run:draw_sampling", file="sampling.png")
    ),
    "importance": FigureKind(
        missing="no run measured importance",
        of_run=Plot(function=f"{_HERE}.run:draw_importance", file="importance.png"),
    ),
    "ages": FigureKind(
        missing="no run says how old its importance is",
        of_run=Plot(function=f"{_HERE}.run:draw_ages", file="ages.png"),
    ),
}


def draw_kind(kind: str, tables: Sequence[LeaderboardTable], records: Sequence[RunRecord]) -> list[Figure]:
    """The figures of a kind; empty if there is nothing to draw.

    Kinds that show one run give one figure per method (:func:`draw_methods`). The name of such a figure holds the
    method, and the table's number if there are several.
    """
    from grass_ray.results.figures.figure import Runs

    runs = Runs(tables, records)
    if (draw := FIGURES[kind].of_sweep) is not None:
        figure = draw(runs)
        return [] if figure is None else [figure]
    found = []
    for number, table in enumerate(tables, start=1):
        for row, figure in draw_methods(kind, table, runs):
            name = f"{kind}-{slug(row.method)}" + (f"-{number}" if len(tables) > 1 else "")
            found.append(replace(figure, name=name))
    return found


def draw_methods(
    kind: str, table: LeaderboardTable, runs: Runs, *, width: float | None = None
) -> list[tuple[LeaderboardRow, Figure]]:
    """A kind's figure of one run per method: the first seed that has any, of the method's highest row that has any."""
    draw = FIGURES[kind].of_run
    assert draw is not None, f"{kind} does not show one run"
    found: dict[str, tuple[LeaderboardRow, Figure]] = {}
    for row in table.rows:
        for record in () if row.method in found else runs.whole_seeds(row):
            if row.method not in found and (figure := draw(record, width=width)) is not None:
                found[row.method] = (row, figure)
    return list(found.values())


def write_sweep_plots(runs: Runs, folder: Path) -> list[Path]:
    """Draw what applies to the sweep into ``folder``; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for kind in FIGURES.values() if kind.of_sweep for path in kind.of_sweep.write(runs, folder)]


def write_run_plots(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what applies to the run into ``folder``; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for kind in FIGURES.values() if kind.of_run for path in kind.of_run.write(record, folder)]
