"""Pictures of a whole sweep: accuracy against memory, and the losses of all methods side by side.

::

    picture = draw_accuracy_memory(build_leaderboard(records))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from grass_ray.results.figures.colours import smooth, style_of
from grass_ray.results.figures.figure import EDGE, SOFT, Picture, plain, tidy
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.record import RunRecord

_MOST_LABELS = 24
_UNFILLED = "x+1234"

# --------------------------------------------------------------------------------------------- accuracy against memory


def draw_accuracy_memory(tables: Sequence[LeaderboardTable]) -> Picture | None:
    """Accuracy against peak memory with the Pareto front, a panel a leaderboard table. None without any such point."""
    tables = [table for table in tables if _points(table)]
    if not tables:
        return None
    figure = Figure(figsize=(7.5, 5.0 * len(tables)), layout="constrained")
    for axes, table in zip(figure.subplots(len(tables), squeeze=False)[:, 0], tables, strict=True):
        _draw_accuracy_memory(axes, table)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes, so that labels can be measured
    figure.set_layout_engine("none")
    for axes, table in zip(figure.axes, tables, strict=True):
        _label_points(canvas.get_renderer(), axes, _points(table))
    front = [row for table in tables for row in table.rows if row.pareto]
    named = ", ".join(
        f"{row.label} ({100 * (row.accuracy or 0):.1f} %, {row.peak_allocated_gib or 0:.2f} GiB)" for row in front[:8]
    )
    return Picture(
        name="pareto",
        title="Accuracy against peak memory",
        description=f"Accuracy over peak allocated memory of {sum(len(_points(table)) for table in tables)} rows. "
        f"On the Pareto front: {named}.",
        figure=figure,
        header=("table", "method", "variant", "rank", "peak_allocated_gib", "accuracy", "low", "high", "pareto"),
        rows=[
            (
                *(table.title, row.method, row.variant, row.rank, row.peak_allocated_gib),
                *(row.accuracy, row.accuracy_low, row.accuracy_high, row.pareto),
            )
            for table in tables
            for row in table.rows
        ],
    )


def _points(table: LeaderboardTable) -> list[tuple[float, float, LeaderboardRow]]:
    """(peak GiB, accuracy in percent, row) of the ranked rows that trained."""
    return [
        (row.peak_allocated_gib, 100 * row.accuracy, row)
        for row in table.rows
        if row.rank is not None and row.peak_allocated_gib is not None and row.accuracy is not None
    ]


def _draw_accuracy_memory(axes: Any, table: LeaderboardTable) -> None:
    points = _points(table)
    crowded = len(points) > _MOST_LABELS
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
    front = sorted((gib, accuracy) for gib, accuracy, row in points if row.pareto)
    across, up = zip(*front, strict=True)
    axes.step(across, up, where="post", color=EDGE, linewidth=1, linestyle="--", zorder=1)
    axes.scatter(across, up, s=190, facecolors="none", edgecolors=EDGE, linewidths=1.2, zorder=2)
    untrained = [row for row in table.rows if row.rank is not None and row.peak_allocated_gib is None]
    for row in untrained:
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
    axes.margins(x=0.16, y=0.14)
    axes.set(xlabel="peak allocated memory (GiB)", ylabel="accuracy (%), 95 % interval")
    head, _, tail = table.title.partition(" (")
    axes.set_title(plain(f"{head}\n({tail}"), fontsize=10)
    missing = [f"{row.label}: {row.status.replace('_', ' ')}" for row in table.rows if row.rank is None]
    more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
    note = ["ringed and dashed: Pareto front"] + ([f"not ranked: {'; '.join(missing[:6])}{more}"] if missing else [])
    axes.text(0, -0.14, plain("\n".join(note)), transform=axes.transAxes, fontsize=8.5, color=SOFT, va="top", wrap=True)
    tidy(axes)


_LEADER = {"arrowstyle": "-", "color": EDGE, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
_PLACES = [
    (distance, dx, dy)
    for distance in (9, 18, 30, 44, 60, 80)
    for dx, dy in ((1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1))
]


def _label_points(renderer: Any, axes: Any, points: Sequence[tuple[float, float, LeaderboardRow]]) -> None:
    """Write each row's name beside its point, at the first place that covers no other name, point or bar.

    Where there are too many, only the front and the best row of each method are named.
    """
    frame = axes.get_window_extent(renderer)
    crowded = len(points) > _MOST_LABELS
    taken: list[Any] = [_bar(axes, gib, accuracy, row, crowded) for gib, accuracy, row in points]
    named: set[str] = set()
    for gib, accuracy, row in points:
        if crowded and row.method in named:
            continue
        named.add(row.method)
        choices = []
        for distance, dx, dy in _PLACES:
            label = axes.annotate(
                plain(row.method if crowded else row.label),
                (gib, accuracy),
                xytext=(dx * distance, dy * distance),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[dx],
                va="center" if dx else "bottom" if dy > 0 else "top",
                fontsize=9,
                arrowprops=_LEADER | {"relpos": ((1 - dx) / 2, (1 - dy) / 2 if dx == 0 else 0.5)}
                if distance > 18
                else None,
                zorder=5,
            )
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


def _bar(axes: Any, gib: float, accuracy: float, row: LeaderboardRow, crowded: bool) -> Any:
    """The marker and error bar of a point, as a box in pixels; the marker alone where bars are pale."""
    x, y = axes.transData.transform((gib, accuracy))
    if crowded:
        return Bbox.from_extents(x - 8, y - 8, x + 8, y + 8)
    _, low = axes.transData.transform((gib, 100 * (row.accuracy_low or 0.0)))
    _, high = axes.transData.transform((gib, 100 * (row.accuracy_high or 0.0)))
    return Bbox.from_extents(x - 8, low, x + 8, high)


# ------------------------------------------------------------------------------------------------------------- losses


def draw_loss_comparison(tables: Sequence[LeaderboardTable], records: Sequence[RunRecord]) -> Picture | None:
    """Training loss against step and against training time, mean and range over seeds. None without any loss.

    One line a method: where a method has several rows, its highest.
    """
    curves = {table.title: _curves(table, records) for table in tables}
    tables = [table for table in tables if curves[table.title]]
    if not tables:
        return None
    most = max(len(curves[table.title]) for table in tables)
    figure = Figure(figsize=(10, (4.2 + 0.22 * (most // 5)) * len(tables) + 0.3), layout="constrained")
    parts = figure.subfigures(len(tables), squeeze=False)[:, 0]
    numbers: list[tuple[Any, ...]] = []
    for part, table in zip(parts, tables, strict=True):
        by_step, by_time = part.subplots(1, 2, sharey=True)
        for row, (steps, losses, minutes) in curves[table.title]:
            style = style_of(row.method)
            for axes, across in ((by_step, steps), (by_time, minutes)):
                axes.plot(across, losses.mean(axis=0), label=plain(row.label), linewidth=1.8, **style.line())
                if len(losses) > 1:
                    low, high = losses.min(axis=0), losses.max(axis=0)
                    axes.fill_between(across, low, high, color=style.colour, alpha=0.18, lw=0)
            numbers += [
                (table.title, row.label, step, minute, *values)
                for step, minute, *values in zip(
                    *(steps, minutes.tolist()),
                    *(losses.mean(axis=0).tolist(), losses.min(axis=0).tolist(), losses.max(axis=0).tolist()),
                    strict=True,
                )
            ]
        by_step.set(xlabel="step (probing included)", ylabel="training loss (nats per token), smoothed")
        by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_time.set(xlabel="training time (minutes)")
        for axes in (by_step, by_time):
            tidy(axes)
        by_step.set_title(plain(f"{table.model} on {table.suite}"), fontsize=10, loc="left")
        by_time.set_title(plain(table.hardware), fontsize=10, loc="right")
        handles, labels = by_step.get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, handlelength=3)
    named = ", ".join(row.label for row, _ in curves[tables[0].title])
    seeds = max(len(row.run_ids) for table in tables for row, _ in curves[table.title])
    return Picture(
        name="loss",
        title="Training loss against step and against time",
        description=f"Lines of the smoothed training loss of {named}"
        + (f"; bands span up to {seeds} seeds." if seeds > 1 else "; one seed each."),
        figure=figure,
        header=("table", "row", "step", "minutes", "loss_mean", "loss_min", "loss_max"),
        rows=numbers,
    )


_Curve = tuple[LeaderboardRow, tuple[Any, Any, Any]]


def _curves(table: LeaderboardTable, records: Sequence[RunRecord]) -> list[_Curve]:
    """For each method's best row with losses: steps, smoothed losses (seed x step), minutes passed at each step."""
    by_id: Mapping[str, RunRecord] = {record.run_id: record for record in records}
    curves: dict[str, _Curve] = {}
    for row in table.rows:
        runs = [by_id[run_id].series for run_id in row.run_ids if by_id[run_id].series.get("train/loss")]
        if not runs or row.method in curves:
            continue
        length = min(len(run["train/loss"]) for run in runs)
        window = max(1, length // 20)
        losses = np.array([smooth([loss for _, loss in run["train/loss"][:length]], window) for run in runs])
        steps = [step for step, _ in runs[0]["train/loss"][:length]]
        seconds = [np.cumsum([s for _, s in run.get("time/step_s", [])[:length]]) for run in runs]
        timed = [clock for clock in seconds if len(clock) == length]
        minutes = np.mean(timed, axis=0) / 60 if timed else np.full(length, np.nan)
        curves[row.method] = (row, (steps, losses, minutes))
    return list(curves.values())
