"""The best settings that a search found, as a file that other sweeps read.

Judged by the mean loss on held-out training rows (``validation/loss``) over seeds, never by test questions::

    best = best_settings(records)                     # {"grass": ["method.optimizer.lr=0.0003"], ...}
    write_settings(best, folder / "best.yaml")        # for `--settings best.yaml`
    read_settings(path)                               # the same again
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from grass_ray.config import ConfigError, assignment
from grass_ray.methods import METHODS, unknown
from grass_ray.results.record import RunRecord
from grass_ray.training.report import VALIDATION

# what trials differ in without being settings of a method
_NOT_SEARCHED = ("seed", "model.name", "model.revision")

# settings of a method that may be a schedule over training
_SCHEDULED = tuple(f"method.sampler.{name}" for name in ("num_active_layers", "period", "temperature", "ema"))

Settings = dict[str, list[str]]


def best_settings(records: Sequence[RunRecord]) -> Settings:
    """For each method whose trials differ in their settings, the ones with the lowest mean validation loss.

    Settings are only compared where every trial of theirs (all seeds and models) finished; methods without held-out
    rows, or with one point only, are left out.
    """
    by_method: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        # winners are trained again to be tested, with seeds that the others never had
        if record.search is None or record.search.stage == "search":
            by_method[record.config["method"]["name"]].append(record)
    best: Settings = {}
    for method, own in by_method.items():
        if any(record.search is not None and record.search.lineage for record in own):
            if found := _of_a_population(own):
                best[method] = found
            continue
        flat = [_leaves("", record.config) for record in own]
        keys = sorted({key for values in flat for key in values} - set(_NOT_SEARCHED))
        varied = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
        losses: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        for record, values in zip(own, flat, strict=True):
            # a key that a trial lacks belongs to another kind of part, which no assignment can express
            point = tuple(assignment(key, values[key]) for key in varied if key in values)
            finished = record.status == "finished"
            losses[point].append(record.metrics.get(VALIDATION, math.nan) if finished else math.nan)
        means = {point: sum(found) / len(found) for point, found in losses.items()}
        means = {point: mean for point, mean in means.items() if math.isfinite(mean)}
        if varied and means:
            winner: tuple[str, ...] = min(means, key=means.__getitem__)
            best[method] = list(winner)
    return best


def _of_a_population(records: Sequence[RunRecord]) -> list[str]:
    """The settings of the member with the lowest loss: what it changed in mid-training as a schedule of steps.

    What cannot be scheduled (the learning rate, a schedule itself) keeps its last value.
    """
    losses = {record.run_id: record.metrics.get(VALIDATION, math.nan) for record in records}
    finished = [r for r in records if r.status == "finished" and math.isfinite(losses[r.run_id])]
    if not finished:
        return []
    best = min(finished, key=lambda record: losses[record.run_id])
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
    return found


def write_settings(settings: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write settings as ``--settings`` reads them."""
    path.write_text(yaml.safe_dump({"methods": {name: list(own) for name, own in settings.items()}}), encoding="utf-8")


def read_settings(path: Path) -> dict[str, tuple[str, ...]]:
    """Each method's ``dotted.key=value`` assignments.

    Raises:
        ConfigError: the file cannot be read, is of another form, or names a method that does not exist.
    """
    form = "methods: {NAME: [dotted.key=value, ...], ...}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the settings {path} are not YAML: {error}") from None
    methods = values.get("methods") if isinstance(values, dict) and set(values) == {"methods"} else None
    if not isinstance(methods, dict) or not all(
        isinstance(own, list) and all(isinstance(text, str) for text in own) for own in methods.values()
    ):
        raise ConfigError(f"the settings {path} must have the form {form}")
    if strangers := [str(name) for name in methods if name not in METHODS]:
        raise ConfigError(f"the settings {path}: " + "; ".join(unknown("method", name, METHODS) for name in strangers))
    return {name: tuple(own) for name, own in methods.items()}


def _leaves(prefix: str, value: Any) -> dict[str, Any]:
    """Dotted keys to plain values; lists and schedules are values."""
    if not isinstance(value, dict) or (prefix and _is_schedule(value)):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _leaves(f"{prefix}.{name}" if prefix else name, inner).items()
    }


def _is_schedule(value: dict[str, Any]) -> bool:
    return value.get("kind") in ("linear", "cosine", "step")
