"""Paths as users type them: ``~`` is home, and what goes into a configuration or a record is absolute.

::

    options = at_home(options)             # every ~ of a command line
    name = find_model("models/mine")       # "/home/me/models/mine"; hub ids and built-in names stay as they are
    config = with_absolute_paths(config)

Workers, and ``reproduce`` tomorrow, run in other directories. A name that is not absolute is therefore never a folder
in a record, and a folder never becomes a hub id.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from grass_ray.config import ConfigError, CustomSource, FolderSource, RunConfig

BUILT_IN = ("smollm2-135m", "tiny")

Options = TypeVar("Options")


def at_home(options: Options) -> Options:
    """A command line's dataclass, with ``~`` at the beginning of a value replaced by the home folder."""
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
    """The path from the root, without links and ``~``."""
    return os.path.realpath(os.path.expanduser(path))


def find_model(name: str) -> str:
    """A model's name as configurations keep it: a folder's absolute path; a built-in name or a hub id unchanged.

    A folder that is there is taken, whether or not the hub has a model of its name.

    Raises:
        ConfigError: the name can only be a path, and there is no folder.
    """
    if name in BUILT_IN:
        return name
    found = os.path.expanduser(name)
    if not os.path.isdir(found):
        check_model_path(name)
        return name
    return absolute(found)


def check_model_path(name: str) -> None:
    """Raise :class:`ConfigError` on a name that can only be a folder's, and no folder has it."""
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


def model_label(name: str) -> str:
    """A model's name to show: of a folder its last component."""
    return os.path.basename(name) if os.path.isabs(name) else name


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with its model's folder and its data's paths absolute.

    Raises:
        ConfigError: as :func:`find_model`.
    """
    source = config.data.source
    match source:
        case FolderSource():
            source = source.model_copy(update={"path": absolute(source.path)})
        case CustomSource():
            train = None if source.train is None else absolute(source.train)
            source = source.model_copy(update={"train": train, "test": absolute(source.test)})
    model = config.model.model_copy(update={"name": find_model(config.model.name)})
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update={"source": source})})
