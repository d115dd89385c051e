"""Figures of a sweep: accuracy against memory, losses of all methods side by side, accuracy by task.

::

    figure = draw_accuracy_memory(Runs.of(records))  # None if there is nothing to draw

A method is drawn by its highest row, unless the figure compares its variants. ``width`` is in inches: panels stand side
by side in a wide figure, one above the other in a narrow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from grass_ray.results.figures.figure import Figure, Runs
from grass_ray.results.figures.style import (
    EDGE,
    SOFT,
    Block,
    draw_blocks,
    legend,
    plain,
    smooth,
    style_of,
    tidy,
    wrapped,
)
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.tasks.suites import TASKS

_LABELS_PER_INCH = 3.2  # of width: with more rows, only the best of each method is named
_UNFILLED = "x+1234"

# --------------------------------------------------------------------------------------------- accuracy against memory


def draw_accuracy_memory(runs: Runs, *, width: float = 7.5) -> Figure | None:
    """Accuracy against peak memory with the Pareto front, one panel per table. None if no row has both."""
    tables = [table for table in runs.tables if _points(table)]
    if not tables:
        return None
    blocks = [Block(1, 4.3 if width < 6 else 5.0, extra_height=0)] * len(tables)
    drawing, parts = draw_blocks(blocks, width=width, panel_width=width)
    panels = [axes for _, (axes,) in parts]
    for axes, table in zip(panels, tables, strict=True):
        _draw_accuracy_memory(axes, table, width)
    canvas = FigureCanvasAgg(drawing)
    drawing.draw_without_rendering()  # places the axes, so that labels can be measured
    drawing.set_layout_engine("none")
    for axes, table in zip(panels, tables, strict=True):
        _label_points(canvas.get_renderer(), axes, _points(table), width)
    front = [row for table in tables for row in table.rows if row.pareto]
    named = ", ".join(
        f"{row.label} ({100 * (row.accuracy or 0):.1f} %, {row.peak_allocated_gib or 0:.2f} GiB)" for row in front[:8]
    )
    return Figure(
        name="pareto",
        title="Accuracy against peak memory",
        description=f"Accuracy over peak allocated memory of {sum(len(_points(table)) for table in tables)} rows. "
        f"On the Pareto front: {named}.",
        drawing=drawing,
        header=(
            *("table", "method", "variant", "rank", "peak_allocated_gib"),
            *("accuracy", "low", "high", "pareto", "told_apart"),
        ),
        rows=[
            (
                *(table.title, row.method, row.variant, row.rank, row.peak_allocated_gib),
                *(row.accuracy, row.accuracy_low, row.accuracy_high, row.pareto, row.told_apart),
            )
            for table in tables
            for row in table.rows
        ],
    )


_Point = tuple[float, float, LeaderboardRow]


def _points(table: LeaderboardTable) -> list[_Point]:
    """(peak GiB, accuracy in percent, row) of the ranked rows that trained."""
    return [
        (row.peak_allocated_gib, 100 * row.accuracy, row)
        for row in table.rows
        if row.rank is not None and row.peak_allocated_gib is not None and row.accuracy is not None
    ]


def _is_crowded(points: Sequence[_Point], width: float) -> bool:
    return len(points) > _LABELS_PER_INCH * width


def _draw_accuracy_memory(axes: Any, table: LeaderboardTable, width: float) -> None:
    points = _points(table)
    crowded = _is_crowded(points, width)
    for gib, accuracy, row in points:
        below, above = (100 * (bound or 0.0) for bound in (row.accuracy_low, row.accuracy_high))
        style = style_of(row.method)
        filled = style.marker not in _UNFILLED
        axes.errorbar(
            gib,
            accuracy,
            yerr=[[max(0.0, accuracy - below)], [max(0.0, above - accuracy)]],
            fmt=style.marker,
            markersize=7.5 if filled else 10,
            color=style.colour,
            markeredgewidth=0.6 if filled else 2,
            markeredgecolor="white" if filled else style.colour,
            elinewidth=0.6 if crowded else 1,
            ecolor=(style.colour, 0.35 if crowded else 0.8),
            capsize=0 if crowded else 2.5,
            zorder=3,
        )
    across, up = zip(*sorted((gib, accuracy) for gib, accuracy, row in points if row.pareto), strict=True)
    axes.step(across, up, where="post", color=EDGE, linewidth=1, linestyle="--", zorder=1)
    axes.scatter(across, up, s=190, facecolors="none", edgecolors=EDGE, linewidths=1.2, zorder=2)
    for row in table.rows:
        if row.rank is not None and row.peak_allocated_gib is None:  # not trained: a line across
            _draw_level(axes, row)
    axes.margins(x=0.16, y=0.14)
    axes.set(ylabel="accuracy (%), 95 % interval")
    head, _, tail = table.title.partition(" (")
    axes.set_title(f"{wrapped(head, width)}\n{wrapped(f'({tail}', width)}", fontsize=10)
    missing = [f"{row.label}: {row.status.replace('_', ' ')}" for row in table.rows if row.rank is None]
    more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
    axes.set_xlabel("peak allocated memory (GiB)")
    notes = ["ringed and dashed: Pareto front"] + ([f"not ranked: {'; '.join(missing[:6])}{more}"] if missing else [])
    axes.annotate(
        "\n".join(wrapped(note, 1.1 * width) for note in notes),
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -40),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
        color=SOFT,
    )
    tidy(axes)


def _draw_level(axes: Any, row: LeaderboardRow) -> None:
    accuracy = 100 * (row.accuracy or 0.0)
    axes.axhline(accuracy, linewidth=1, zorder=0, **style_of(row.method).line())
    axes.annotate(
        plain(row.label),
        (0.995, accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=SOFT,
    )


_LEADER = {"arrowstyle": "-", "color": EDGE, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
_OFFSETS = [
    (distance, dx, dy)
    for distance in (9, 18, 30, 44, 60, 80)  # points
    for dx, dy in ((1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1))
]


def _label_points(renderer: Any, axes: Any, points: Sequence[_Point], width: float) -> None:
    """Write each row's name beside its point, at the first offset where it covers no other name, point or bar.

    If there are too many points, only the best row of each method is named.
    """
    frame = axes.get_window_extent(renderer)
    crowded = _is_crowded(points, width)
    taken: list[Any] = [_bar(axes, gib, accuracy, row, crowded) for gib, accuracy, row in points]
    named: set[str] = set()
    for gib, accuracy, row in points:
        if crowded and row.method in named:
            continue
        named.add(row.method)
        choices = []
        for offset in _OFFSETS:
            label = _label(axes, plain(row.method if crowded else row.label), (gib, accuracy), *offset)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # the words alone, without the arrow
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            choices.append((sum(box.overlaps(other) for other in taken) + 2 * outside, label, box))
            if choices[-1][0] == 0:
                break
        _, kept, box = min(choices, key=lambda choice: choice[0])
        taken.append(box.padded(2))
        for _, label, _ in choices:
            if label is not kept:
                label.remove()


def _label(axes: Any, text: str, point: tuple[float, float], distance: float, dx: int, dy: float) -> Any:
    """A name at an offset from its point; with a line to it where it is far away."""
    leader = _LEADER | {"relpos": ((1 - dx) / 2, (1 - dy) / 2 if dx == 0 else 0.5)}
    return axes.annotate(
        text,
        point,
        xytext=(dx * distance, dy * distance),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[dx],
        va="center" if dx else "bottom" if dy > 0 else "top",
        fontsize=9,
        arrowprops=leader if distance > 18 else None,
        zorder=5,
    )


def _bar(axes: Any, gib: float, accuracy: float, row: LeaderboardRow, crowded: bool) -> Any:
    """The marker and error bar of a point, as a box in pixels; the marker alone where bars are pale."""
    x, y = axes.transData.transform((gib, accuracy))
    if crowded:
        return Bbox.from_extents(x - 8, y - 8, x + 8, y + 8)
    _, low = axes.transData.transform((gib, 100 * (row.accuracy_low or 0.0)))
    _, high = axes.transData.transform((gib, 100 * (row.accuracy_high or 0.0)))
    return Bbox.from_extents(x - 8, low, x + 8, high)


# ------------------------------------------------------------------------------------------------------------- losses


def draw_loss_comparison(runs: Runs, *, width: float = 10) -> Figure | None:
    """Training loss against step and against training time, mean and range over seeds. None if no run has a loss."""
    curves = [(table, found) for table in runs.tables if (found := _curves(table, runs))]
    if not curves:
        return None
    blocks = [Block(2, 3.4, extra_height=0.5 + 0.22 * (len(found) // 3)) for _, found in curves]
    drawing, parts = draw_blocks(blocks, width=width, panel_width=4.6)
    numbers: list[tuple[Any, ...]] = []
    for (part, (by_step, by_time)), (table, found) in zip(parts, curves, strict=True):
        for row, steps, losses, minutes in found:
            style = style_of(row.method)
            mean, low, high = losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)
            for axes, across in ((by_step, steps), (by_time, minutes)):
                axes.plot(across, mean, label=plain(row.label), linewidth=1.8, **style.line())
                if len(losses) > 1:
                    axes.fill_between(across, low, high, color=style.colour, alpha=0.18, lw=0)
            columns = (steps, *(values.tolist() for values in (minutes, mean, low, high)))
            numbers += [(table.title, row.label, *values) for values in zip(*columns, strict=True)]
        by_step.set(xlabel="step (probing included)")
        by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_time.set(xlabel="training time (minutes)")
        for axes in (by_step, by_time):
            tidy(axes)
        part.supylabel("training loss (nats per token), smoothed", fontsize=10)
        part.suptitle(wrapped(f"{table.model} on {table.suite}, {table.hardware}", width), fontsize=10)
        legend(part, by_step.get_legend_handles_labels()[0], width)
    named = ", ".join(row.label for row, *_ in curves[0][1])
    seeds = max(len(row.run_ids) for _, found in curves for row, *_ in found)
    return Figure(
        name="loss",
        title="Training loss against step and against time",
        description=f"Lines of the smoothed training loss of {named}"
        + (f"; bands span up to {seeds} seeds." if seeds > 1 else "; one seed each."),
        drawing=drawing,
        header=("table", "row", "step", "minutes", "loss_mean", "loss_min", "loss_max"),
        rows=numbers,
    )


_Curve = tuple[LeaderboardRow, list[int], Any, Any]


def _curves(table: LeaderboardTable, runs: Runs) -> list[_Curve]:
    """Of each method's highest row with losses: steps, smoothed losses (seeds x steps), minutes passed at each step."""
    curves: dict[str, _Curve] = {}
    for row in table.rows:
        if row.method in curves:
            continue
        seeds = [record.series for record in runs.whole_seeds(row) if record.series.get("train/loss")]
        if not seeds:
            continue
        length = min(len(series["train/loss"]) for series in seeds)
        window = max(1, length // 20)
        losses = np.array([smooth([loss for _, loss in series["train/loss"][:length]], window) for series in seeds])
        steps = [step for step, _ in seeds[0]["train/loss"][:length]]
        seconds = [np.cumsum([s for _, s in series.get("time/step_s", [])[:length]]) for series in seeds]
        timed = [clock for clock in seconds if len(clock) == length]
        minutes = np.mean(timed, axis=0) / 60 if timed else np.full(length, np.nan)
        curves[row.method] = (row, steps, losses, minutes)
    return list(curves.values())


# -------------------------------------------------------------------------------------------------------------- tasks


def draw_tasks(runs: Runs, *, width: float = 10.6) -> Figure | None:
    """Accuracy by task with Wilson intervals, one panel per task. None if no run was evaluated."""
    found = []
    for table in runs.tables:
        rows = [row for row in table.best_of_each_method if row.tasks]
        scored = {task for row in table.rows for task in row.tasks}
        if scored:
            found.append((table, [task for task in table.tasks if task in scored], rows))
    if not found:
        return None
    blocks = [Block(len(tasks), 0.9 + 0.24 * len(rows), extra_height=0.5) for _, tasks, rows in found]
    drawing, parts = draw_blocks(blocks, width=width, panel_width=2.3)
    numbers: list[tuple[Any, ...]] = []
    for (part, panels), (table, tasks, rows) in zip(parts, found, strict=True):
        title = f"{table.model} on {table.suite}: accuracy (%), 95 % interval over questions"
        part.suptitle(wrapped(title, min(width, drawing.get_figwidth())), fontsize=10)
        for axes, task in zip(panels, tasks, strict=True):
            numbers += [(table.title, row.label, task, *shares) for row, shares in _draw_task(axes, task, rows)]
    return Figure(
        name="tasks",
        title="Accuracy by task",
        description=f"Bars of accuracy with 95 % intervals for {len(found[0][2])} methods on "
        f"{', '.join(_title(task) for task in found[0][1])}.",
        drawing=drawing,
        header=("table", "row", "task", "accuracy", "low", "high"),
        rows=numbers,
    )


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
    axes.set_title(plain(_title(task)), fontsize=10)
    tidy(axes, axis="x")
    return found
