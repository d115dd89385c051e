"""Nested configurations by dotted key: flatten, look up, change, compare, and changes written as text.

Inside the program changes are mappings; ``key=value`` is parsed where a command line or a file is read::

    changes = parse(["training.steps=100", "method.sampler.temperature=0.2"])
    changes == {"training.steps": 100, "method.sampler.temperature": 0.2}
    config.override(changes)

Configurations are plain nested dictionaries here, as :meth:`grass_ray.config.RunConfig.to_dict` gives them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from grass_ray.errors import ConfigError
from grass_ray.reading import parse_yaml

Changes = Mapping[str, Any]  # dotted key -> new value, applied in order


def flatten(
    values: Mapping[str, Any], *, is_leaf: Callable[[Mapping[str, Any]], bool] = lambda part: False
) -> dict[str, Any]:
    """Map each dotted key to its value. Lists are values, and so is a mapping for which ``is_leaf`` is true."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not is_leaf(value):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value, is_leaf=is_leaf).items()}
        else:
            flat[key] = value
    return flat


def has(values: Mapping[str, Any], key: str) -> bool:
    """Return whether the dotted key names a value or a part."""
    part: Any = values
    for name in key.split("."):
        if not isinstance(part, Mapping) or name not in part:
            return False
        part = part[name]
    return True


def apply(values: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return a copy with the changes made, one after another.

    Raises:
        ConfigError: a key does not exist; the message lists those that do.
    """
    changed = copy.deepcopy(dict(values))
    for key, value in changes.items():
        part: Any = changed
        *parents, last = key.split(".")
        for depth, name in enumerate([*parents, last]):
            if not isinstance(part, dict) or name not in part:
                where = ".".join(parents[:depth]) or "the configuration"
                available = ", ".join(part) if isinstance(part, dict) else "no keys"
                raise ConfigError(
                    f"cannot apply {assignment(key, value)!r}: {where} has no key {name!r}; it has {available}"
                )
            if depth < len(parents):
                part = part[name]
        part[last] = value
    return changed


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``new`` that differ, by dotted key; a part with other keys is one value."""
    changes: dict[str, Any] = {}
    for key, value in new.items():
        before = old[key]
        if isinstance(before, Mapping) and isinstance(value, Mapping) and before.keys() == value.keys():
            changes |= {f"{key}.{inner}": leaf for inner, leaf in diff(before, value).items()}
        elif before != value:
            changes[key] = value
    return changes


def merge(*layers: Changes) -> dict[str, Any]:
    """Return all changes as one mapping in which later ones win and are applied last."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            merged.pop(key, None)  # a part that is replaced after a key inside it takes that key's change with it
            merged[key] = value
    return merged


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``dotted.key=value`` texts; values are YAML, the last of equal keys wins. Raises :class:`ConfigError`."""
    changes: list[Changes] = []
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"cannot read the override {text!r}; write it as dotted.key=value")
        changes.append({key: parse_yaml(value, f"cannot read the override {text!r}: the value")})
    return merge(*changes)


def assignment(key: str, value: object) -> str:
    """Return ``key=value`` as :func:`parse` reads it; the value as one line of YAML that reads back equal."""
    return f"{key}={as_yaml(value)}"


def as_yaml(value: object) -> str:
    """Return the value as one line of YAML that reads back equal."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000_000)
    return text.removesuffix("\n").removesuffix("...").strip()
