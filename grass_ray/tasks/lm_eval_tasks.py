"""Find and load tasks of lm-eval: those of its own registry, and folders or YAML files of the user's own.

::

    check_lm_eval(config.evaluation.lm_eval)             # unknown names, broken files: before a model is loaded
    loaded = load_lm_eval(config.evaluation.lm_eval)     # reads the data, too; may need the network
    loaded.tasks, loaded.manager                         # for lm_eval.simple_evaluate

Importing this module loads neither torch nor lm-eval.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from grass_ray.config import ConfigError, LmEvalConfig
from grass_ray.paths import is_path

_MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        tasks: objects of lm-eval, tasks and groups.
        parts: the names of the tasks that each name in lm-eval's results is made of: a task's own, or those of a group.
        manager: lm-eval's index, in which they were found.
    """

    tasks: list[Any]
    parts: dict[str, tuple[str, ...]]
    manager: Any


def check_lm_eval(config: LmEvalConfig) -> None:
    """Check the names, and load what is in the user's own folders.

    The data of tasks of the registry are not read, since that may take a network.

    Raises:
        ConfigError: a name is unknown, or a folder or file cannot be used; with all mistakes.
    """
    mistakes: list[str] = []
    for name in config.tasks:
        try:
            _load_own(name) if is_path(name) else _matching(name)
        except ConfigError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise ConfigError("; ".join(mistakes))


def load_lm_eval(config: LmEvalConfig) -> LoadedTasks:
    """Load the tasks and their data.

    Raises:
        ConfigError: as :func:`check_lm_eval`, or a task cannot be loaded or run.
    """
    found: list[Any] = []
    with _quiet():
        for name in config.tasks:
            if is_path(name):
                found += _load_own(name)
            else:
                found += [part for match in _matching(name) for part in _load(match, _registry(), name)]
        manager = _registry() if not all(map(is_path, config.tasks)) else _index()
        try:
            loaded = manager.load(found)
        except ValueError as error:  # the same task twice
            raise ConfigError(f"evaluation.lm_eval.tasks: {error}") from None
    mistakes = [mistake for name, task in loaded["tasks"].items() if (mistake := _cannot_run(name, task))]
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return LoadedTasks(tasks=found, parts=_parts(found), manager=manager)


def _cannot_run(name: str, task: Any) -> str | None:
    if getattr(task, "UNSAFE_CODE", False):
        return f"the task {name} of lm-eval runs code that the model writes, which is refused here; leave it out"
    if getattr(task, "MULTIMODAL", False):
        return f"the task {name} of lm-eval asks about pictures; give a task about text"
    return None


def leaves(found: Iterable[Any]) -> Iterator[Any]:
    """The tasks themselves, those of groups too."""
    for item in found:
        yield from item.get_all_tasks() if hasattr(item, "get_all_tasks") else (item,)


def _parts(found: list[Any]) -> dict[str, tuple[str, ...]]:
    """A group is one result if lm-eval averages its tasks; else its members are results of their own."""
    parts: dict[str, tuple[str, ...]] = {}
    for item in found:
        if not hasattr(item, "get_all_tasks"):
            parts[item.task_name] = (item.task_name,)
        elif item.has_aggregation:
            parts[item.name] = tuple(task.task_name for task in item.get_all_tasks())
        else:
            parts |= _parts(list(item))
    return parts


# -------------------------------------------------------------------------------------------------------- the registry


@lru_cache(maxsize=1)
def _registry() -> Any:
    """lm-eval's index of its own tasks; reading their thousands of files takes some seconds."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager()


def _index(*folders: str) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=list(folders), include_defaults=False)


def _matching(name: str) -> list[str]:
    """The registered names that a name or pattern means."""
    registry = _registry()
    found: list[str] = registry.match_tasks([name])
    if found:
        return found
    near = get_close_matches(name, registry.all_tasks, n=_MOST_SHOWN, cutoff=0.6)
    here = f"; the folder is written {name}/" if os.path.isdir(name) else ""
    raise ConfigError(
        f"lm-eval has no task {name!r}{here}"
        + (f"; near names: {', '.join(near)}" if near else "; `lm_eval ls tasks` lists them all")
    )


# ------------------------------------------------------------------------------------------------------ the user's own


def _load_own(name: str) -> list[Any]:
    """The tasks of a folder, or of one YAML file."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return _load(str(path), _index(), name, path.parent)
    if not path.is_dir():
        raise ConfigError(f"there is no folder or file of tasks {name}")
    _check_files(path)
    index = _index(str(path))
    entries = {key: entry for key, entry in index.task_index.items() if entry.yaml_path is not None}
    listed = {key: _listed(entry.cfg) for key, entry in entries.items()}
    members = {
        str(item if isinstance(item, str) else item.get("task") or item.get("group"))
        for items in listed.values()
        for item in items
    }
    if not members <= index.task_index.keys():  # a group may have tasks of the registry
        for key, entry in _registry().task_index.items():
            index.task_index.setdefault(key, entry)
    for key, items in listed.items():
        if unknown := [item for item in items if isinstance(item, str) and item not in index.task_index]:
            raise ConfigError(f"the group {key} in {name} has tasks that are unknown: {', '.join(unknown)}")
    chosen = [key for key in entries if key not in members]
    if not chosen:
        raise ConfigError(
            f"the folder {name} has no task of lm-eval: a YAML file (.yaml) with the key task, and what it needs"
        )
    return [part for key in chosen for part in _load(key, index, name, Path(entries[key].yaml_path).parent)]


def _check_files(folder: Path) -> None:
    """Refuse files that cannot be read, which lm-eval would leave out without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except (yaml.YAMLError, OSError) as error:
            raise ConfigError(f"the task file {file} cannot be read: {' '.join(str(error).split())}") from None
        except ValueError:
            continue  # no mapping, so no task


def _listed(cfg: dict[str, Any]) -> list[Any]:
    """What a group lists: names of tasks, and mappings that change or define one."""
    listed = cfg.get("task") if "group" in cfg else None
    return listed if isinstance(listed, list) else []


def _load(key: str, manager: Any, name: str, folder: Path | None = None) -> list[Any]:
    """Load one task, group or tag; relative paths in a YAML file are relative to its folder.

    Args:
        key: the name in the index, or the path of a YAML file.
        manager: lm-eval's index.
        name: what the user gave, for messages.
        folder: of the YAML file.
    """

    def load() -> list[Any]:
        with _quiet():
            found = manager.load([key])
        inside = {task for group in found.get("groups", {}).values() for task in group.child_names}
        whole = {**found.get("groups", {}), **found["tasks"]}
        return [item for own, item in whole.items() if own not in inside]

    if folder is None:
        return _said(load, f"the task {key} of lm-eval")
    where = f"the task {key} in {name}" if key != str(name) else f"the task file {name}"
    with chdir(folder):
        return _said(load, where, " (paths in a task's file are relative to its folder)")


def _said(load: Callable[[], list[Any]], what: str, hint: str = "") -> list[Any]:
    """Load, and say in one sentence what a task's data, code or missing package did not allow."""
    try:
        return load()
    except ImportError as error:
        raise ConfigError(f"{what} cannot be loaded: {error}; install what it needs") from None
    except Exception as error:  # whatever data sets, YAML files and the tasks' own code raise
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TypeError) and "NoneType" in said:
            hint = "; is a key missing, such as dataset_path?"
        elif not isinstance(error, OSError):
            hint = ""
        raise ConfigError(f"{what} cannot be loaded: {said}{hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """In the block lm-eval only says what is wrong, and no progress bars are shown."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
