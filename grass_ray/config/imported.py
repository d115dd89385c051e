"""Samplers and projections of a user's own, named by their import path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, field_validator

from grass_ray.config.base import ConfigPart, plain
from grass_ray.config.code import check_installed, load
from grass_ray.config.schedules import AnyScheduleConfig
from grass_ray.errors import ConfigError

_SCHEDULE: TypeAdapter[AnyScheduleConfig] = TypeAdapter(AnyScheduleConfig)
_SCHEDULES = ("linear", "cosine", "step")


class ImportedPart(ConfigPart):
    """Base class of parts that a class of the user's own builds."""

    base: ClassVar[str]
    """Import path of what the class must derive from, or of the protocol that it must have."""
    needs: ClassVar[tuple[str, ...]]
    """Members that the class must define itself."""

    target: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    """Import path of the class, as ``package.module:Name``; found beside the method file or on PYTHONPATH."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor. A schedule such as ``{kind: linear, start: 4, end: 1}`` is built."""
    sha256: str | None = None
    """Hash of its code, which ``--method-file`` fills in."""

    @field_validator("args")
    @classmethod
    def _schedules_are_right(cls, args: dict[str, Any]) -> dict[str, Any]:
        for value in args.values():
            if _is_schedule(value):
                _SCHEDULE.validate_python(value)
        return plain(args)

    def check_code(self) -> None:
        """Raise :class:`ConfigError` if this process may not run the class, or has another version of its code."""
        check_installed(self.target, self.sha256)

    def build_with(self, train_steps: int, **offered: Any) -> Any:
        """Import the class and construct it from ``args`` and those of ``offered`` that it takes.

        Raises:
            ConfigError: it cannot be imported, is of another kind, does not take the arguments, or refuses them.
        """
        found = load(self.target, self.sha256)
        self._check_kind(found)
        arguments = {
            key: _SCHEDULE.validate_python(value).build(train_steps) if _is_schedule(value) else value
            for key, value in self.args.items()
        }
        signature = inspect.signature(found)
        arguments |= {key: value for key, value in offered.items() if key in signature.parameters}
        try:
            signature.bind(**arguments)
        except TypeError as error:
            takes = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
            raise ConfigError(f"{self.target}: args do not fit: {error}; it takes {takes}") from None
        try:
            return found(**arguments)
        except ValueError as error:
            raise ConfigError(f"{self.target}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{self.target}: its constructor raises {type(error).__name__}: {error}") from error

    def _check_kind(self, found: type) -> None:
        module, _, name = self.base.rpartition(".")
        base = getattr(import_module(module), name)
        if not getattr(base, "_is_protocol", False) and not issubclass(found, base):
            raise ConfigError(f"{self.target} is not a {name.lower()}: derive it from {self.base}")
        members = [member for member in self.needs if getattr(found, member, None) in (None, getattr(base, member))]
        # a base class of the package's may leave one of its own to a subclass
        members += ["pick"] if "grass_ray.layerwise.periodic" in _undefined(found, "pick") else []
        if members:
            raise ConfigError(f"{self.target} lacks {', '.join(members)}; see {self.base}")


def _undefined(found: type, member: str) -> str:
    """Module of the class that defines ``member``; empty if none does."""
    return next((owner.__module__ for owner in found.__mro__ if member in vars(owner)), "")


def _is_schedule(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("kind") in _SCHEDULES
