"""Pictures of one run: which layers were drawn, the loss, the layers' importance, its age. matplotlib, no global state.

::

    picture = draw_sampling(record)             # None where all layers train always
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grass_ray.results.figures.colours import colour_of, smooth
from grass_ray.results.figures.figure import HOLE, SOFT, Picture, plain, tidy
from grass_ray.results.figures.units import MOST_NAMED, UnitRows, unit_rows
from grass_ray.results.record import RunRecord

_MOST_COLUMNS = 200
_MOST_STROKES = 500  # beyond that many, a vector picture becomes heavy and they are drawn as pixels
_MEASURES = {
    "grad_norm": "mean gradient norm (MGN)",
    "matrix_norm": "gradient norm, smoothed",
    "outlier": "outlier score",
    "reward": "learnt importance",
}


# ------------------------------------------------------------------------------------------------------ layers drawn


def draw_sampling(record: RunRecord) -> Picture | None:
    """Layer by step: colour is the probability of a draw, a bar an actual one. None where all layers train always."""
    layers = record.layers
    if layers is None or not layers.intervals or record.config["method"]["sampler"]["kind"] == "all":
        return None
    rows = unit_rows(layers)
    last = _last_step(record)
    edges, columns = _probabilities(record, last)
    columns = columns[rows.order]
    by_lot = record.config["method"]["sampler"]["kind"] != "cyclic"
    if not by_lot:
        columns = np.full_like(columns, math.nan)  # units take turns: there is no probability to show
    uniform = 1 / len(layers.visits)
    top = float(np.nanmax(columns)) if np.isfinite(columns).any() else uniform
    figure = Figure(figsize=(8, rows.height_inches), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(rows.order) + 1) - 0.5,
        columns,
        cmap="viridis",
        vmin=0,
        vmax=max(top, 2 * uniform),
        rasterized=columns.size > _MOST_STROKES,
    )
    strokes = _strokes(layers.intervals, last)
    thick = min(3.0, 0.4 * 72 * (rows.height_inches - 1) / len(rows.order))
    for width, colour in ((1.7 * thick, "black"), (thick, "white")):
        axes.hlines(
            [rows.place[unit] for unit, _, _ in strokes],
            [first for _, first, _ in strokes],
            [end for _, _, end in strokes],
            color=colour,
            linewidth=width,
            rasterized=len(strokes) > _MOST_STROKES,
        )
    axes.set_facecolor(HOLE)
    axes.set(xlim=(1, last + 1), ylim=(-0.5, len(rows.order) - 0.5), xlabel="step")
    rows.label(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    note = "bars: active, in turn"
    if by_lot:
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("probability of a draw")
        bar.ax.axhline(uniform, color="white", linewidth=2)
        bar.ax.axhline(uniform, color="black", linewidth=1, linestyle="--")
        note = f"bars: drawn; dashed on the scale: uniform, 1/{len(layers.visits)}"
    if layers.refreshes:
        note += "; grey: not measured yet"
    axes.set_title(plain(f"{record.name}: {rows.what} drawn"), fontsize=11, pad=20)
    axes.annotate(
        note,
        (0.5, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
        color=SOFT,
    )
    most = sorted(range(len(layers.visits)), key=lambda unit: -layers.visits[unit])[:3]
    often = ", ".join(f"{rows.names[unit]} ({layers.visits[unit]})" for unit in most)
    return Picture(
        name="sampling",
        title=f"Which {rows.what} {record.name} drew",
        description=f"{len(rows.order)} {rows.what} over {last} steps of {record.name}: "
        f"{'probability of a draw, and ' if by_lot else ''}{len(layers.intervals)} draws. Most often drawn: {often}.",
        figure=figure,
        header=("run", "kind", "first_step", "last_step", "unit", "value"),
        rows=_sampling_numbers(record, rows, edges, columns, last),
    )


def _strokes(intervals: Sequence[tuple[int, tuple[int, ...]]], last: int) -> list[tuple[int, int, int]]:
    """(unit, first step, end) of every stretch in which a unit was active; draws that go on are one stretch."""
    ends = [*(first for first, _ in intervals[1:]), last + 1]
    open_since: dict[int, tuple[int, int]] = {}
    strokes = []
    for (first, active), end in zip(intervals, ends, strict=True):
        for unit in active:
            since, until = open_since.get(unit, (first, first))
            if until != first:
                strokes.append((unit, since, until))
                since = first
            open_since[unit] = (since, end)
    return strokes + [(unit, since, until) for unit, (since, until) in open_since.items()]


def _sampling_numbers(
    record: RunRecord, rows: UnitRows, edges: Sequence[float], columns: np.ndarray, last: int
) -> list[tuple[Any, ...]]:
    assert record.layers is not None
    numbers: list[tuple[Any, ...]] = []
    for place, unit in enumerate(rows.order):
        for column in range(columns.shape[1]):
            if math.isfinite(columns[place, column]):
                span = int(edges[column]), int(edges[column + 1]) - 1
                numbers.append((record.name, "probability", *span, rows.names[unit], float(columns[place, column])))
    for unit, first, end in _strokes(record.layers.intervals, last):
        numbers.append((record.name, "active", first, end - 1, rows.names[unit], 1))
    return numbers


def _probabilities(record: RunRecord, last: int) -> tuple[list[float], np.ndarray]:
    """Step edges and, between them, a column of probabilities a layer; NaN where not measured yet."""
    layers = record.layers
    assert layers is not None
    if not layers.refreshes:
        return [1, last + 1], np.full((len(layers.visits), 1), 1 / len(layers.visits))
    edges: list[float] = [1]
    columns = [np.full(len(layers.visits), math.nan)]
    for step, _, probabilities in layers.refreshes:
        edges.append(step + 1)  # measured at the end of this step, in force from the next
        columns.append(np.asarray(probabilities, dtype=float))
    edges.append(max(last + 1, edges[-1] + 1))
    return edges, np.stack(columns, axis=1)


def _last_step(record: RunRecord) -> int:
    seen = [points[-1][0] for points in record.series.values() if points]
    if record.layers is not None:
        seen += [first for first, _ in record.layers.intervals] + [step for step, _, _ in record.layers.refreshes]
    return max(seen, default=1)


# -------------------------------------------------------------------------------------------------------------- loss


def draw_loss(record: RunRecord) -> Picture | None:
    """Training loss over steps, raw and smoothed. None where no loss was seen."""
    points = record.series.get("train/loss", [])
    if not points:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colour = colour_of(record.config["method"]["name"])
    axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1, marker="." if len(steps) < 3 else None)
    window = max(1, len(losses) // 20)
    smoothed = smooth(losses, window)
    axes.plot(steps, smoothed, color=colour, linewidth=2, label=f"mean of {window} steps")
    if window > 1:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title=plain(f"{record.name}: training loss"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    return Picture(
        name="loss",
        title=f"Training loss of {record.name}",
        description=f"Training loss of {record.name} over {steps[-1]} steps, {losses[0]:.3g} to {smoothed[-1]:.3g}.",
        figure=figure,
        header=("run", "step", "loss", "smoothed"),
        rows=[(record.name, *values) for values in zip(steps, losses, smoothed, strict=True)],
    )


# -------------------------------------------------------------------------------------------------------- importance


def draw_importance(record: RunRecord) -> Picture | None:
    """What the sampler measured, over time: lines over layers, or a heatmap of many units. None without any."""
    layers = record.layers
    refreshes = [] if layers is None else layers.refreshes
    measured = [(step, values) for step, values, _ in refreshes if any(math.isfinite(value) for value in values)]
    if layers is None or not measured:
        return None
    rows = unit_rows(layers)
    measure = _MEASURES.get(record.config["method"]["sampler"]["kind"], "importance")
    many = len(rows.order) > MOST_NAMED
    draw = _draw_importance_map if many else _draw_importance_lines
    figure = draw(measured, rows, measure, _last_step(record))
    title = plain(f"{record.name}: {measure}")
    figure.axes[0].set_title(title if len(measured) > 1 else f"{title}, measured at step {measured[0][0]}", fontsize=11)
    finite = [(value, rows.names[unit]) for unit, value in enumerate(measured[-1][1]) if math.isfinite(value)]
    extremes = f"; in the last one highest in {max(finite)[1]}, lowest in {min(finite)[1]}" if finite else ""
    return Picture(
        name="importance",
        title=f"{measure[0].upper()}{measure[1:]} of {record.name} over time",
        description=f"{measure} of {len(rows.order)} {rows.what} of {record.name} at {len(measured)} measurements"
        f"{extremes}.",
        figure=figure,
        header=("run", "step", "unit", "importance", "probability"),
        rows=[
            (record.name, step, rows.names[unit], values[unit], probabilities[unit])
            for step, values, probabilities in refreshes
            for unit in rows.order
        ],
    )


_Measured = Sequence[tuple[int, Sequence[float]]]


def _draw_importance_lines(measured: _Measured, rows: UnitRows, measure: str, last: int) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shade = Normalize(min(step for step, _ in measured), max(max(step for step, _ in measured), measured[0][0] + 1))
    # neither end of the range is lost on white or on dark paper
    colours = ListedColormap(colormaps["plasma"](np.linspace(0.82, 0.3, 256)))
    for step, values in measured:
        line = [values[unit] for unit in rows.order]
        axes.plot(range(len(line)), line, marker="o", markersize=3.5, linewidth=1.4, color=colours(shade(step)))
    flat = [value for _, values in measured for value in values if math.isfinite(value)]
    if min(flat) > 0 and max(flat) / min(flat) > 30:
        axes.set_yscale("log")
    elif min(flat) >= 0:
        axes.set_ylim(bottom=0)
    if len(measured) > 1:
        bar = figure.colorbar(ScalarMappable(norm=shade, cmap=colours), ax=axes, pad=0.02)
        bar.set_label("measured at step")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylabel=measure)
    rows.label(axes, across=True)
    tidy(axes)
    return figure


def _draw_importance_map(measured: _Measured, rows: UnitRows, measure: str, last: int) -> Figure:
    figure = Figure(figsize=(8, rows.height_inches), layout="constrained")
    axes = figure.subplots()
    values = np.array([[column[unit] for _, column in measured] for unit in rows.order], dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    wide = positive.size == np.isfinite(values).sum() and positive.max() / positive.min() > 30
    edges = [*(step for step, _ in measured), max(last, measured[-1][0]) + 1]
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(rows.order) + 1) - 0.5,
        values,
        cmap="viridis",
        norm=LogNorm(float(positive.min()), float(positive.max())) if wide else None,
        rasterized=values.size > _MOST_STROKES,
    )
    axes.set_facecolor(HOLE)
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows.label(axes)
    figure.colorbar(mesh, ax=axes, pad=0.02).set_label(measure)
    return figure


# ---------------------------------------------------------------------------------------------------- its age


def draw_ages(record: RunRecord) -> Picture | None:
    """Layer by step: colour is how many steps ago the importance was last measured. None where nothing says."""
    layers = record.layers
    ages = [] if layers is None else [point for point in layers.ages if any(map(math.isfinite, point[1]))]
    if layers is None or not ages:
        return None
    rows = unit_rows(layers)
    refreshed, last = [step for step, _ in ages], _last_step(record)
    steps = np.unique(np.linspace(refreshed[0], last, _MOST_COLUMNS).astype(int))
    columns = []
    for step in steps:
        at, measured = ages[bisect_right(refreshed, step) - 1]
        columns.append(np.asarray(measured) + step - at)
    values = np.stack(columns, axis=1)[rows.order]
    figure = Figure(figsize=(8, rows.height_inches), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        [*steps, last + 1],
        np.arange(len(rows.order) + 1) - 0.5,
        values,
        cmap="viridis",
        vmin=0,
        rasterized=values.size > _MOST_STROKES,
    )
    axes.set_facecolor(HOLE)
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows.label(axes)
    figure.colorbar(mesh, ax=axes, pad=0.02).set_label("steps since it was measured")
    axes.set_title(plain(f"{record.name}: age of the importance"), fontsize=11)
    oldest = int(np.nanargmax(values[:, -1])) if np.isfinite(values[:, -1]).any() else 0
    return Picture(
        name="ages",
        title=f"Age of the importance of {record.name}",
        description=f"Steps since the importance of each of {len(rows.order)} {rows.what} of {record.name} was last "
        f"measured. Oldest at the end: {rows.names[rows.order[oldest]]} ({values[oldest, -1]:.0f} steps).",
        figure=figure,
        header=("run", "step", "unit", "age"),
        rows=[(record.name, step, rows.names[unit], measured[unit]) for step, measured in ages for unit in rows.order],
    )
