"""Figures of a sweep's parts: where a step's time goes, and accuracy over hyperparameters.

::

    figure = draw_step_time(Runs.of(records))    # None if there is nothing to draw
    figure = draw_sensitivity(Runs.of(records))
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from grass_ray.results.figures.figure import Figure, Runs
from grass_ray.results.figures.style import (
    SOFT,
    Block,
    draw_blocks,
    is_number,
    legend,
    plain,
    spans_decades,
    style_of,
    tidy,
    wrapped,
)
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.record import RunRecord
from grass_ray.results.settings import settings

_HATCHES = {"measuring": "////", "moving states": "xxx", "steps that end in a switch": "...", "other steps": ""}
_OFFSETS = {"steps that end in a switch": -0.14, "other steps": 0.14}  # from the middle of a method's bar

# ---------------------------------------------------------------------------------------------------------- step time


def draw_step_time(runs: Runs, *, width: float = 9.5) -> Figure | None:
    """Where training time went, and how long a step takes; one bar per method. None if no step was timed.

    Measuring is what only measured (probing steps, extra passes); moving states is what training waited for, at
    switches and for streamed states; a step that ends in a switch also drew, froze and thawed layers. The second panel
    shows medians with the middle 90 % of steps.
    """
    found = [(table, times) for table in runs.tables if (times := _step_times(table, runs))]
    if not found:
        return None
    blocks = [Block(2, 0.8 + 0.3 * len(times), extra_height=0.9 if width < 9 else 0.7) for _, times in found]
    drawing, parts = draw_blocks(blocks, width=width, panel_width=4.5)
    numbers: list[tuple[Any, ...]] = []
    for (part, (total, step)), (table, times) in zip(parts, found, strict=True):
        part.suptitle(wrapped(f"{table.model} on {table.suite}, {table.hardware}", width), fontsize=10)
        for place, (row, spent) in enumerate(times):
            _draw_total(total, place, row, spent)
            _draw_step(step, place, row, spent)
            numbers += [
                (table.title, row.label, kind, len(seconds), sum(seconds), *_spread(seconds))
                for kind, seconds in spent.items()
            ]
        total.set_yticks(range(len(times)), [plain(row.method) for row, _ in times], fontsize=9)
        total.set_ylim(len(times) - 0.5, -0.5)
        total.set(xlabel="training time (s), one run", xlim=(0, None))
        step.set(xlabel="a step (s): median, middle 90 %", xlim=(0, None))
        for axes in (total, step):
            tidy(axes, axis="x")
        hatched = [
            Patch(facecolor="white", edgecolor=SOFT, hatch=hatch, label=kind) for kind, hatch in _HATCHES.items()
        ]
        legend(part, hatched, width)
    totals = ", ".join(f"{row.method} {sum(map(sum, spent.values())):.0f} s" for row, spent in found[0][1])
    return Figure(
        name="step-time",
        title="Where the training time goes",
        description="Training time split into measuring, moving states, steps that end in a switch, and other steps: "
        f"{totals}.",
        drawing=drawing,
        header=("table", "row", "part", "steps", "seconds", "step_median_s", "step_5_percent_s", "step_95_percent_s"),
        rows=numbers,
    )


_Spent = dict[str, list[float]]


def _step_times(table: LeaderboardTable, runs: Runs) -> list[tuple[LeaderboardRow, _Spent]]:
    """For each method's highest timed row, the seconds of its first timed run's steps by kind."""
    found: dict[str, tuple[LeaderboardRow, _Spent]] = {}
    for row in table.rows:
        if row.method in found:
            continue
        timed = [record for record in runs.whole_seeds(row) if record.series.get("time/step_s")]
        if timed:
            found[row.method] = (row, spent_time(timed[0]))
    return list(found.values())


def spent_time(record: RunRecord) -> _Spent:
    """Seconds of every step of a run, by kind: measuring, moving states, steps that end in a switch, other steps.

    Moving optimizer states is what training waited for, taken off the steps it happened in.
    Extra passes before a step are part of ``time/measure_s`` alone: what measuring took beyond the probing steps is
    taken evenly off the training steps.
    """
    steps = dict(record.series["time/step_s"])
    intervals = [] if record.layers is None else record.layers.intervals
    probing = record.probing_steps()
    measuring = [seconds for step, seconds in steps.items() if step in probing]
    training = [step for step in steps if step not in probing]
    measured = record.metrics.get("time/measure_s", 0.0)
    extra = max(0.0, (measured if math.isfinite(measured) else 0.0) - sum(measuring))
    per_step = extra / len(training) if training else 0.0
    ends = {first - 1 for (_, before), (first, after) in pairwise(intervals) if before != after}
    moving = record.step_stalls()
    negligible = 1e-3 * sum(steps.values())
    spent: _Spent = {kind: [] for kind in _HATCHES}
    if sum(moving.get(step, 0.0) for step in training) > negligible:
        spent["moving states"] = [moving.get(step, 0.0) for step in training]
    spent["measuring"] = measuring + ([extra] if extra > negligible else [])
    for step in training:
        kind = "steps that end in a switch" if step in ends else "other steps"
        waited = moving.get(step, 0.0) if spent["moving states"] else 0.0
        spent[kind].append(max(0.0, steps[step] - per_step - waited))
    return {kind: seconds for kind, seconds in spent.items() if seconds}


def _draw_total(axes: Any, place: int, row: LeaderboardRow, spent: _Spent) -> None:
    begin = 0.0
    for kind, hatch in _HATCHES.items():
        if seconds := sum(spent.get(kind, [])):
            look = {"color": style_of(row.method).colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.8}
            axes.barh(place, seconds, left=begin, height=0.66, **look)
            begin += seconds


def _draw_step(axes: Any, place: int, row: LeaderboardRow, spent: _Spent) -> None:
    colour = style_of(row.method).colour
    for kind, offset in _OFFSETS.items():
        if spent.get(kind):
            middle, low, high = _spread(spent[kind])
            face = colour if kind == "other steps" else "white"
            axes.plot([low, high], [place + offset] * 2, color=colour, linewidth=1.6)
            axes.plot(middle, place + offset, "o", color=colour, markersize=6, markerfacecolor=face)


def _spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 5th and 95th percentile."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return median(ordered), ordered[math.floor(0.05 * last)], ordered[math.ceil(0.95 * last)]


# -------------------------------------------------------------------------------------------------------- sensitivity


def draw_sensitivity(runs: Runs, *, width: float = 10.8) -> Figure | None:
    """Accuracy over each hyperparameter that differs between rows of one method. None if none does."""
    found = [(table, key, points) for table in runs.tables for key, points in _varied(table, runs).items()]
    if not found:
        return None
    methods = list(dict.fromkeys(method for _, _, points in found for method in points))
    blocks = [Block(len(found), 3.5, extra_height=0.25 * math.ceil(len(methods) / 4))]
    drawing, ((part, panels),) = draw_blocks(blocks, width=width, panel_width=4.6, share_y=False)
    numbers: list[tuple[Any, ...]] = []
    for axes, (table, key, points) in zip(panels, found, strict=True):
        _draw_setting(axes, table, key, points)
        numbers += [
            (table.title, key, value, row.method, row.variant, row.accuracy, row.accuracy_low, row.accuracy_high)
            for rows in points.values()
            for value, row in rows
        ]
    lines = [Line2D([], [], label=plain(m), marker=style_of(m).marker, **style_of(m).line()) for m in methods]
    legend(part, lines, width)
    return Figure(
        name="sensitivity",
        title="Accuracy over hyperparameters",
        description=f"Accuracy with 95 % intervals over {', '.join(dict.fromkeys(key for _, key, _ in found))}, "
        "a line or point a method.",
        drawing=drawing,
        header=("table", "setting", "value", "method", "variant", "accuracy", "low", "high"),
        rows=numbers,
    )


_Points = dict[str, list[tuple[str, LeaderboardRow]]]


def _varied(table: LeaderboardTable, runs: Runs) -> dict[str, _Points]:
    """For each setting that differs within a method, (value, row) of the ranked rows with an accuracy."""
    by_method: defaultdict[str, list[tuple[Mapping[str, str], LeaderboardRow]]] = defaultdict(list)
    for row in table.rows:
        if row.rank is not None and row.accuracy is not None:
            by_method[row.method].append((settings(runs.seeds(row)[0]), row))
    found: defaultdict[str, _Points] = defaultdict(dict)
    for method, rows in by_method.items():
        for key in sorted({key for own, _ in rows for key in own}):
            points = [(own.get(key, "-"), row) for own, row in rows]
            if len({value for value, _ in points}) > 1:
                found[key][method] = points
    return dict(sorted(found.items()))


def _draw_setting(axes: Any, table: LeaderboardTable, key: str, points: _Points) -> None:
    values = {value for found in points.values() for value, _ in found}
    numeric = all(map(is_number, values))
    order = sorted(values, key=float) if numeric else sorted(values)
    for method, found in points.items():
        style = style_of(method)
        dots = sorted(((float(v) if numeric else order.index(v), row) for v, row in found), key=lambda dot: dot[0])
        across, rows = [place for place, _ in dots], [row for _, row in dots]
        heights = [100 * (row.accuracy or 0.0) for row in rows]
        below = [max(0.0, h - 100 * (row.accuracy_low or 0.0)) for h, row in zip(heights, rows, strict=True)]
        above = [max(0.0, 100 * (row.accuracy_high or 0.0) - h) for h, row in zip(heights, rows, strict=True)]
        only_this = len(set(across)) == len(across)  # else other settings differ, too: no line through the points
        lines = {"linewidth": 1.6 if only_this else 0, "elinewidth": 0.9, "capsize": 2, **style.line()}
        axes.errorbar(across, heights, yerr=[below, above], marker=style.marker, markersize=6, **lines)
    if numeric and spans_decades([float(value) for value in order]):
        axes.set_xscale("log")
    elif not numeric:
        names = [plain(value) for value in order]
        axes.set_xticks(range(len(order)), names, fontsize=8.5, rotation=20 if sum(map(len, order)) > 40 else 0)
    axes.set_title(plain(f"{table.model} on {table.suite}"), fontsize=9)
    axes.set(xlabel=key, ylabel="accuracy (%), 95 % interval")
    tidy(axes)
