"""Expand ``~`` in the paths of a command line, and make paths in configurations absolute.

::

    options = at_home(options)             # expands every ~ of a command line
    name = find_model("models/mine")       # "/home/me/models/mine"; hub ids and built-in models are returned unchanged
    config = with_absolute_paths(config)

Workers and later commands, such as ``reproduce``, run in other directories. In a record, a model name that is not an
absolute path is therefore always a hub id or a built-in model.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from grass_ray.config import ConfigError, RunConfig

BUILT_IN = ("smollm2-135m", "tiny")

Options = TypeVar("Options")


def at_home(options: Options) -> Options:
    """Return a copy of a command line's dataclass with ``~`` at the start of values replaced by the home folder."""
    values = {field.name: _at_home(getattr(options, field.name)) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return dataclasses.replace(options, **values)  # type: ignore[type-var]


def _at_home(value: Any) -> Any:
    match value:
        case str():
            return os.path.expanduser(value)
        case Path():
            return Path(os.path.expanduser(value))
        case tuple():
            return tuple(map(_at_home, value))
    return at_home(value) if dataclasses.is_dataclass(value) else value


def absolute(path: str | Path) -> str:
    """Return the absolute path with links and ``~`` resolved."""
    return os.path.realpath(os.path.expanduser(path))


def find_model(name: str) -> str:
    """Return the name of a model as configurations keep it.

    An existing folder takes precedence over a model on the Hub with the same name.

    Returns:
        The absolute path of a folder; a hub id or the name of a built-in model unchanged.

    Raises:
        ConfigError: the name can only be a path, and there is no such folder.
    """
    if name in BUILT_IN:
        return name
    found = os.path.expanduser(name)
    if not os.path.isdir(found):
        check_model_path(name)
        return name
    return absolute(found)


def check_model_path(name: str) -> None:
    """Raise :class:`ConfigError` if the name can only be a path and there is no such folder."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return
    if os.path.exists(path):
        kind = "a GGUF file" if name.lower().endswith(".gguf") else "a file"
        raise ConfigError(f"the model {name!r} is {kind}; give a folder written by save_pretrained")
    if name.startswith(("/", "./", "../", "~")) or name in ("", ".", "..") or name.count("/") > 1 or name[-1] == "/":
        raise ConfigError(
            f"there is no model folder {name!r}{'' if os.path.isabs(path) else f' in {os.getcwd()}'}; put it back, or "
            "name the folder where it is now (a hub id is NAME or OWNER/NAME)"
        )


def is_path(task: str) -> bool:
    """Whether a task of lm-eval is meant as a folder or file: it has a slash, or ends like a YAML file."""
    return "/" in task or task.lower().endswith((".yaml", ".yml"))


def model_label(name: str) -> str:
    """Return the name of a model for tables: the last component of a folder's path."""
    return os.path.basename(name) if os.path.isabs(name) else name


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths of the model and the data.

    Raises:
        ConfigError: as :func:`find_model`.
    """
    model = config.model.model_copy(update={"name": find_model(config.model.name)})
    data = config.data.model_copy(update={"source": config.data.source.map_paths(absolute)})
    text = config.evaluation.forgetting
    if text is not None and os.path.exists(os.path.expanduser(text)):
        text = absolute(text)
    tasks = tuple(absolute(task) if is_path(task) else task for task in config.evaluation.lm_eval.tasks)
    lm_eval = config.evaluation.lm_eval.model_copy(update={"tasks": tasks})
    evaluation = config.evaluation.model_copy(update={"forgetting": text, "lm_eval": lm_eval})
    return config.model_copy(update={"model": model, "data": data, "evaluation": evaluation})
