"""Methods of a user's own: a YAML file with rows like those of :mod:`grass_ray.methods`.

::

    methods = methods_with(Path("my_methods.yaml"))      # the built-in ones and those of the file, by name
    methods["top-heavy"].config

A part of kind ``import`` is a class of the user's own. Its code is found beside the file or on PYTHONPATH, and is run
because the user named the file: nothing that a configuration or a record mentions is imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grass_ray.config import ConfigError, ImportedPart, MethodConfig, find_code, read_yaml, text_of
from grass_ray.config.base import explain
from grass_ray.methods import METHODS, Method

STEPS = 100  # length of the training for which parts are built to see that they can be


class _Row(MethodConfig):
    """A method of the file: the keys of a method, and what the table says of it."""

    summary: str
    source: str = "-"

    @property
    def method(self) -> Method:
        """The row as one of the table."""
        own = MethodConfig(**{name: getattr(self, name) for name in MethodConfig.model_fields})
        return Method(config=own, summary=self.summary, source=self.source)


def methods_with(path: Path | None) -> Mapping[str, Method]:
    """Return all methods by name: the built-in ones, and those of a method file, whose code is installed and tried.

    Args:
        path: the method file; None for the built-in methods alone.

    Raises:
        ConfigError: lists all mistakes of the file and of the code that it names.
    """
    if path is None:
        return METHODS
    mistakes = []
    methods = {}
    for row in read_rows(path):
        try:
            method = _with_code(row.config, path)
            for part in method.imported_parts:
                part.build_with(STEPS, seed=0, training_steps=STEPS)
            methods[row.name] = Method(config=method, summary=row.summary, source=row.source)
        except ConfigError as error:
            mistakes.append(f"{row.name}: {error}")
    if mistakes:
        raise ConfigError(f"{path}: " + "; ".join(dict.fromkeys(mistakes)))
    return {**METHODS, **methods}


def read_rows(path: Path) -> list[Method]:
    """Read the rows of a method file, without their code. Raises :class:`ConfigError` that lists all mistakes."""
    values = read_yaml(path, "the method file")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"the method file {path} must be a list of methods, such as - {{name: ..., summary: ...}}")
    rows: list[Method] = []
    mistakes = []
    for place, value in enumerate(values, start=1):
        name = value.get("name", place) if isinstance(value, dict) else place
        try:
            row = _Row.model_validate(value).method
        except ValidationError as error:
            mistakes.append(f"method {name}: {explain(error)}")
            continue
        if row.name in METHODS:
            mistakes.append(f"method {name}: there is a built-in method of this name; give yours another")
        elif row.name in {other.name for other in rows}:
            mistakes.append(f"method {name}: the file has two methods of this name")
        rows.append(row)
    if mistakes:
        raise ConfigError(f"{path}: " + "; ".join(mistakes))
    return rows


def code_of(config: MethodConfig) -> dict[str, str]:
    """Text of the modules, by path, that a method's own parts are made of, where this process may run them."""
    return text_of([part.sha256 for part in config.imported_parts if part.sha256])


def _with_code(config: MethodConfig, path: Path) -> MethodConfig:
    """The method with the hashes of its code, which is installed."""
    sampler, projection = (_hashed(part, path) for part in (config.sampler, config.optimizer.projection))
    optimizer = config.optimizer.model_copy(update={"projection": projection})
    return config.model_copy(update={"sampler": sampler, "optimizer": optimizer})


def _hashed(part: Any, path: Path) -> Any:
    if not isinstance(part, ImportedPart):
        return part
    code = find_code(part.target.partition(":")[0], path.parent)
    if part.sha256 not in (None, code.sha256):
        raise ConfigError(f"the sha256 of {part.target} is {code.sha256}, and the file says {part.sha256}")
    code.install()
    return part.model_copy(update={"sha256": code.sha256})
