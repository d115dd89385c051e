"""Figures of one run: which layers were drawn, the loss, the layers' importance, and how old it was.

::

    figure = draw_sampling(record)               # None if all layers train all the time

``width`` is in inches.
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
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from grass_ray.config.samplers import SamplerConfig, sampler_config
from grass_ray.results.figures.figure import Figure
from grass_ray.results.figures.style import HOLE, SOFT, smooth, style_of, tidy, wrapped
from grass_ray.results.figures.units import MOST_NAMED, UnitRows, unit_rows
from grass_ray.results.record import RunRecord
from grass_ray.training.report import LayerTrace

_MOST_COLUMNS = 200
_MOST_CELLS = 500  # with more, an SVG becomes heavy and they are drawn as pixels


def _heatmap(
    rows: UnitRows, edges: Sequence[float], values: NDArray[Any], title: str, width: float, **look: Any
) -> tuple[Drawing, Any, Any]:
    """Units by steps.

    Args:
        rows: the units from the bottom up.
        edges: first step of each column, and the step after the last.
        values: shape (units in the order of ``rows``, columns); NaN is not measured.
        title: of the figure.
        width: in inches.
        look: further arguments of matplotlib's ``pcolormesh``.

    Returns:
        Drawing, axes and mesh.
    """
    drawing = Drawing(figsize=(width, rows.height_inches), layout="constrained")
    drawing.suptitle(wrapped(title, 0.9 * width), fontsize=11)
    axes = drawing.subplots()
    places = np.arange(len(rows.order) + 1) - 0.5
    mesh = axes.pcolormesh(edges, places, values, cmap="viridis", rasterized=values.size > _MOST_CELLS, **look)
    axes.set_facecolor(HOLE)
    axes.set(xlabel="step", ylim=(-0.5, len(rows.order) - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows.label(axes)
    return drawing, axes, mesh


def _sampler(record: RunRecord) -> type[SamplerConfig]:
    return sampler_config(record.config["method"]["sampler"]["kind"])


def _last_step(record: RunRecord) -> int:
    seen = [points[-1][0] for points in record.series.values() if points]
    if record.layers is not None:
        seen += [first for first, _ in record.layers.intervals] + [step for step, _, _ in record.layers.refreshes]
    return max(seen, default=1)


# ------------------------------------------------------------------------------------------------------ layers drawn


def draw_sampling(record: RunRecord, *, width: float = 8) -> Figure | None:
    """Units by steps: colour is the probability of a draw, bars are draws. None if all layers train all the time."""
    layers = record.layers
    sampler = _sampler(record)
    if layers is None or not layers.intervals or sampler.trains_all:
        return None
    rows, last = unit_rows(layers), _last_step(record)
    edges, columns = _probabilities(layers, last)
    columns = columns[rows.order]
    at_random = not sampler.in_turn
    if not at_random:
        columns = np.full_like(columns, math.nan)  # units take turns: there is no probability to show
    uniform = 1 / len(layers.visits)
    top = float(np.nanmax(columns)) if np.isfinite(columns).any() else uniform
    drawing, axes, mesh = _heatmap(
        rows, edges, columns, f"{record.name}: {rows.what} drawn", width, vmin=0, vmax=max(top, 2 * uniform)
    )
    axes.set_xlim(1, last + 1)
    spans = _active_spans(layers, last)
    thick = min(3.0, 0.4 * 72 * (rows.height_inches - 1) / len(rows.order))
    where = ([rows.place[unit] for unit, _, _ in spans], [first for _, first, _ in spans], [end for _, _, end in spans])
    for linewidth, colour in ((1.7 * thick, "black"), (thick, "white")):
        axes.hlines(*where, color=colour, linewidth=linewidth, rasterized=len(spans) > _MOST_CELLS)
    note = "bars: active, in turn"
    if at_random:
        bar = drawing.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("probability of a draw")
        bar.ax.axhline(uniform, color="white", linewidth=2)
        bar.ax.axhline(uniform, color="black", linewidth=1, linestyle="--")
        note = f"bars: drawn; dashed on the scale: uniform, 1/{len(layers.visits)}"
    if layers.refreshes:
        note += "; grey: not measured yet"
    axes.set_title(wrapped(note, width), fontsize=8.5, color=SOFT)
    shown = "probability of a draw, and " if at_random else ""
    most = sorted(range(len(layers.visits)), key=lambda unit: -layers.visits[unit])[:3]
    often = ", ".join(f"{rows.names[unit]} ({layers.visits[unit]})" for unit in most)
    return Figure(
        name="sampling",
        title=f"Which {rows.what} {record.name} drew",
        description=f"{len(rows.order)} {rows.what} over {last} steps of {record.name}: "
        f"{shown}{len(layers.intervals)} draws. Most often drawn: {often}.",
        drawing=drawing,
        header=("run", "kind", "first_step", "last_step", "unit", "value"),
        rows=_sampling_numbers(record.name, rows, edges, columns, spans),
    )


_Span = tuple[int, int, int]


def _active_spans(layers: LayerTrace, last: int) -> list[_Span]:
    """(unit, first step, end) of every stretch in which a unit was active; consecutive draws are one stretch."""
    ends = [*(first for first, _ in layers.intervals[1:]), last + 1]
    open_since: dict[int, tuple[int, int]] = {}
    spans = []
    for (first, active), end in zip(layers.intervals, ends, strict=True):
        for unit in active:
            since, until = open_since.get(unit, (first, first))
            if until != first:
                spans.append((unit, since, until))
                since = first
            open_since[unit] = (since, end)
    return spans + [(unit, since, until) for unit, (since, until) in open_since.items()]


def _sampling_numbers(
    name: str, rows: UnitRows, edges: Sequence[float], columns: NDArray[Any], spans: Sequence[_Span]
) -> list[tuple[Any, ...]]:
    probabilities = [
        (name, "probability", int(edges[column]), int(edges[column + 1]) - 1, rows.names[unit], float(value))
        for unit, values in zip(rows.order, columns, strict=True)
        for column, value in enumerate(values)
        if math.isfinite(value)
    ]
    return [*probabilities, *((name, "active", first, end - 1, rows.names[unit], 1) for unit, first, end in spans)]


def _probabilities(layers: LayerTrace, last: int) -> tuple[list[float], NDArray[Any]]:
    """Steps at which columns begin and end, and probabilities of shape (units, columns); NaN before any measurement."""
    if not layers.refreshes:
        return [1, last + 1], np.full((len(layers.visits), 1), 1 / len(layers.visits))
    edges: list[float] = [1]
    columns = [np.full(len(layers.visits), math.nan)]
    for step, _, probabilities in layers.refreshes:
        edges.append(step + 1)  # measured at the end of this step, in force from the next
        columns.append(np.asarray(probabilities, dtype=float))
    edges.append(max(last + 1, edges[-1] + 1))
    return edges, np.stack(columns, axis=1)


# -------------------------------------------------------------------------------------------------------------- loss


def draw_loss(record: RunRecord, *, width: float = 7) -> Figure | None:
    """Training loss over steps, raw and smoothed. None if the record has no loss."""
    points = record.series.get("train/loss", [])
    if not points:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    drawing = Drawing(figsize=(width, min(4.0, 0.7 * width)), layout="constrained")
    axes = drawing.subplots()
    colour = style_of(record.config["method"]["name"]).colour
    axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1, marker="." if len(steps) < 3 else None)
    window = max(1, len(losses) // 20)
    smoothed = smooth(losses, window)
    axes.plot(steps, smoothed, color=colour, linewidth=2, label=f"mean of {window} steps")
    if window > 1:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.set_title(wrapped(f"{record.name}: training loss", 0.8 * width))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    return Figure(
        name="loss",
        title=f"Training loss of {record.name}",
        description=f"Training loss of {record.name} over {steps[-1]} steps, {losses[0]:.3g} to {smoothed[-1]:.3g}.",
        drawing=drawing,
        header=("run", "step", "loss", "smoothed"),
        rows=[(record.name, *values) for values in zip(steps, losses, smoothed, strict=True)],
    )


# -------------------------------------------------------------------------------------------------------- importance

_Measured = Sequence[tuple[int, Sequence[float]]]


def draw_importance(record: RunRecord, *, width: float = 8) -> Figure | None:
    """What the sampler measured, over time: lines over layers, or a heatmap of many units. None without any."""
    layers = record.layers
    refreshes = [] if layers is None else layers.refreshes
    measured = [(step, values) for step, values, _ in refreshes if any(map(math.isfinite, values))]
    if layers is None or not measured:
        return None
    rows = unit_rows(layers)
    measure = _sampler(record).measure
    title = f"{record.name}: {measure}" + (f", measured at step {measured[0][0]}" if len(measured) == 1 else "")
    if len(rows.order) > MOST_NAMED:
        drawing = _importance_map(measured, rows, measure, _last_step(record), title, width)
    else:
        drawing = _importance_lines(measured, rows, measure, title, min(width, 7))
    finite = [(value, rows.names[unit]) for unit, value in enumerate(measured[-1][1]) if math.isfinite(value)]
    extremes = f"; in the last one highest in {max(finite)[1]}, lowest in {min(finite)[1]}" if finite else ""
    return Figure(
        name="importance",
        title=f"{measure[0].upper()}{measure[1:]} of {record.name} over time",
        description=f"{measure} of {len(rows.order)} {rows.what} of {record.name} at {len(measured)} measurements"
        f"{extremes}.",
        drawing=drawing,
        header=("run", "step", "unit", "importance", "probability"),
        rows=[
            (record.name, step, rows.names[unit], values[unit], probabilities[unit])
            for step, values, probabilities in refreshes
            for unit in rows.order
        ],
    )


def _importance_lines(measured: _Measured, rows: UnitRows, measure: str, title: str, width: float) -> Drawing:
    drawing = Drawing(figsize=(width, min(4.0, 0.7 * width)), layout="constrained")
    axes = drawing.subplots()
    steps = [step for step, _ in measured]
    shade = Normalize(min(steps), max(*steps, steps[0] + 1))
    # neither end of the range is lost on white or on dark paper
    colours = ListedColormap(colormaps["plasma"](np.linspace(0.82, 0.3, 256)))
    for step, values in measured:
        line = [values[unit] for unit in rows.order]
        axes.plot(range(len(line)), line, marker="o", markersize=3.5, linewidth=1.4, color=colours(shade(step)))
    if _wide(np.array([values for _, values in measured], dtype=float)):
        axes.set_yscale("log")
    elif min(value for _, values in measured for value in values if math.isfinite(value)) >= 0:
        axes.set_ylim(bottom=0)
    if len(measured) > 1:
        bar = drawing.colorbar(ScalarMappable(norm=shade, cmap=colours), ax=axes, pad=0.02)
        bar.set_label("measured at step")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylabel=measure)
    axes.set_title(wrapped(title, 0.8 * width), fontsize=11)
    rows.label(axes, across=True)
    tidy(axes)
    return drawing


def _importance_map(measured: _Measured, rows: UnitRows, measure: str, last: int, title: str, width: float) -> Drawing:
    values = np.array([[column[unit] for _, column in measured] for unit in rows.order], dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(float(positive.min()), float(positive.max())) if _wide(values) else None
    edges = [*(step for step, _ in measured), max(last, measured[-1][0]) + 1]
    drawing, axes, mesh = _heatmap(rows, edges, values, title, width, norm=norm)
    drawing.colorbar(mesh, ax=axes, pad=0.02).set_label(measure)
    return drawing


def _wide(values: NDArray[Any]) -> bool:
    """Whether all finite values are positive and the largest is more than 30 times the smallest."""
    finite = values[np.isfinite(values)]
    return bool(finite.min() > 0 and finite.max() / finite.min() > 30)


# ---------------------------------------------------------------------------------------------------- its age


def draw_ages(record: RunRecord, *, width: float = 8) -> Figure | None:
    """Units by steps: colour is the number of steps since the importance was measured. None if it was not recorded."""
    layers = record.layers
    ages = [] if layers is None else [point for point in layers.ages if any(map(math.isfinite, point[1]))]
    if layers is None or not ages:
        return None
    rows, last = unit_rows(layers), _last_step(record)
    refreshed = [step for step, _ in ages]
    steps = np.unique(np.linspace(refreshed[0], last, _MOST_COLUMNS).astype(int))
    columns = []
    for step in steps:
        at, measured = ages[bisect_right(refreshed, step) - 1]
        columns.append(np.asarray(measured) + step - at)
    values = np.stack(columns, axis=1)[rows.order]
    title = f"{record.name}: age of the importance"
    drawing, axes, mesh = _heatmap(rows, [*steps, last + 1], values, title, width, vmin=0)
    drawing.colorbar(mesh, ax=axes, pad=0.02).set_label("steps since it was measured")
    oldest = int(np.nanargmax(values[:, -1])) if np.isfinite(values[:, -1]).any() else 0
    return Figure(
        name="ages",
        title=f"Age of the importance of {record.name}",
        description=f"Steps since the importance of each of {len(rows.order)} {rows.what} of {record.name} was last "
        f"measured. Oldest at the end: {rows.names[rows.order[oldest]]} ({values[oldest, -1]:.0f} steps).",
        drawing=drawing,
        header=("run", "step", "unit", "age"),
        rows=[(record.name, step, rows.names[unit], measured[unit]) for step, measured in ages for unit in rows.order],
    )
