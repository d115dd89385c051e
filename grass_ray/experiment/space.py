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
    params = sample(space, at_random(random.Random(0)))       # {"method.optimizer.lr": 0.000231, ...}
    values(space, params)                                     # the same as changes of a configuration

A point of a space is a flat mapping of parameters. A parameter inside an alternative exists only where that alternative
was chosen. Whatever chooses (random numbers, Optuna, the mutation of a population) is a function that gets a name and a
distribution and returns a parameter. Imports neither ray nor torch nor optuna.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from typing_extensions import TypeAliasType

from grass_ray.config import ConfigError
from grass_ray.overrides import as_yaml


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """A positive number, uniform on a logarithmic scale; rounded to three digits, or to an integer.

    Args:
        low: the smallest value, greater than 0.
        high: the largest value.
        whole: only integers.
    """

    low: float
    high: float
    whole: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ConfigError(f"a logarithmic range from {self.low} to {self.high}; it needs 0 < low <= high")

    def draw(self, rng: random.Random) -> float:
        """Draw one value."""
        return self.rounded(self.low * (self.high / self.low) ** rng.random())

    def rounded(self, value: float) -> float:
        """Clip the value to the range, and round it to three digits or to an integer."""
        inside = min(max(value, self.low), self.high)
        return math.floor(inside + 0.5) if self.whole else float(f"{inside:.3g}")


def _read_older_form(value: Any) -> Any:
    """Plans of sweeps that older versions began write ranges and alternatives in another form."""
    match value:
        case {"log_uniform": [low, high], "whole": whole}:
            return {"low": low, "high": high, "whole": whole}
        case {"one_of": options}:
            return {"options": options}
        case _:
            return value


Dimension = TypeAliasType(
    "Dimension",
    Annotated[
        "LogUniform | OneOf | dict[str, Dimension] | Any",
        Field(union_mode="left_to_right"),
        BeforeValidator(_read_older_form),
    ],
)


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Alternatives by name, each a value, a range, or a mapping of values and ranges."""

    options: Mapping[str, Dimension]


Space = Mapping[str, Dimension]  # dotted key -> LogUniform, OneOf or a sequence of values
_SPACE: TypeAdapter[Space] = TypeAdapter(Space)
Param = float | int | str
Params = Mapping[str, Param]
Distribution = LogUniform | tuple[str, ...]  # a range, or the labels of values or alternatives
Choose = Callable[[str, Distribution], Param]  # a parameter's name and distribution -> the parameter


def read_space(plain: Mapping[str, Any]) -> Space:
    """Read a space that was written as plain values."""
    return _SPACE.validate_python(plain)


def at_random(rng: random.Random) -> Choose:
    """Draw every parameter at random."""

    def choose(name: str, among: Distribution) -> Param:
        return among.draw(rng) if isinstance(among, LogUniform) else rng.choice(among)

    return choose


def mutation(params: Params, rng: random.Random, *, resample: float = 0.25) -> Choose:
    """Explore around a point, as a population does: numbers times 0.8 or 1.25, choices to their neighbours.

    Nothing leaves its range. Parameters that the point lacks, because it took another alternative, are drawn afresh.

    Args:
        params: the point of the member whose weights are copied.
        rng: seeded by member and step, so that every run of a population is the same.
        resample: probability of a fresh draw, for each parameter.
    """

    def choose(name: str, among: Distribution) -> Param:
        before = params.get(name)
        if isinstance(among, LogUniform):
            if before is None or rng.random() < resample:
                return among.draw(rng)
            after = among.rounded(float(before) * rng.choice((0.8, 1.25)))
            if among.whole and after == before:  # a small integer times 0.8 or 1.25 may round to itself
                return among.rounded(float(before) + rng.choice((-1, 1)))
            return after
        if before not in among or rng.random() < resample:
            return rng.choice(among)
        place = among.index(str(before)) + rng.choice((-1, 1))
        return among[min(max(place, 0), len(among) - 1)]

    return choose


def sample(space: Space, choose: Choose) -> dict[str, Param]:
    """Let ``choose`` choose a point; parameters are in the order in which they were asked for."""
    return {name: param for name, (_, param) in _walk(space, choose)[1].items()}


def distributions(space: Space, params: Params) -> dict[str, Distribution]:
    """Return the distribution that each parameter of a point was chosen from."""
    return {name: among for name, (among, _) in _walk(space, lambda name, _: params[name])[1].items()}


def values(space: Space, params: Params) -> dict[str, Any]:
    """Return the value of each key of the space at a point: a number, a text, None, or a schedule's mapping."""
    return _walk(space, lambda name, _: params[name])[0]


def labels(choices: Sequence[Any]) -> dict[str, Any]:
    """Return values by the label that stands for each as a parameter."""
    return {as_yaml(value): value for value in choices}


def _walk(space: Space, choose: Choose) -> tuple[dict[str, Any], dict[str, tuple[Distribution, Param]]]:
    """Return the value of each key, and what was asked for on the way with what was chosen."""
    asked: dict[str, tuple[Distribution, Param]] = {}

    def ask(name: str, among: Distribution) -> Param:
        param = choose(name, among)
        asked[name] = (among, among.rounded(float(param)) if isinstance(among, LogUniform) else str(param))
        return asked[name][1]

    def value_of(name: str, dimension: Any) -> Any:
        match dimension:
            case LogUniform():
                return ask(name, dimension)
            case OneOf(options=options):
                label = ask(name, tuple(options))
                return value_of(f"{name}:{label}", options[str(label)])
            case Mapping():
                return {key: value_of(f"{name}.{key}", inner) for key, inner in dimension.items()}
            case list() | tuple() if ":" not in name:
                by_label = labels(dimension)
                return by_label[str(ask(name, tuple(by_label)))]
            case _:
                return dimension

    return {key: value_of(key, dimension) for key, dimension in space.items()}, asked
