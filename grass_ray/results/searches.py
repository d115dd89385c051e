"""What searches left behind: which trials they had, who won, and the best settings as a file that other sweeps read.

Settings are judged by the mean loss on held-out training rows (``validation/loss``), never by test questions. ::

    for method, trials in searched(records).items():
        print(method, [trial_loss(record) for record in trials], winner(trials))
    best = best_settings(records)                     # {"grass": ["method.optimizer.lr=0.0003"], ...}
    for line in left_out(records): print(line)        # what could not be compared, and why
    write_settings(best, folder / "best.yaml")        # for `--settings best.yaml`, read by read_settings
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from grass_ray.config import ConfigError, read_yaml
from grass_ray.methods import METHODS, Method, unknown
from grass_ray.overrides import assignment, flatten
from grass_ray.results.record import RunRecord
from grass_ray.training.report import VALIDATION

# what trials differ in without being settings of a method
_NOT_SEARCHED = ("seed", "model.name", "model.revision")

_MOST_NAMED = 6

# settings of a method that may be a schedule over training
_SCHEDULED = tuple(f"method.sampler.{name}" for name in ("num_active_layers", "period", "temperature", "ema"))

Settings = dict[str, list[str]]


def is_search(record: RunRecord) -> bool:
    """Whether a record is of a search's trial, which is not evaluated on the test."""
    return record.search is not None and record.search.stage == "search"


