"""Pictures of a whole sweep: accuracy against memory, and the losses of all methods side by side.

::

    plot_accuracy_memory(records, folder / "accuracy_memory.png")
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from grass_ray.results.colours import colour_of, smooth
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable, build_leaderboard
from grass_ray.results.record import RunRecord

_DPI = 150
_LINES = ("-", "--", ":", "-.")


def write_sweep_plots(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw what applies to the sweep into ``folder``; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Sequence[RunRecord], Path], bool]] = {
        "accuracy_memory.png": plot_accuracy_memory,
        "loss_comparison.png": plot_loss_comparison,
    }
    return [folder / name for name, draw in drawings.items() if draw(records, folder / name)]


# --------------------------------------------------------------------------------------------- accuracy against memory


def plot_accuracy_memory(records: Sequence[RunRecord], path: Path) -> bool:
    """Accuracy against peak memory with the Pareto front, a panel a leaderboard table. False without any such point."""
    tables = [table for table in build_leaderboard(records) if _points(table)]
    if not tables:
        return False
    figure = Figure(figsize=(7.5, 4.8 * len(tables)), layout="constrained")
    for axes, table in zip(figure.subplots(len(tables), squeeze=False)[:, 0], tables, strict=True):
        _draw_accuracy_memory(axes, table)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes, so that labels can be measured
    figure.set_layout_engine("none")
    for axes, table in zip(figure.axes, tables, strict=True):
        _label_points(canvas.get_renderer(), axes, _points(table))
    figure.savefig(path, dpi=_DPI)
    return True


def _points(table: LeaderboardTable) -> list[tuple[float, float, LeaderboardRow]]:
    """(peak GiB, accuracy in percent, row) of the ranked rows that trained."""
    return [
        (row.peak_allocated_gib, 100 * row.accuracy, row)
        for row in table.rows
        if row.rank is not None and row.peak_allocated_gib is not None and row.accuracy is not None
    ]


def _draw_accuracy_memory(axes: Any, table: LeaderboardTable) -> None:
    points = _points(table)
    for gib, accuracy, row in points:
        below, above = (100 * (bound or 0.0) for bound in (row.accuracy_low, row.accuracy_high))
        axes.errorbar(
            gib,
            accuracy,
            yerr=[[max(0.0, accuracy - below)], [max(0.0, above - accuracy)]],
            fmt="o" if row.pareto else "s",
            markersize=8 if row.pareto else 6.5,
            color=colour_of(row.method),
            elinewidth=1,
            capsize=2.5,
            zorder=3,
        )
    front = sorted((gib, accuracy) for gib, accuracy, row in points if row.pareto)
    axes.step(*zip(*front, strict=True), where="post", color="#999999", linewidth=1, linestyle="--", zorder=1)
    untrained = [row for row in table.rows if row.rank is not None and row.peak_allocated_gib is None]
    for row in untrained:
        axes.axhline(100 * (row.accuracy or 0.0), color=colour_of(row.method), linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            row.label,
            (0.995, 100 * (row.accuracy or 0.0)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            color="#5a5a5a",
        )
    axes.margins(x=0.16, y=0.14)
    axes.set(xlabel="peak allocated memory (GiB)", ylabel="accuracy (%), 95 % interval")
    head, _, tail = table.title.partition(" (")
    axes.set_title(f"{head}\n({tail}", fontsize=10)
    missing = [f"{row.label}: {row.status.replace('_', ' ')}" for row in table.rows if row.rank is None]
    note = ["dashed: Pareto front (circles)"] + ([f"not ranked: {'; '.join(missing)}"] if missing else [])
    axes.text(0, -0.16, "\n".join(note), transform=axes.transAxes, fontsize=8.5, color="#444444", va="top", wrap=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


_LEADER = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
_PLACES = [
    (distance, dx, dy)
    for distance in (9, 18, 30, 44, 60)
    for dx, dy in ((1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1))
]


def _label_points(renderer: Any, axes: Any, points: Sequence[tuple[float, float, LeaderboardRow]]) -> None:
    """Write each row's name beside its point, at the first place that covers no other name, point or bar."""
    frame = axes.get_window_extent(renderer)
    taken: list[Any] = [_bar(axes, gib, accuracy, row) for gib, accuracy, row in points]
    for gib, accuracy, row in points:
        choices = []
        for distance, dx, dy in _PLACES:
            label = axes.annotate(
                row.label,
                (gib, accuracy),
                xytext=(dx * distance, dy * distance),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[dx],
                va="center" if dx else "bottom" if dy > 0 else "top",
                fontsize=9,
                arrowprops=_LEADER | {"relpos": ((1 - dx) / 2, (1 - dy) / 2 if dx == 0 else 0.5)}
                if distance > 18
                else None,
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


def _bar(axes: Any, gib: float, accuracy: float, row: LeaderboardRow) -> Any:
    """The marker and error bar of a point, as a box in pixels."""
    x, _ = axes.transData.transform((gib, accuracy))
    _, low = axes.transData.transform((gib, 100 * (row.accuracy_low or 0.0)))
    _, high = axes.transData.transform((gib, 100 * (row.accuracy_high or 0.0)))
    return Bbox.from_extents(x - 8, low, x + 8, high)


# ------------------------------------------------------------------------------------------------------------- losses


def plot_loss_comparison(records: Sequence[RunRecord], path: Path) -> bool:
    """Training loss against step and against training time, mean and range over seeds. False without any loss."""
    tables = [table for table in build_leaderboard(records) if _curves(table, records)]
    if not tables:
        return False
    figure = Figure(figsize=(10, 4.2 * len(tables) + 0.3), layout="constrained")
    grid = figure.subplots(len(tables), 2, squeeze=False, sharey="row")
    for (by_step, by_time), table in zip(grid, tables, strict=True):
        curves = _curves(table, records)
        drawn: defaultdict[str, int] = defaultdict(int)
        for row, runs in curves:
            style = _LINES[drawn[row.method] % len(_LINES)]
            drawn[row.method] += 1
            steps, losses, minutes = runs
            for axes, across in ((by_step, steps), (by_time, minutes)):
                axes.plot(
                    across, losses.mean(axis=0), style, color=colour_of(row.method), label=row.label, linewidth=1.8
                )
                if len(losses) > 1:
                    axes.fill_between(
                        across, losses.min(axis=0), losses.max(axis=0), color=colour_of(row.method), alpha=0.18, lw=0
                    )
        by_step.set(xlabel="step (probing included)", ylabel="training loss (nats per token), smoothed")
        by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_time.set(xlabel="training time (minutes)")
        by_time.legend(frameon=False, fontsize=9)
        for axes in (by_step, by_time):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        by_step.set_title(f"{table.model} on {table.suite}", fontsize=10, loc="left")
        by_time.set_title(table.hardware, fontsize=10, loc="right")
    figure.savefig(path, dpi=_DPI)
    return True


def _curves(table: LeaderboardTable, records: Sequence[RunRecord]) -> list[tuple[LeaderboardRow, tuple[Any, Any, Any]]]:
    """For each row with losses: steps, smoothed losses (seed x step), minutes passed at each step."""
    by_id: Mapping[str, RunRecord] = {record.run_id: record for record in records}
    curves = []
    for row in table.rows:
        runs = [by_id[run_id].series for run_id in row.run_ids if by_id[run_id].series.get("train/loss")]
        if not runs:
            continue
        length = min(len(run["train/loss"]) for run in runs)
        window = max(1, length // 20)
        losses = np.array([smooth([loss for _, loss in run["train/loss"][:length]], window) for run in runs])
        steps = [step for step, _ in runs[0]["train/loss"][:length]]
        seconds = [np.cumsum([s for _, s in run.get("time/step_s", [])[:length]]) for run in runs]
        timed = [clock for clock in seconds if len(clock) == length]
        minutes = np.mean(timed, axis=0) / 60 if timed else np.full(length, np.nan)
        curves.append((row, (steps, losses, minutes)))
    return curves
