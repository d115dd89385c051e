"""Search spaces: ranges, alternatives, and alternatives with ranges inside (a number, or a schedule of numbers).

::

    space = {
        "method.optimizer.lr": LogUniform(low=1e-5, high=1e-3),
        "method.sampler.num_active_layers": (1, 2, 4),
        "method.sampler.temperature": OneOf(options={
            "constant": LogUniform(low=0.1, high=2.0),
            "falling": {"kind": "linear", "start": LogUniform(low=1, high=4), "end": LogUniform(low=0.1, high=1)},
        }),
    }
    picks = choose(space, RandomPicker(random.Random(0)))     # every pick by name, in the order it was made
    values(space, picks)                                      # {"method.optimizer.lr": 0.000231, ...}

Whoever picks - chance, Optuna, a population's mutation - sees one list of names and ranges; what is inside an
alternative is only asked for where that alternative was picked. Imports neither ray nor torch nor optuna.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grass_ray.config import ConfigError
from grass_ray.overrides import as_yaml

Pick = float | int | str
Picks = Mapping[str, Pick]


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """A positive hyperparameter, even on a logarithmic scale; three digits, or a whole number."""

    low: float
    high: float
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ConfigError(f"a logarithmic range from {self.low} to {self.high}; it needs 0 < low <= high")

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return self.rounded(self.low * (self.high / self.low) ** rng.random())

    def rounded(self, value: float) -> float:
        """The value inside the range, to three digits or as a whole number."""
        inside = min(max(value, self.low), self.high)
        return math.floor(inside + 0.5) if self.whole else float(f"{inside:.3g}")


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Alternatives by name, each a value, a range, or a mapping of values and ranges."""

    options: Mapping[str, Any]


Dimension = LogUniform | OneOf | Sequence[Any]
Space = Mapping[str, Dimension]


class Picker(Protocol):
    """Whoever decides."""

    def number(self, name: str, among: LogUniform) -> float:
        """A number of a range."""

    def option(self, name: str, labels: Sequence[str]) -> str:
        """One of the labels."""


class RandomPicker:
    """Picks by chance."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def number(self, name: str, among: LogUniform) -> float:
        """A number of a range."""
        return among.draw(self._rng)

    def option(self, name: str, labels: Sequence[str]) -> str:
        """One of the labels."""
        return self._rng.choice(labels)


class Recorder:
    """Lets another picker decide, and keeps what it picked and from what."""

    def __init__(self, inner: Picker) -> None:
        self._inner = inner
        self.picks: dict[str, Pick] = {}
        self.ranges: dict[str, LogUniform | tuple[str, ...]] = {}

    def number(self, name: str, among: LogUniform) -> float:
        """A number of a range."""
        self.ranges[name] = among
        self.picks[name] = value = among.rounded(self._inner.number(name, among))
        return value

    def option(self, name: str, labels: Sequence[str]) -> str:
        """One of the labels."""
        self.ranges[name] = tuple(labels)
        self.picks[name] = label = self._inner.option(name, labels)
        return label


class Replay:
    """Picks again what was picked before."""

    def __init__(self, picks: Picks) -> None:
        self._picks = picks

    def number(self, name: str, among: LogUniform) -> float:
        """A number of a range."""
        return float(self._picks[name])

    def option(self, name: str, labels: Sequence[str]) -> str:
        """One of the labels."""
        return str(self._picks[name])


class Mutation:
    """A population's exploration: numbers times 0.8 or 1.25, the neighbouring choice, now and then a fresh draw.

    Nothing leaves its range. What was not picked before, because another alternative was, is drawn afresh.

    Args:
        picks: of the member whose weights are taken over.
        rng: decides; seeded by member and step, so that a population comes out the same again.
        resample: probability of a fresh draw, for each pick.
    """

    FACTORS = (0.8, 1.25)

    def __init__(self, picks: Picks, rng: random.Random, resample: float = 0.25) -> None:
        self._picks = picks
        self._rng = rng
        self._resample = resample

    def number(self, name: str, among: LogUniform) -> float:
        """A number of a range."""
        if name not in self._picks or self._rng.random() < self._resample:
            return among.draw(self._rng)
        before = float(self._picks[name])
        after = among.rounded(before * self._rng.choice(self.FACTORS))
        # a small whole number times 0.8 or 1.25 may round to itself
        return among.rounded(before + self._rng.choice((-1, 1))) if among.whole and after == before else after

    def option(self, name: str, labels: Sequence[str]) -> str:
        """One of the labels."""
        if self._picks.get(name) not in labels or self._rng.random() < self._resample:
            return self._rng.choice(labels)
        place = labels.index(str(self._picks[name])) + self._rng.choice((-1, 1))
        return labels[min(max(place, 0), len(labels) - 1)]


def choose(space: Space, picker: Picker) -> dict[str, Pick]:
    """Let ``picker`` decide everything that is to be decided; every pick by name."""
    recorder = Recorder(picker)
    for key, dimension in space.items():
        _value(key, dimension, recorder)
    return recorder.picks


def ranges(space: Space, picks: Picks) -> dict[str, LogUniform | tuple[str, ...]]:
    """From what each pick was picked: a range, or labels."""
    recorder = Recorder(Replay(picks))
    for key, dimension in space.items():
        _value(key, dimension, recorder)
    return recorder.ranges


def values(space: Space, picks: Picks) -> dict[str, Any]:
    """The plain value of each key of the space: a number, a text, None, or a schedule's mapping."""
    replay = Replay(picks)
    return {key: _value(key, dimension, replay) for key, dimension in space.items()}


def _value(name: str, dimension: Any, picker: Picker) -> Any:
    match dimension:
        case LogUniform():
            return dimension.rounded(picker.number(name, dimension))
        case OneOf():
            label = picker.option(name, tuple(dimension.options))
            return _value(f"{name}:{label}", dimension.options[label], picker)
        case Mapping():
            return {key: _value(f"{name}.{key}", inner, picker) for key, inner in dimension.items()}
        case list() | tuple() if ":" not in name:
            by_label = labelled(dimension)
            return by_label[picker.option(name, tuple(by_label))]
        case _:
            return dimension


def labelled(choices: Sequence[Any]) -> dict[str, Any]:
    """Each of some values by the label that stands for it among picks."""
    return {as_yaml(value): value for value in choices}


# ------------------------------------------------------------------------------------------------- a space as a file


def to_plain(space: Space) -> dict[str, Any]:
    """The space as plain values, for a file."""
    return {key: _to_plain(dimension) for key, dimension in space.items()}


def from_plain(plain: Mapping[str, Any]) -> dict[str, Dimension]:
    """The space again."""
    return {key: tuple(own) if isinstance(own, list) else _from_plain(own) for key, own in plain.items()}


def _to_plain(dimension: Any) -> Any:
    match dimension:
        case LogUniform():
            return {"log_uniform": [dimension.low, dimension.high], "whole": dimension.whole}
        case OneOf():
            return {"one_of": _each(dimension.options, _to_plain)}
        case Mapping():
            return _each(dimension, _to_plain)
        case list() | tuple():
            return list(dimension)
        case _:
            return dimension


def _from_plain(plain: Any) -> Any:
    match plain:
        case {"log_uniform": [low, high], "whole": whole}:
            return LogUniform(low=low, high=high, whole=whole)
        case {"one_of": options}:
            return OneOf(options=_each(options, _from_plain))
        case dict():
            return _each(plain, _from_plain)
        case _:
            return plain


def _each(mapping: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: change(value) for key, value in mapping.items()}