def searched(records: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """The trials of each method's search by number, those of a later sweep last."""
    found: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        if is_search(record):
            found[record.config["method"]["name"]].append(record)
    return {method: sorted(own, key=_place) for method, own in found.items()}


def _place(record: RunRecord) -> tuple[str, int]:
    return record.sweep_id, record.search.number if record.search else 0


def trial_loss(record: RunRecord) -> float:
    """The loss on held-out rows at a trial's end; NaN if it did not finish."""
    return record.metrics.get(VALIDATION, math.nan) if record.status == "finished" else math.nan


def winner(records: Sequence[RunRecord]) -> RunRecord | None:
    """The trial with the lowest loss on held-out rows, the first of equal ones; None if no trial finished."""
    finished = [record for record in records if math.isfinite(trial_loss(record))]
    return min(finished, key=lambda record: (trial_loss(record), _place(record)), default=None)


def rung_losses(record: RunRecord) -> dict[int, float]:
    """Losses on held-out rows that were measured during training, by the number of training steps done."""
    losses = dict(record.series.get(VALIDATION, ()))
    return {done: losses[step] for step, done in record.train_steps(losses).items()}


# ------------------------------------------------------------------------------------------------------- best settings


def best_settings(records: Sequence[RunRecord]) -> Settings:
    """For each method whose trials differ in their settings, the ones with the lowest mean validation loss.

    Settings are only compared where every trial of theirs finished and they have the same seeds and models: those that
    lack one are left out, since a mean over other seeds is another number. Methods without held-out rows, or with one
    point only, are left out; of equal means the first counts. :func:`left_out` says what was not compared.
    """
    best: Settings = {}
    for method, own in _judged(records).items():
        members = [record for record in own if record.search is not None and record.search.lineage]
        found = [_of_a_population(members), _of_trials([record for record in own if record not in members])]
        if known := [pair for pair in found if pair is not None]:
            best[method] = min(known, key=lambda pair: pair[0])[1]
    return best


def _of_trials(records: Sequence[RunRecord]) -> tuple[float, list[str]] | None:
    """The lowest mean loss and its settings; None if there is nothing to compare."""
    losses = _losses(records)
    complete = _complete(losses)
    if len(losses) < 2 or not complete:
        return None
    # summed exactly, so that equal means are equal in every bit
    sums = {point: math.fsum(losses[point].values()) for point in complete}
    point: tuple[str, ...] = min(sums, key=sums.__getitem__)
    return sums[point] / len(losses[point]), list(point)


def left_out(records: Sequence[RunRecord]) -> list[str]:
    """For each method what :func:`best_settings` could not compare, one sentence each."""
    lines = []
    for method, own in _judged(records).items():
        if any(record.search is not None and record.search.scheduler != "none" for record in own):
            continue  # a scheduler ends the worse trials early
        losses = _losses(own)
        if len(losses) < 2 or not any(
            map(math.isfinite, (loss for point in losses.values() for loss in point.values()))
        ):
            continue
        complete, every = _complete(losses), len({cell for own in losses.values() for cell in own})
        missing = [
            f"{', '.join(point)} ({sum(map(math.isfinite, found.values()))} of {every} runs)"
            for point, found in losses.items()
            if point not in complete
        ]
        if missing:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            lines.append(
                f"{method}: {len(complete)} of {len(losses)} settings finished with every seed and model and could be "
                f"chosen; left out: {'; '.join(missing[:_MOST_NAMED])}{more}"
            )
    return lines


_Losses = dict[tuple[str, ...], dict[tuple[str, ...], float]]  # of a point, and of a seed and model there


def _judged(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The records by method, without winners, which are trained again with other seeds."""
    by_method: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.search is None or record.search.stage == "search":
            by_method[record.config["method"]["name"]].append(record)
    return by_method


def _losses(records: Sequence[RunRecord]) -> _Losses:
    """The loss of every trial; NaN if it did not finish. Of a trial that was run again the last run counts."""
    flat = [flatten(record.config, is_leaf=_is_schedule) for record in records]
    keys = sorted({key for values in flat for key in values} - set(_NOT_SEARCHED))
    varied = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    losses: defaultdict[tuple[str, ...], dict[tuple[str, ...], float]] = defaultdict(dict)
    for record, values in zip(records, flat, strict=True):
        # a key that a trial lacks belongs to another kind of part, which no assignment can express
        point = tuple(assignment(key, values[key]) for key in varied if key in values)
        losses[point][tuple(repr(values.get(key)) for key in _NOT_SEARCHED)] = trial_loss(record)
    return losses


def _complete(losses: _Losses) -> list[tuple[str, ...]]:
    """The settings of which no trial failed, and which have every seed and model that such settings have."""
    sound = {point: own for point, own in losses.items() if all(map(math.isfinite, own.values()))}
    every = {cell for own in sound.values() for cell in own}
    return [point for point, own in sound.items() if len(own) == len(every)]


def _of_a_population(members: Sequence[RunRecord]) -> tuple[float, list[str]] | None:
    """The lowest loss and its member's settings; what it changed in mid-training as a schedule of steps.

    What cannot be scheduled (the learning rate, a schedule itself) keeps its last value.
    """
    best = winner(members)
    if best is None:
        return None
    assert best.search is not None
    lineage, steps = best.search.lineage, best.config["training"]["steps"]
    found = []
    for key in lineage[-1].settings:
        values = [step.settings[key] for step in lineage]
        numbers = all(isinstance(value, int | float) for value in values)
        if key in _SCHEDULED and numbers and len(set(values)) > 1:
            changes = [round(step.step / steps, 6) for step in lineage[1:]]
            found.append(assignment(key, {"kind": "step", "values": values, "at_progress": changes}))
        else:
            found.append(assignment(key, values[-1]))
    return trial_loss(best), found


def write_settings(settings: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write settings as ``--settings`` reads them."""
    path.write_text(yaml.safe_dump({"methods": {name: list(own) for name, own in settings.items()}}), encoding="utf-8")


def read_settings(path: Path, known: Mapping[str, Method] = METHODS) -> dict[str, tuple[str, ...]]:
    """Each method's ``dotted.key=value`` assignments.

    Args:
        path: the file.
        known: the methods that there are.

    Raises:
        ConfigError: the file cannot be read, is of another form, or names a method that does not exist.
    """
    form = "methods: {NAME: [dotted.key=value, ...], ...}"
    values = read_yaml(path, "the file of settings")
    methods = values.get("methods") if isinstance(values, dict) and set(values) == {"methods"} else None
    if not isinstance(methods, dict) or not all(
        isinstance(own, list) and all(isinstance(text, str) for text in own) for own in methods.values()
    ):
        raise ConfigError(f"the settings {path} must have the form {form}")
    if strangers := [str(name) for name in methods if name not in known]:
        raise ConfigError(f"the settings {path}: " + "; ".join(unknown("method", name, known) for name in strangers))
    return {name: tuple(own) for name, own in methods.items()}


def _is_schedule(value: Mapping[str, Any]) -> bool:
    return value.get("kind") in ("linear", "cosine", "step")
