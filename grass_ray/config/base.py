"""What every part of a configuration shares: the base class, limits of numbers, and messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

_MOST_SHOWN = 200  # characters of a wrong value


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("it must not be 0")
    return value


MOST = 2**63 - 1  # of torch's and the system's whole numbers
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonZeroFloat = Annotated[float, AfterValidator(_not_zero)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ConfigPart(BaseModel):
    """Base class of every configuration: immutable, unknown keys are refused, docstrings describe the keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class BuildablePart(ConfigPart):
    """Base class of configurations of one object, whose constructor takes the keys as arguments."""

    builds: ClassVar[str]
    """Import path of the object's class, which may need torch; it is imported when the object is built."""

    def make(self, **arguments: Any) -> Any:
        """Construct the object from the keys and ``arguments``, which take precedence."""
        module, _, name = self.builds.rpartition(".")
        keys = {key: value for key, value in self if key != "kind"}
        return getattr(import_module(module), name)(**keys | arguments)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON reads them back. Raises ValueError if there is something else among them, such as a date."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    except TypeError as error:
        raise ValueError(f"give numbers, texts, true, false, null, lists and mappings: {error}") from None
    return found


def explain(error: ValidationError) -> str:
    """List all mistakes of a failed validation in one line, each with its dotted key and the value given."""
    # pydantic adds the chosen alternative of a union to a location; users never wrote it
    alternatives = {"number", "schedule", "third", "indices", *_kinds(ConfigPart)}
    lines = []
    for mistake in error.errors():
        where = ".".join(str(key) for key in mistake["loc"] if key not in alternatives)
        given = mistake.get("input")
        shown = "" if isinstance(given, dict) else f" (given: {_shortened(repr(given))})"
        lines.append(f"{where or 'configuration'}: {mistake['msg']}{shown}")
    return "; ".join(lines)


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _kinds(base: type[ConfigPart]) -> Iterator[str]:
    """The values of ``kind`` of all configurations derived from ``base``."""
    for part in base.__subclasses__():
        if "kind" in part.model_fields:
            yield from get_args(part.model_fields["kind"].annotation)
        yield from _kinds(part)
