"""A user's own data set as a task: one YAML file that says what an answer is and where the rows are.

::

    name: reviews                # of the task, in tables and records
    answer: labels               # number, letter or labels
    labels: [positive, negative]
    max_new_tokens: 8
    instruction: Is this review positive or negative?     # optional: the same for every row
    train: reviews-train.jsonl   # .json (a list) or .jsonl; relative to this file; needed for training
    test: reviews-test.jsonl
    fields: {input: text, answer: sentiment}              # optional: the rows' own keys

    source = read_task_file(Path("reviews.yaml"))         # everything above, with absolute paths: travels to workers
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from grass_ray.config import ConfigError, CustomSource, DataConfig, SourceConfig
from grass_ray.tasks.rows import BrokenRows, Row, RowError, hash_file, read_file, row_from_record, write_answer
from grass_ray.tasks.suites import SUITES, TASKS, Task, check_tasks
from grass_ray.tasks.templates import render_answer


def read_task_file(path: Path) -> CustomSource:
    """A task's YAML file as a source whose files have absolute paths.

    Raises :class:`ConfigError` on a missing or malformed file, a name that is taken, or absent data files.
    """
    path = Path(os.path.expanduser(path))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the task file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the task file {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"the task file {path} holds {type(values).__name__}; it must be a mapping with name and test"
        )
    values = {key: value for key, value in values.items() if key != "kind"}
    for split in ("train", "test"):
        if isinstance(values.get(split), str):
            values[split] = str((path.parent / os.path.expanduser(values[split])).resolve())
    source = CustomSource.parse(values, f"the task file {path}")
    check_custom(source)
    return source


def check_custom(source: CustomSource) -> None:
    """Raise :class:`ConfigError` where the name is taken or a file is absent."""
    if source.name in TASKS or source.name in SUITES:
        raise ConfigError(f"the task name {source.name!r} is taken by a built-in task or suite; give another name")
    absent = [path for path in (source.train, source.test) if path is not None and not Path(path).is_file()]
    if absent:
        raise ConfigError(f"the task {source.name} names files that do not exist: {', '.join(absent)}")


def find_task(key: str, source: SourceConfig) -> Task:
    """The task of that key: the user's own where ``source`` is one, else a built-in one."""
    if not isinstance(source, CustomSource):
        return TASKS[key]
    return Task(
        key=source.name,
        title=source.name,
        suite=source.name,
        folder=source.name,
        answer=source.answer,
        labels=source.labels,
        max_new_tokens=source.max_new_tokens,
        test_rows=None,
    )


def check_selection(data: DataConfig) -> None:
    """Raise :class:`ConfigError` unless the source serves the suite and tasks, as far as names can tell."""
    if not isinstance(data.source, CustomSource):
        check_tasks(data.suite, data.tasks)
    elif (data.suite, data.tasks) != (data.source.name, (data.source.name,)):
        raise ConfigError(
            f"a task of one's own is its own suite: data.suite and data.tasks must be {data.source.name}, got "
            f"{data.suite} and {', '.join(data.tasks)}"
        )


def read_custom(
    source: CustomSource, split: Literal["train", "test"], broken_rows: BrokenRows
) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """One file's rows and its entry in a provenance. Raises :class:`ConfigError` on what cannot be used."""
    check_custom(source)
    name = source.train if split == "train" else source.test
    if name is None:
        raise ConfigError(f"the task {source.name} has no train file; name one in its YAML file (train: FILE)")
    task = find_task(source.name, source)
    reading = read_file(Path(name), task, lambda record: _row(record, source, task), broken_rows)
    return reading.rows, {"name": name, "sha256": hash_file(Path(name)), **reading.provenance}


def _row(record: Mapping[str, Any], source: CustomSource, task: Task) -> Row:
    """A record under the user's keys as a row; the response is made from the answer where there is none."""
    fields = source.fields
    wanted = [fields.answer] if source.instruction is not None else [fields.instruction, fields.answer]
    if missing := [key for key in wanted if key not in record]:
        raise RowError(
            f"no {' and no '.join(map(repr, missing))}; it has {', '.join(map(repr, record)) or 'no keys'} "
            "(fields: in the task file says which keys to take)"
        )
    answer = record[fields.answer]
    if isinstance(answer, bool):
        answer = next((label for label in task.labels if label.lower() == str(answer).lower()), str(answer).lower())
    values = {
        "instruction": record.get(fields.instruction) if source.instruction is None else source.instruction,
        "input": record.get(fields.input, ""),
        "output": record.get(fields.output) or render_answer(task, write_answer(answer, task)),
        "answer": answer,
    }
    return row_from_record(values, task)
