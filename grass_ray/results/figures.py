"""Every picture by name, for ``grass-ray plot``.

::

    pictures = draw_kind("pareto", tables, records)     # one a kind, or one a run for the kinds that show a run
    for picture in pictures: picture.save(folder / f"{picture.name}.svg")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from grass_ray.config import slug
from grass_ray.results.breakdown_plots import draw_sensitivity, draw_step_time, draw_tasks
from grass_ray.results.kinds import Kind
from grass_ray.results.leaderboard import LeaderboardTable
from grass_ray.results.pictures import Picture
from grass_ray.results.plots import draw_ages, draw_importance, draw_sampling
from grass_ray.results.record import RunRecord
from grass_ray.results.search_plots import draw_population, draw_rungs, draw_search
from grass_ray.results.sweep_plots import draw_accuracy_memory, draw_loss_comparison

_OF_A_SWEEP: Mapping[Kind, Callable[[Sequence[LeaderboardTable], Sequence[RunRecord]], Picture | None]] = {
    "pareto": lambda tables, records: draw_accuracy_memory(tables),
    "loss": draw_loss_comparison,
    "tasks": lambda tables, records: draw_tasks(tables),
    "step-time": draw_step_time,
    "sensitivity": draw_sensitivity,
    "search": lambda tables, records: draw_search(records),
    "rungs": lambda tables, records: draw_rungs(records),
    "population": lambda tables, records: draw_population(records),
}
_OF_A_RUN: Mapping[Kind, Callable[[RunRecord], Picture | None]] = {
    "sampling": draw_sampling,
    "importance": draw_importance,
    "ages": draw_ages,
}
MISSING: Mapping[Kind, str] = {
    "pareto": "no ranked row has an accuracy and a peak memory",
    "loss": "no run has a loss",
    "tasks": "no run was evaluated",
    "step-time": "no run has step times",
    "sensitivity": "no method has rows that differ in a setting",
    "search": "no run is of a search that was judged by held-out rows",
    "rungs": "no run is of a search with --scheduler asha",
    "population": "no run is of a search with --scheduler pbt",
    "sampling": "no run drew layers",
    "importance": "no run measured importance",
    "ages": "no run says how old its importance is",
}


def draw_kind(kind: Kind, tables: Sequence[LeaderboardTable], records: Sequence[RunRecord]) -> list[Picture]:
    """The pictures of a kind, empty where there is nothing to draw.

    Sampling, importance and its age show a run each: the first seed with any of each method's highest row. The name of
    such a picture holds the method, and the model and suite where there are several tables.
    """
    if kind in _OF_A_SWEEP:
        picture = _OF_A_SWEEP[kind](tables, records)
        return [] if picture is None else [picture]
    by_id = {record.run_id: record for record in records}
    found: dict[str, Picture] = {}
    for number, table in enumerate(tables, start=1):
        for row in table.rows:
            name = f"{kind}-{slug(row.method)}" + (f"-{number}" if len(tables) > 1 else "")
            for record in (by_id[run_id] for run_id in row.run_ids if name not in found):
                if (picture := _OF_A_RUN[kind](record)) is not None:
                    found[name] = replace(picture, name=name)
    return list(found.values())
