"""Every figure, once: what ``grass-ray plot`` offers, which files a sweep and a run get, what is said where one lacks.

::

    pictures = draw_kind("pareto", tables, records)     # one a kind, or one a run for the kinds that show a run
    for picture in pictures: picture.save(folder / f"{picture.name}.svg")
    write_sweep_plots(records, folder)                  # accuracy_memory.png, loss_comparison.png, ...
    write_run_plots(record, folder)                     # sampling.png, loss.png, ...

A new figure is a line in one of the two tables, and its name in :mod:`grass_ray.results.figures.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grass_ray.config import slug
from grass_ray.results.figures.breakdown import draw_sensitivity, draw_step_time, draw_tasks
from grass_ray.results.figures.figure import Picture
from grass_ray.results.figures.kinds import Kind
from grass_ray.results.figures.run import draw_ages, draw_importance, draw_loss, draw_sampling
from grass_ray.results.figures.search import draw_population, draw_rungs, draw_search
from grass_ray.results.figures.sweep import draw_accuracy_memory, draw_loss_comparison
from grass_ray.results.leaderboard import LeaderboardTable, build_leaderboard
from grass_ray.results.record import RunRecord

Tables = Sequence[LeaderboardTable]
Records = Sequence[RunRecord]


@dataclass(frozen=True, kw_only=True)
class SweepFigure:
    """A figure of many runs.

    ``draw`` gives None where there is nothing to draw, and ``missing`` says why. ``file`` is its name in a sweep's
    summary, with the numbers beside it if ``numbers``: the leaderboard's own files have what is behind the others.
    """

    draw: Callable[[Tables, Records], Picture | None]
    missing: str
    file: str
    numbers: bool = False


@dataclass(frozen=True, kw_only=True)
class RunFigure:
    """The same of one run, with its name in the run's folder."""

    draw: Callable[[RunRecord], Picture | None]
    missing: str
    file: str


SWEEP_FIGURES: Mapping[Kind, SweepFigure] = {
    "pareto": SweepFigure(
        draw=lambda tables, records: draw_accuracy_memory(tables),
        missing="no ranked row has an accuracy and a peak memory",
        file="accuracy_memory.png",
    ),
    "loss": SweepFigure(draw=draw_loss_comparison, missing="no run has a loss", file="loss_comparison.png"),
    "tasks": SweepFigure(
        draw=lambda tables, records: draw_tasks(tables), missing="no run was evaluated", file="tasks.png"
    ),
    "step-time": SweepFigure(draw=draw_step_time, missing="no run has step times", file="step_time.png"),
    "sensitivity": SweepFigure(
        draw=draw_sensitivity, missing="no method has rows that differ in a setting", file="sensitivity.png"
    ),
    "search": SweepFigure(
        draw=lambda tables, records: draw_search(records),
        missing="no run is of a search that was judged by held-out rows",
        file="search.png",
        numbers=True,
    ),
    "rungs": SweepFigure(
        draw=lambda tables, records: draw_rungs(records),
        missing="no run is of a search with --scheduler asha",
        file="rungs.png",
        numbers=True,
    ),
    "population": SweepFigure(
        draw=lambda tables, records: draw_population(records),
        missing="no run is of a search with --scheduler pbt",
        file="population.png",
        numbers=True,
    ),
}
# "loss" is in both: asked for by name it is the sweep's
RUN_FIGURES: Mapping[Kind, RunFigure] = {
    "sampling": RunFigure(draw=draw_sampling, missing="no run drew layers", file="sampling.png"),
    "loss": RunFigure(draw=draw_loss, missing="no run has a loss", file="loss.png"),
    "importance": RunFigure(draw=draw_importance, missing="no run measured importance", file="importance.png"),
    "ages": RunFigure(draw=draw_ages, missing="no run says how old its importance is", file="ages.png"),
}
FIGURES: Mapping[Kind, SweepFigure | RunFigure] = {**RUN_FIGURES, **SWEEP_FIGURES}


def draw_kind(kind: Kind, tables: Tables, records: Records) -> list[Picture]:
    """The pictures of a kind, empty where there is nothing to draw.

    Sampling, importance and its age show a run each: the first seed with any of each method's highest row. The name of
    such a picture holds the method, and the model and suite where there are several tables.
    """
    if kind in SWEEP_FIGURES:
        picture = SWEEP_FIGURES[kind].draw(tables, records)
        return [] if picture is None else [picture]
    by_id = {record.run_id: record for record in records}
    found: dict[str, Picture] = {}
    for number, table in enumerate(tables, start=1):
        for row in table.rows:
            name = f"{kind}-{slug(row.method)}" + (f"-{number}" if len(tables) > 1 else "")
            for record in (by_id[run_id] for run_id in row.run_ids if name not in found):
                if (picture := RUN_FIGURES[kind].draw(record)) is not None:
                    found[name] = replace(picture, name=name)
    return list(found.values())


def write_sweep_plots(records: Records, folder: Path) -> list[Path]:
    """Draw what applies to the sweep into ``folder``; returns the files written."""
    tables = build_leaderboard(records)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for figure in SWEEP_FIGURES.values():
        if (picture := figure.draw(tables, records)) is not None:
            written += picture.save(folder / figure.file, with_csv=figure.numbers)
    return written


def write_run_plots(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what applies to the run into ``folder``; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for figure in RUN_FIGURES.values():
        if (picture := figure.draw(record)) is not None:
            written += picture.save(folder / figure.file, with_csv=False)
    return written
