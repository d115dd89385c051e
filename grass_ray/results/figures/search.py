"""Figures of a search: losses over its trials and settings, trials stopped early, and a population's settings.

::

    figure = draw_search(Runs.of(records))       # None if no record is of a search
    figure = draw_rungs(Runs.of(records))        # ASHA
    figure = draw_population(Runs.of(records))   # PBT

Losses are those on held-out training rows (nats per token): no test question is behind these figures. ``width`` is in
inches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from grass_ray.results.figures.figure import Figure, Runs
from grass_ray.results.figures.style import (
    EDGE,
    SOFT,
    Block,
    draw_blocks,
    is_number,
    legend,
    plain,
    spans_decades,
    style_of,
    tidy,
)
from grass_ray.results.record import LineageStep, RunRecord
from grass_ray.results.searches import rung_losses, searched, trial_loss, winner
from grass_ray.results.settings import leaf_settings
from grass_ray.training.report import HPARAM, VALIDATION

_MOST_KEYS = 12
_FEW = 4  # values that are named one by one under a panel
# members side by side: colours of Okabe and Ito, and of Tol
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
_LOSS = "validation loss (nats per token)"


# ------------------------------------------------------------------------------------- losses over trials and settings


def draw_search(runs: Runs, *, width: float = 12.4) -> Figure | None:
    """The loss of every trial in the order they ran with the best so far, and against each setting that was searched.

    A trial that was stopped early is drawn at its last measured loss. None without a search.
    """
    trials = {method: own for method, own in searched(runs.records).items() if any(_last_loss(r) for r in own)}
    if not trials:
        return None
    varied = _varied(trials)
    drawing, ((part, panels),) = draw_blocks([Block(1 + len(varied), 3.0, 0.5)], width=width, panel_width=4)
    order, *others = panels
    numbers: list[tuple[Any, ...]] = []
    for method, own in trials.items():
        _draw_order(order, method, own)
        for record in own:
            start = (method, _number(record), record.status, _last_loss(record))
            numbers += [(*start, key, leaf_settings(record).get(key)) for key in varied] or [(*start, None, None)]
    order.set(xlabel="trial", title="in the order of the search")
    order.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, key in zip(others, varied, strict=True):
        _draw_setting(axes, key, trials)
    for axes in panels:
        axes.title.set_fontsize(9.5)
        tidy(axes)
    part.supylabel(_LOSS, fontsize=10)
    legend(part, _marks(list(trials)), width)
    best = {method: winner(own) for method, own in trials.items()}
    named = ", ".join(f"{method} {trial_loss(record):.4f}" for method, record in best.items() if record is not None)
    return Figure(
        name="search",
        title="Losses on held-out rows over a search",
        description=f"{sum(map(len, trials.values()))} trials over {', '.join(varied) or 'nothing'}. Best: {named}.",
        drawing=drawing,
        header=("method", "trial", "status", "validation_loss", "setting", "value"),
        rows=numbers,
    )


def _last_loss(record: RunRecord) -> float | None:
    loss = record.metrics.get(VALIDATION, math.nan)
    return loss if math.isfinite(loss) else None


def _number(record: RunRecord) -> int:
    assert record.search is not None
    return record.search.number


def _varied(trials: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """The settings in which trials of a method differ and that have numbers or texts, the most common first."""
    count: dict[str, int] = {}
    for own in trials.values():
        flat = [leaf_settings(record) for record in own]
        for key in dict.fromkeys(key for values in flat for key in values):
            known = [values[key] for values in flat if values.get(key, "null") != "null"]
            if len(set(known)) > 1 and not key.endswith(".kind"):
                count[key] = count.get(key, 0) + len(known)
    return sorted(count, key=lambda key: (-count[key], key))[:_MOST_KEYS]


def _draw_order(axes: Any, method: str, own: Sequence[RunRecord]) -> None:
    style = style_of(method)
    best_so_far: list[tuple[int, float]] = []
    for place, record in enumerate(own):
        _dot(axes, place, record, style.colour)
        if math.isfinite(loss := trial_loss(record)):
            best_so_far.append((place, min(loss, best_so_far[-1][1] if best_so_far else loss)))
    if best_so_far:
        best_so_far.append((len(own) - 1, best_so_far[-1][1]))
        axes.step(*zip(*best_so_far, strict=True), where="post", linewidth=1.6, **style.line())


def _dot(axes: Any, across: float, record: RunRecord, colour: str) -> None:
    """A trial as a dot, as a cross where it was stopped early; nothing where it has no loss."""
    loss = _last_loss(record)
    if loss is not None:
        stopped = record.status != "finished"
        axes.plot(across, loss, marker="x" if stopped else "o", color=colour, markersize=6, alpha=0.85, linestyle="")


def _draw_setting(axes: Any, key: str, trials: Mapping[str, Sequence[RunRecord]]) -> None:
    found = {
        method: [(leaf_settings(r)[key], r) for r in own if key in leaf_settings(r)] for method, own in trials.items()
    }
    texts = {text for points in found.values() for text, _ in points}
    numeric = {text: float(text) for text in texts if is_number(text)}
    others = sorted(texts - numeric.keys())
    logarithmic = spans_decades(list(numeric.values()))
    top = max(numeric.values(), default=0.0)
    # values that are no numbers (null: never) are to the right of the numbers
    apart = 0.2 * (top - min(numeric.values(), default=0.0)) or 1.0
    beside = {text: (top * 2.0 ** (n + 1) if logarithmic else top + (n + 1) * apart) for n, text in enumerate(others)}
    for method, points in found.items():
        for text, record in points:
            _dot(axes, numeric[text] if text in numeric else beside[text], record, style_of(method).colour)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ticks = sorted(set(numeric.values()))
    if others or (len(ticks) <= _FEW and all(tick.is_integer() for tick in ticks)):
        labels = [*(f"{value:g}" for value in ticks), *others]
        axes.set_xticks([*ticks, *beside.values()], labels, fontsize=8, rotation=30 if len(labels) > _FEW else 0)
        axes.minorticks_off()
    axes.set_title(plain(key.removeprefix("method.")))


def _marks(methods: Sequence[str]) -> list[Line2D]:
    """The entries of the legend."""
    return [
        *(Line2D([], [], label=plain(method), **style_of(method).line()) for method in methods),
        Line2D([], [], marker="o", color=SOFT, linestyle="", label="ran to its end"),
        Line2D([], [], marker="x", color=SOFT, linestyle="", label="stopped early, at its last loss"),
    ]


# --------------------------------------------------------------------------------------------------------------- ASHA


def draw_rungs(runs: Runs, *, width: float = 10.5) -> Figure | None:
    """The losses at the rungs, and how far each trial came; two panels per method. None if no trial used ASHA."""
    trials = {
        method: own
        for method, found in searched(runs.records).items()
        if (own := [r for r in found if r.search and r.search.scheduler == "asha" and rung_losses(r)])
    }
    if not trials:
        return None
    blocks = [Block(2, 3.2 + 0.1 * max(0, len(own) - 12), 0.1) for own in trials.values()]
    drawing, parts = draw_blocks(blocks, width=width, panel_width=4.6, share_y=False)
    numbers: list[tuple[Any, ...]] = []
    for (_, (losses, survived)), (method, own) in zip(parts, trials.items(), strict=True):
        numbers += _draw_trials(losses, survived, method, own)
        for rung in sorted({rung for record in own for rung in rung_losses(record)}):
            for axes in (losses, survived):
                axes.axvline(rung, color=EDGE, linewidth=0.9, linestyle=":", zorder=0)
        last = max(record.config["training"]["steps"] for record in own)
        stops = sum(record.status == "stopped" for record in own)
        losses.set(xlabel="updates", ylabel=_LOSS, title=plain(f"{method}: losses at the rungs (dotted) and the end"))
        survived.set(xlabel="updates survived", ylabel="trial", xlim=(0, 1.02 * last))
        survived.set_title(f"{stops} of {len(own)} stopped early; in colour the winner")
        survived.yaxis.set_major_locator(MaxNLocator(integer=True))
        survived.invert_yaxis()
        for axes in (losses, survived):
            axes.title.set_fontsize(9.5)
            tidy(axes)
    every = [record for own in trials.values() for record in own]
    return Figure(
        name="rungs",
        title="Trials stopped early by ASHA",
        description=f"Losses on held-out rows at the rungs of {len(every)} trials, of which "
        f"{sum(record.status == 'stopped' for record in every)} were stopped early.",
        drawing=drawing,
        header=("method", "trial", "status", "winner", "updates", "validation_loss"),
        rows=numbers,
    )


def _draw_trials(losses: Any, survived: Any, method: str, own: Sequence[RunRecord]) -> list[tuple[Any, ...]]:
    """A line and a bar per trial; returns the numbers."""
    best = winner(own)
    numbers = []
    for place, record in enumerate(own):
        points = _rungs(record)
        stopped, won = record.status == "stopped", record is best
        colour = style_of(method).colour if won else EDGE if stopped else SOFT
        across, up = zip(*points, strict=True)
        losses.plot(across, up, color=colour, linewidth=2.2 if won else 1.1, zorder=3 if won else 2)
        losses.plot(across[-1], up[-1], marker="x" if stopped else "o", color=colour, markersize=6, zorder=3)
        survived.barh(place, across[-1], height=0.7, color=colour)
        numbers += [(method, _number(record), record.status, won, *point) for point in points]
    return numbers


def _rungs(record: RunRecord) -> list[tuple[int, float]]:
    """(updates, loss) at the rungs, and at the end if the trial reached it."""
    points = sorted(rung_losses(record).items())
    if math.isfinite(loss := trial_loss(record)):
        points.append((record.config["training"]["steps"], loss))
    return points


# ---------------------------------------------------------------------------------------------------------------- PBT


def draw_population(runs: Runs, *, width: float = 11.2) -> Figure | None:
    """The losses and each setting over training along every member's lineage, and where weights were taken over.

    A triangle marks where a member, or a donor of it, went on from another's weights with changed settings. A block of
    panels per method. None without a population.
    """
    members = {
        method: own
        for method, found in searched(runs.records).items()
        if (own := [record for record in found if record.search and record.search.lineage])
    }
    if not members:
        return None
    watched = {method: _watched(own) for method, own in members.items()}
    blocks = [Block(1 + len(names), 3.3, 0.1) for names in watched.values()]
    drawing, parts = draw_blocks(blocks, width=width, panel_width=3.6, share_y=False)
    numbers: list[tuple[Any, ...]] = []
    for (_, panels), (method, own) in zip(parts, members.items(), strict=True):
        numbers += _draw_members(panels, method, own, watched[method])
        losses, *settings = panels
        losses.set(ylabel=_LOSS, title=plain(f"{method}: along each member's lineage"))
        losses.legend(fontsize=7.5, frameon=False)
        for axes, name in zip(settings, watched[method], strict=True):
            axes.set_title(plain(f"{name} (triangle: taken over, changed)"))
            if spans_decades([value for line in axes.lines for value in line.get_ydata() if value > 0]):
                axes.set_yscale("log")
        for axes in panels:
            axes.set_xlabel("updates")
            axes.title.set_fontsize(9)
            tidy(axes)
    every = [record for own in members.values() for record in own]
    takeovers = len({repr(step) for record in every for step in _takeovers(record)})
    return Figure(
        name="population",
        title="A population's settings over training",
        description=f"Settings of {len(every)} members over training; {takeovers} times one went on from "
        "another's weights.",
        drawing=drawing,
        header=("method", "member", "what", "updates", "value"),
        rows=numbers,
    )


def _draw_members(
    panels: Sequence[Any], method: str, own: Sequence[RunRecord], names: Sequence[str]
) -> list[tuple[Any, ...]]:
    """A line per member in every panel: its losses in the first, then a setting each; returns the numbers."""
    best = winner(own)
    numbers: list[tuple[Any, ...]] = []
    for place, record in enumerate(own):
        look = {"color": _LINES[place % len(_LINES)], "linewidth": 2.4 if record is best else 1.3}
        label = f"member {_number(record)}" + (", the winner" if record is best else "")
        points = _rungs(record)
        if points:
            panels[0].plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=label, **look)
            numbers += [(method, _number(record), VALIDATION, *point) for point in points]
        for axes, name in zip(panels[1:], names, strict=True):
            values = _own_values(record, name)
            axes.plot(*zip(*values, strict=True), drawstyle="steps-pre", **look)
            numbers += [(method, _number(record), name, *value) for value in values]
            for taken in _takeovers(record):
                height = next((value for at, value in values if at > taken.step), values[-1][1])
                axes.plot(taken.step, height, marker="^", markersize=7, linestyle="", color=look["color"])
    return numbers


def _watched(own: Sequence[RunRecord]) -> list[str]:
    names = [name.removeprefix(HPARAM) for record in own for name in record.series if name.startswith(HPARAM)]
    return list(dict.fromkeys(names))


def _takeovers(record: RunRecord) -> list[LineageStep]:
    """Where a member, or a donor of it, went on from another's weights with changed settings."""
    assert record.search is not None
    return [step for step in record.search.lineage if step.step]


def _own_values(record: RunRecord, name: str) -> list[tuple[int, float]]:
    """(updates, value) along a member's lineage, without the probing steps."""
    points = record.series.get(HPARAM + name, [])
    done = record.train_steps(step for step, _ in points)
    return [(done[step], value) for step, value in points if done[step] > 0]
