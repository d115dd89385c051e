"""The settings of a method as flags of ``grass-ray train METHOD``, such as ``--sampler.period 10`` for GRASS.

Each key of the method's configuration becomes a flag with its name, type, default and description. Values are YAML and
are validated by the configuration, like those of ``--set``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from tyro.conf import arg

from grass_ray.config import ConfigPart, MethodConfig
from grass_ray.overrides import as_yaml

# chosen by the method, or a flag of every method
_WITHOUT_FLAG = ("name", "kind", "lr", "target", "sha256")
_TYPES = {Any: "VALUE", int: "INT", float: "FLOAT", bool: "true|false", str: "STR", NoneType: "null", tuple: "LIST"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodFlags:
    """The settings of a method that were given as flags. A method's own class has a field per setting."""

    def assignments(self) -> list[str]:
        """Return the settings as ``dotted.key=value``."""
        given = {field.metadata["key"]: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [f"{key}={value}" for key, value in given.items() if value is not None]


def method_flags(method: MethodConfig) -> type[MethodFlags]:
    """Return the class whose fields are the settings of ``method``, as tyro reads it."""
    described = []
    for key, value, info in _settings(method):
        flag = arg(
            name=key,
            metavar="|".join(dict.fromkeys(_types(info.annotation))),
            help=" ".join((info.description or "").replace("``", "").split()),
            help_behavior_hint=f"(default: {as_yaml(value)})",
        )
        field = dataclasses.field(default=None, metadata={"key": f"method.{key}"})
        described.append((key.replace(".", "_"), Annotated[str | None, flag], field))
    flags = dataclasses.make_dataclass("MethodFlags", described, bases=(MethodFlags,), frozen=True, kw_only=True)
    flags.__doc__ = f"Settings of the method {method.name}."
    return flags


def _settings(part: ConfigPart, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """The dotted key, value and field of each setting in ``part`` and in the parts that the method has."""
    for name, info in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, ConfigPart):
            yield from _settings(value, f"{prefix}{name}.")
        elif isinstance(value, dict):  # arguments of something that is not ours to describe
            for key, inner in value.items():
                yield f"{prefix}{name}.{key}", inner, FieldInfo(annotation=Any)
        elif name not in _WITHOUT_FLAG and not (value is None and name in ("adapter", "projection")):
            yield prefix + name, value, info


def _types(annotation: Any) -> Iterator[str]:
    """What a value may be: the choices of a Literal, else the names of its types."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types(inner[0])
    elif origin is Literal:
        yield from map(str, inner)
    elif origin is tuple or not inner:
        yield _TYPES.get(origin or annotation, "SCHEDULE")
    else:
        for option in inner:
            yield from _types(option)
