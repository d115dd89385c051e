"""Pictures of one run: which layers were drawn, the loss, the layers' importance. matplotlib, no global state.

::

    write_run_plots(record, folder)                       # sampling.png, loss.png, importance.png, where they apply
    write_sweep_plots(records, folder)                    # accuracy_memory.png, loss_comparison.png
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grass_ray.results.colours import colour_of, smooth
from grass_ray.results.record import RunRecord
from grass_ray.results.sweep_plots import plot_accuracy_memory as plot_accuracy_memory
from grass_ray.results.sweep_plots import plot_loss_comparison as plot_loss_comparison
from grass_ray.results.sweep_plots import write_sweep_plots as write_sweep_plots

_DPI = 150


def write_run_plots(record: RunRecord, folder: Path) -> list[Path]:
    """Draw what applies to the run into ``folder``; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[RunRecord, Path], bool]] = {
        "sampling.png": plot_sampling_heatmap,
        "loss.png": plot_loss,
        "importance.png": plot_importance,
    }
    return [folder / name for name, draw in drawings.items() if draw(record, folder / name)]


def plot_sampling_heatmap(record: RunRecord, path: Path) -> bool:
    """Layer by step: colour is the probability of a draw, a dot an actual one. False where nothing was drawn by lot."""
    layers = record.layers
    if layers is None or not layers.intervals or record.config["method"]["sampler"]["kind"] == "all":
        return False
    last = _last_step(record)
    edges, columns = _probabilities(record, last)
    figure = Figure(figsize=(8, min(max(2.6, 1.3 + 0.13 * len(layers.visits)), 12)), layout="constrained")
    axes = figure.subplots()
    uniform = 1 / len(layers.visits)
    top = float(np.nanmax(columns)) if np.isfinite(columns).any() else uniform
    mesh = axes.pcolormesh(
        edges, np.arange(len(layers.visits) + 1) - 0.5, columns, cmap="viridis", vmin=0, vmax=max(top, 2 * uniform)
    )
    firsts = [first for first, _ in layers.intervals]
    middles = [(first + end) / 2 for first, end in zip(firsts, [*firsts[1:], last + 1], strict=True)]
    dots = [(middle, layer) for middle, (_, active) in zip(middles, layers.intervals, strict=True) for layer in active]
    across, up = zip(*dots, strict=True)
    axes.scatter(across, up, s=16, color="white", edgecolors="black", linewidths=0.6)
    axes.set_facecolor("#e4e4e4")
    axes.set(xlim=(1, last + 1), ylim=(-0.5, len(layers.visits) - 0.5), xlabel="step", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("probability of a draw")
    bar.ax.axhline(uniform, color="white", linewidth=2)
    bar.ax.axhline(uniform, color="black", linewidth=1, linestyle="--")
    note = f"dots: drawn; dashed on the bar: uniform, 1/{len(layers.visits)}"
    if layers.refreshes:
        note += "; grey: not measured yet"
    axes.set_title(f"{record.name}: layers drawn\n", fontsize=11)
    axes.text(0.5, 1.015, note, transform=axes.transAxes, ha="center", va="bottom", fontsize=8.5, color="#444444")
    figure.savefig(path, dpi=_DPI)
    return True


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


def plot_loss(record: RunRecord, path: Path) -> bool:
    """Training loss over steps, raw and smoothed. False where no loss was seen."""
    points = record.series.get("train/loss", [])
    if not points:
        return False
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colour = colour_of(record.config["method"]["name"])
    axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1, marker="." if len(steps) < 3 else None)
    window = max(1, len(losses) // 20)
    axes.plot(steps, smooth(losses, window), color=colour, linewidth=2, label=f"mean of {window} steps")
    if window > 1:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title=f"{record.name}: training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)
    return True


def plot_importance(record: RunRecord, path: Path) -> bool:
    """Mean gradient norm by layer, a line a refresh. False for methods that measure none."""
    refreshes = [] if record.layers is None else record.layers.refreshes
    measured = [(step, values) for step, values, _ in refreshes if any(math.isfinite(value) for value in values)]
    if not measured:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shade = Normalize(min(step for step, _ in measured), max(max(step for step, _ in measured), measured[0][0] + 1))
    colours = colormaps["viridis_r"]
    for step, values in measured:
        axes.plot(range(len(values)), values, marker="o", markersize=3.5, linewidth=1.4, color=colours(shade(step)))
    flat = [value for _, values in measured for value in values if math.isfinite(value)]
    if min(flat) > 0 and max(flat) / min(flat) > 30:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(measured) > 1:
        bar = figure.colorbar(ScalarMappable(norm=shade, cmap=colours), ax=axes, pad=0.02)
        bar.set_label("measured at step")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"{record.name}: importance of layers"
    axes.set(xlabel="layer", ylabel="mean gradient norm (MGN)", title=_at(title, measured))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)
    return True


def _at(title: str, measured: Sequence[tuple[int, Sequence[float]]]) -> str:
    return title if len(measured) > 1 else f"{title}, measured at step {measured[0][0]}"
