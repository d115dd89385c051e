"""Pictures of a sweep's parts: accuracy by task, where a step's time goes, accuracy over hyperparameters.

::

    picture = draw_tasks(tables)                 # None where there is nothing to draw
    picture = draw_step_time(tables, records)
    picture = draw_sensitivity(tables, records)

Everything is computed from run records; one row a method, its highest, unless the question is about its variants.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from grass_ray.results.figures.colours import style_of
from grass_ray.results.figures.figure import SOFT, Picture, plain, tidy
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import settings
from grass_ray.tasks.suites import TASKS

_ACROSS = 4  # panels beside each other
_HATCHES = {"measuring": "////", "moving states": "xxx", "steps that end in a switch": "...", "other steps": ""}


# -------------------------------------------------------------------------------------------------------------- tasks


def draw_tasks(tables: Sequence[LeaderboardTable]) -> Picture | None:
    """Accuracy by task with Wilson intervals, a panel a task. None without any accuracy."""
    tables = [table for table in tables if any(row.tasks for row in table.rows)]
    if not tables:
        return None
    panels = [(table, _tasks_of(table), [row for row in table.best_of_each_method if row.tasks]) for table in tables]
    across = min(_ACROSS, max(len(tasks) for _, tasks, _ in panels))
    heights = [math.ceil(len(tasks) / across) * (0.9 + 0.24 * len(rows)) + 0.5 for _, tasks, rows in panels]
    figure = Figure(figsize=(max(6.0, 1.4 + 2.3 * across), sum(heights)), layout="constrained")
    numbers: list[tuple[Any, ...]] = []
    for part, (table, tasks, rows) in zip(
        figure.subfigures(len(panels), squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        part.suptitle(plain(f"{table.model} on {table.suite}: accuracy (%), 95 % interval over questions"), fontsize=10)
        grid = list(part.subplots(math.ceil(len(tasks) / across), across, sharey=True, squeeze=False).flat)
        for axes in grid[len(tasks) :]:
            axes.set_visible(False)
        for axes, task in zip(grid, tasks, strict=False):
            numbers += [(table.title, row.label, task, *found) for row, found in _draw_task(axes, task, rows)]
    return Picture(
        name="tasks",
        title="Accuracy by task",
        description=f"Bars of accuracy with 95 % intervals for {len(panels[0][2])} methods on "
        f"{', '.join(_title(task) for task in panels[0][1])}.",
        figure=figure,
        header=("table", "row", "task", "accuracy", "low", "high"),
        rows=numbers,
    )


def _tasks_of(table: LeaderboardTable) -> list[str]:
    scored = {task for row in table.rows for task in row.tasks}
    return [task for task in table.tasks if task in scored]


def _title(task: str) -> str:
    return TASKS[task].title if task in TASKS else task


def _draw_task(
    axes: Any, task: str, rows: Sequence[LeaderboardRow]
) -> list[tuple[LeaderboardRow, tuple[float, float, float]]]:
    """Draw one panel; returns (row, (accuracy, low, high)), shares from 0 to 1."""
    found = []
    for place, row in enumerate(rows):
        if (accuracy := row.tasks.get(task)) is None:
            continue
        low, high = row.task_intervals.get(task, (accuracy, accuracy))
        found.append((row, (accuracy, low, high)))
        axes.barh(place, 100 * accuracy, height=0.66, color=style_of(row.method).colour, zorder=2)
        axes.plot([100 * low, 100 * high], [place, place], color=SOFT, linewidth=3.2, zorder=3)
        axes.plot([100 * low, 100 * high], [place, place], color="white", linewidth=1.2, zorder=3)
    axes.set_yticks(
        range(len(rows)), [plain(row.method) + ("" if row.rank else " (not ranked)") for row in rows], fontsize=9
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, min(100, 1.08 * max((100 * high for _, (_, _, high) in found), default=100)) or 100)
    axes.set_title(_title(task), fontsize=10)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    return found


# ---------------------------------------------------------------------------------------------------------- step time


def draw_step_time(tables: Sequence[LeaderboardTable], records: Sequence[RunRecord]) -> Picture | None:
    """Where training time went, and how long a step takes; a bar a method. None where no step was timed.

    Measuring is what only measured (probing steps, extra passes); moving states is what training waited for, at
    switches and for streamed states; a step that ends in a switch also drew, froze and thawed. The right side shows
    medians with the middle 90 % of steps.
    """
    by_id = {record.run_id: record for record in records}
    panels = [(table, _step_times(table, by_id)) for table in tables]
    panels = [(table, times) for table, times in panels if times]
    if not panels:
        return None
    heights = [1.3 + 0.3 * len(times) for _, times in panels]
    figure = Figure(figsize=(9.5, sum(heights) + 0.4), layout="constrained")
    numbers: list[tuple[Any, ...]] = []
    for part, (table, times) in zip(
        figure.subfigures(len(panels), squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        part.suptitle(plain(f"{table.model} on {table.suite}, {table.hardware}"), fontsize=10)
        left, right = part.subplots(1, 2, sharey=True)
        for place, (row, spent) in enumerate(times):
            _draw_times(left, right, place, row, spent)
            numbers += [
                (table.title, row.label, kind, len(seconds), sum(seconds), *_spread(seconds))
                for kind, seconds in spent.items()
            ]
        left.set_yticks(range(len(times)), [plain(row.method) for row, _ in times], fontsize=9)
        left.set_ylim(len(times) - 0.5, -0.5)
        left.set(xlabel="training time (s), one run", xlim=(0, None))
        right.set(xlabel="a step (s): median, middle 90 %", xlim=(0, None))
        for axes in (left, right):
            tidy(axes)
            axes.grid(visible=False, axis="y")
        handles = [
            Patch(facecolor="white", edgecolor=SOFT, hatch=hatch, label=kind) for kind, hatch in _HATCHES.items()
        ]
        part.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return Picture(
        name="step-time",
        title="Where the training time goes",
        description="Training time split into measuring, moving states, steps that end in a switch, and other steps: "
        + ", ".join(f"{row.method} {sum(map(sum, spent.values())):.0f} s" for row, spent in panels[0][1])
        + ".",
        figure=figure,
        header=("table", "row", "part", "steps", "seconds", "step_median_s", "step_5_percent_s", "step_95_percent_s"),
        rows=numbers,
    )


_Spent = dict[str, list[float]]


def _step_times(table: LeaderboardTable, by_id: Mapping[str, RunRecord]) -> list[tuple[LeaderboardRow, _Spent]]:
    """For each method's best timed row, the seconds of its first timed run's steps by kind."""
    found: dict[str, tuple[LeaderboardRow, _Spent]] = {}
    for row in table.rows:
        timed = [by_id[run_id] for run_id in row.run_ids if by_id[run_id].series.get("time/step_s")]
        if timed and row.method not in found:
            found[row.method] = (row, spent_time(timed[0]))
    return list(found.values())


def spent_time(record: RunRecord) -> _Spent:
    """Seconds of every step of a run, by kind: measuring, moving states, steps that end in a switch, other steps.

    Moving optimizer states is what training waited for, taken off the steps it happened in.
    Extra passes before a step are part of ``time/measure_s`` alone: what measuring took beyond the probing steps is
    taken evenly off the training steps.
    """
    steps = dict(record.series["time/step_s"])
    probing = record.probing_steps()
    measuring = [seconds for step, seconds in steps.items() if step in probing]
    training = [step for step in steps if step not in probing]
    measured = record.metrics.get("time/measure_s", 0.0)
    extra = max(0.0, (measured if math.isfinite(measured) else 0.0) - sum(measuring))
    per_step = extra / len(training) if training else 0.0
    intervals = [] if record.layers is None else record.layers.intervals
    ends = {first - 1 for (_, before), (first, after) in pairwise(intervals) if before != after}
    moving = record.step_stalls()
    spent: _Spent = {kind: [] for kind in _HATCHES}
    if sum(moving.get(step, 0.0) for step in training) > 1e-3 * sum(steps.values()):
        spent["moving states"] = [moving.get(step, 0.0) for step in training]
    spent["measuring"] = measuring + ([extra] if extra > 1e-3 * sum(steps.values()) else [])
    for step in training:
        kind = "steps that end in a switch" if step in ends else "other steps"
        waited = moving.get(step, 0.0) if spent["moving states"] else 0.0
        spent[kind].append(max(0.0, steps[step] - per_step - waited))
    return {kind: seconds for kind, seconds in spent.items() if seconds}


def _draw_times(left: Any, right: Any, place: int, row: LeaderboardRow, spent: _Spent) -> None:
    colour, begin = style_of(row.method).colour, 0.0
    for kind, hatch in _HATCHES.items():
        seconds = spent.get(kind, [])
        if not seconds:
            continue
        left.barh(
            place, sum(seconds), left=begin, height=0.66, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8
        )
        begin += sum(seconds)
    for offset, kind in ((-0.14, "steps that end in a switch"), (0.14, "other steps")):
        if spent.get(kind):
            middle, low, high = _spread(spent[kind])
            right.plot([low, high], [place + offset] * 2, color=colour, linewidth=1.6)
            hollow = kind != "other steps"
            right.plot(
                middle, place + offset, "o", color=colour, markersize=6, markerfacecolor="white" if hollow else colour
            )


def _spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, and where the middle nine tenths begin and end."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return median(ordered), ordered[math.floor(0.05 * last)], ordered[math.ceil(0.95 * last)]


# -------------------------------------------------------------------------------------------------------- sensitivity


def draw_sensitivity(tables: Sequence[LeaderboardTable], records: Sequence[RunRecord]) -> Picture | None:
    """Accuracy over each hyperparameter that differs between rows of one method. None where none does."""
    by_id = {record.run_id: record for record in records}
    panels = [(table, key, points) for table in tables for key, points in _varied(table, by_id).items()]
    if not panels:
        return None
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    methods = list(dict.fromkeys(method for _, _, points in panels for method in points))
    legend_rows = math.ceil(len(methods) / (4 * across))
    figure = Figure(figsize=(4.8 * across + 1.2, 3.5 * down + 0.25 * legend_rows), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    numbers: list[tuple[Any, ...]] = []
    for axes, (table, key, points) in zip(grid, panels, strict=False):
        _draw_key(axes, table, key, points)
        numbers += [
            (table.title, key, value, row.method, row.variant, row.accuracy, row.accuracy_low, row.accuracy_high)
            for found in points.values()
            for value, row in found
        ]
    handles = [
        Line2D([], [], marker=style.marker, color=style.colour, linestyle=style.dash, label=plain(method))
        for method, style in ((method, style_of(method)) for method in methods)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4 * across, frameon=False, fontsize=8.5, handlelength=3.4
    )
    keys = list(dict.fromkeys(key for _, key, _ in panels))
    return Picture(
        name="sensitivity",
        title="Accuracy over hyperparameters",
        description=f"Accuracy with 95 % intervals over {', '.join(keys)}, a line or point a method.",
        figure=figure,
        header=("table", "setting", "value", "method", "variant", "accuracy", "low", "high"),
        rows=numbers,
    )


_Points = dict[str, list[tuple[str, LeaderboardRow]]]


def _varied(table: LeaderboardTable, by_id: Mapping[str, RunRecord]) -> dict[str, _Points]:
    """For each setting that differs within a method, (value, row) of the ranked rows by method."""
    own = {row.run_ids[0]: settings(by_id[row.run_ids[0]]) for row in table.rows}
    by_method: defaultdict[str, list[LeaderboardRow]] = defaultdict(list)
    for row in table.rows:
        if row.rank is not None:
            by_method[row.method].append(row)
    found: defaultdict[str, _Points] = defaultdict(dict)
    for method, rows in by_method.items():
        for key in sorted({key for row in rows for key in own[row.run_ids[0]]}):
            points = [(own[row.run_ids[0]].get(key, "-"), row) for row in rows]
            if len({value for value, _ in points}) > 1:
                found[key][method] = points
    return dict(sorted(found.items()))


def _draw_key(axes: Any, table: LeaderboardTable, key: str, points: _Points) -> None:
    values = {value for found in points.values() for value, _ in found}
    numeric = all(_is_number(value) for value in values)
    order = sorted(values, key=float) if numeric else sorted(values)
    for method, found in points.items():
        style = style_of(method)
        places = [float(value) if numeric else order.index(value) for value, _ in found]
        dots = sorted(zip(places, (row for _, row in found), strict=True), key=lambda dot: dot[0])
        heights = [100 * (row.accuracy or 0.0) for _, row in dots]
        below = [max(0.0, h - 100 * (row.accuracy_low or 0.0)) for h, (_, row) in zip(heights, dots, strict=True)]
        above = [max(0.0, 100 * (row.accuracy_high or 0.0) - h) for h, (_, row) in zip(heights, dots, strict=True)]
        alone = len({place for place, _ in dots}) == len(dots)  # else other settings differ, too: no line through them
        axes.errorbar(
            [place for place, _ in dots],
            heights,
            yerr=[below, above],
            marker=style.marker,
            markersize=6,
            linewidth=1.6 if alone else 0,
            elinewidth=0.9,
            capsize=2,
            color=style.colour,
            linestyle=style.dash,
        )
    if numeric and float(order[0]) > 0 and float(order[-1]) >= 8 * float(order[0]):
        axes.set_xscale("log")
    elif not numeric:
        axes.set_xticks(
            range(len(order)),
            [plain(value) for value in order],
            fontsize=8.5,
            rotation=20 if sum(map(len, order)) > 40 else 0,
        )
    axes.set_title(plain(f"{table.model} on {table.suite}"), fontsize=9)
    axes.set(xlabel=key, ylabel="accuracy (%), 95 % interval")
    tidy(axes)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
