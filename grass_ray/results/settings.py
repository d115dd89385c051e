"""What tells the rows of a leaderboard apart: the settings of their runs, and the rows that they trained on.

::

    settings_key(record)                      # equal for the seeds of one row
    variants(groups)                          # ["temperature=0.1", "temperature=0.5"], one per group of seeds
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grass_ray.results.record import RunRecord

# Settings that change no result: runs that differ only in them are one row.
_NO_EFFECT = ("seed", "training.checkpoint_every_steps", "evaluation.batch_size", "evaluation.test")


def settings(record: RunRecord) -> dict[str, str]:
    """The configuration by dotted key, as text, without settings that change no result. A schedule is one text."""
    return {key: value for key, value in _flat("", record.config, _schedule_in_words) if key not in _NO_EFFECT}


def leaf_settings(record: RunRecord) -> dict[str, str]:
    """As :func:`settings`, with one key per number of a schedule."""
    return {key: value for key, value in _flat("", record.config, lambda _: None) if key not in _NO_EFFECT}


def settings_key(record: RunRecord) -> str:
    """A text that is equal for records that are seeds of one row."""
    config: dict[str, Any] = dict(record.config)
    for key in _NO_EFFECT:
        part, _, inner = key.rpartition(".")
        if not part:
            config.pop(inner, None)
        elif isinstance(config.get(part), Mapping):
            config[part] = {name: value for name, value in config[part].items() if name != inner}
    return json.dumps(config, sort_keys=True)


def _flat(prefix: str, value: object, in_words: Callable[[Mapping[str, Any]], str | None]) -> Iterable[tuple[str, str]]:
    if not isinstance(value, Mapping):
        yield prefix, json.dumps(value).strip('"')
    elif (words := in_words(value)) is not None:
        yield prefix, words
    else:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner, in_words)


def _schedule_in_words(value: Mapping[str, Any]) -> str | None:
    """``linear 2 to 0.5``, ``step 2, 0.5 at 0.25``, with the steps where it does not span the training; else None."""
    span = "" if value.get("steps") is None else f" over {value['steps']} steps"
    match value:
        case {"kind": "linear" | "cosine" as kind, "start": start, "end": end}:
            return f"{kind} {start:g} to {end:g}{span}"
        case {"kind": "step", "values": values, "at_progress": shares}:
            numbers, places = (", ".join(f"{number:g}" for number in own) for own in (values, shares))
            return f"step {numbers} at {places}{span}"
        case _:
            return None


def varied_settings(groups: Sequence[Sequence[RunRecord]]) -> dict[str, list[str]]:
    """For each method the settings in which its groups differ, sorted."""
    values: defaultdict[str, defaultdict[str, set[str | None]]] = defaultdict(lambda: defaultdict(set))
    number: defaultdict[str, int] = defaultdict(int)
    seen: defaultdict[tuple[str, str], int] = defaultdict(int)
    for group in groups:
        own = settings(group[0])
        method = own["method.name"]
        number[method] += 1
        for key, value in own.items():
            values[method][key].add(value)
            seen[method, key] += 1
    return {
        method: sorted(key for key in keys if len(keys[key]) > 1 or seen[method, key] < number[method])
        for method, keys in values.items()
    }


def variants(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """For each group what tells it from the other groups of its method, as short as is unambiguous."""
    varied = varied_settings(groups)
    labels = []
    for group in groups:
        own = settings(group[0])
        differing = [key for key in varied[own["method.name"]] if key in own]
        last = [key.rsplit(".", 1)[-1] for key in differing]
        words = [name if last.count(name) == 1 else key for name, key in zip(last, differing, strict=True)]
        labels.append(", ".join(f"{word}={own[key]}" for word, key in zip(words, differing, strict=True)))
    named = [(group[0].config["method"]["name"], label) for group, label in zip(groups, labels, strict=True)]
    times = Counter(named)
    return [
        label if times[name] == 1 else ", ".join(filter(None, [label, f"training rows {_rows_hash(group)}"]))
        for name, label, group in zip(named, labels, groups, strict=True)
    ]


def _rows_hash(group: Sequence[RunRecord]) -> str:
    return next((found[:8] for record in group if (found := training_rows(record))), "unknown")


def train_data(record: RunRecord) -> Mapping[str, Any]:
    """What a record says of its training data; empty if it says nothing."""
    found = record.data.get("train")
    return found if isinstance(found, Mapping) else {}


def training_rows(record: RunRecord) -> str | None:
    """The hash of the rows that a run trained on; None if it is unknown or there were none."""
    found = train_data(record).get("rows_sha256") if record.config["training"]["steps"] else None
    return found if isinstance(found, str) else None
