"""A custom task: a YAML file that says what an answer is and where the rows are.

::

    name: reviews                # name of the task in tables and records
    answer: labels               # number, letter or labels
    labels: [positive, negative]
    max_new_tokens: 8
    instruction: Is this review positive or negative?     # optional: the same for every row
    train: reviews-train.jsonl   # .json (a list) or .jsonl; relative to this file; needed for training
    test: reviews-test.jsonl
    fields: {input: text, answer: sentiment}              # optional: keys of the rows

    source = read_task_file(Path("reviews.yaml"))         # with absolute paths, so that workers find the files
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from grass_ray.config import ConfigError, CustomSource, DatasetSource, SourceConfig, read_yaml
from grass_ray.tasks.row_files import read_file
from grass_ray.tasks.row_source import LoadedRows, RowSource
from grass_ray.tasks.rows import Row, RowError, hash_file, row_from_record, write_answer
from grass_ray.tasks.suites import SUITES, TASKS, Task
from grass_ray.tasks.templates import render_answer


def read_task_file(path: Path) -> CustomSource:
    """Read the YAML file of a custom task; paths of data files become absolute.

    Raises:
        ConfigError: the file is missing or malformed, its name is taken, or a data file is missing.
    """
    path = Path(os.path.expanduser(path))
    values = read_yaml(path, "the task file")
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
    """Raise :class:`ConfigError` if the name is taken or a data file is missing."""
    if source.name in TASKS or source.name in SUITES:
        raise ConfigError(f"the task name {source.name!r} is taken by a built-in task or suite; give another name")
    absent = [path for path in (source.train, source.test) if path is not None and not Path(path).is_file()]
    if absent:
        raise ConfigError(f"the task {source.name} names files that do not exist: {', '.join(absent)}")


def find_task(key: str, source: SourceConfig) -> Task:
    """Return the task with a key: the custom task or the data set of ``source``, or a built-in one."""
    if isinstance(source, DatasetSource):
        return Task.custom(source.name, "text", (), 1)
    if not isinstance(source, CustomSource):
        return TASKS[key]
    return Task.custom(source.name, source.answer, source.labels, source.max_new_tokens)


class CustomRows(RowSource[CustomSource]):
    """Rows of a custom task."""

    def check_names(self) -> None:
        """Check that suite and task are the custom task."""
        data, name = self.data, self.source.name
        if (data.suite, data.tasks) != (name, (name,)):
            raise ConfigError(
                f"a task of one's own is its own suite: data.suite and data.tasks must be {name}, got "
                f"{data.suite} and {', '.join(data.tasks)}"
            )

    def train_rows(self) -> LoadedRows:
        """Rows of the training file."""
        return self._read("train", self.source.train)

    def test_rows(self, task: str) -> LoadedRows:
        """Rows of the test file."""
        return self._read("test", self.source.test)

    def written_rows(self) -> list[Row]:
        """Rows of both files whose response is not the one that is made from the answer."""
        task = find_task(self.source.name, self.source)
        train = () if self.source.train is None else self.train_rows().rows
        rows = [row for row in (*train, *self.test_rows(task.key).rows) if isinstance(row, Row)]
        return [row for row in rows if row.output != render_answer(task, row.answer)]

    def _read(self, split: Literal["train", "test"], name: str | None) -> LoadedRows:
        check_custom(self.source)
        if name is None:
            raise ConfigError(
                f"the task {self.source.name} has no {split} file; name one in its YAML file ({split}: FILE)"
            )
        path, task = Path(name), find_task(self.source.name, self.source)
        reading = read_file(path, task, lambda record: _row(record, self.source, task), self.data.broken_rows)
        entry = {"name": name, "sha256": hash_file(path), **reading.provenance}
        return LoadedRows(rows=reading.rows, files=[entry], description=f"the {split} file of {self.source.name}")


def _row(record: Mapping[str, Any], source: CustomSource, task: Task) -> Row:
    """Make a row of a record with the user's keys. If it has no response, one is made from the answer."""
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
