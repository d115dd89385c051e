"""Rows from a folder of files in the published layout.

Files are searched in the folder itself and in the usual subfolders, so the path may point to any level:

- a task: ``dataset/<Name>/{train,test}.json``, ``<Name>/...`` or ``llm-adapters/dataset/<Name>/...``;
- GSM8K also as its authors publish it: ``{train,test}.jsonl`` in the folder, in ``gsm8k/`` (in the folder, in its
  ``dataset/``, or beside it), or in ``grade_school_math/data/``;
- a training mixture: ``ft-training_set/<mixture>.json``.

::

    folder = DataFolder("data/llm-adapters")
    folder.find_task_file(TASKS["boolq"], "test")
    folder.describe()                                # what it holds, for error messages
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from grass_ray.config import ConfigError, FolderSource
from grass_ray.tasks.mappings import gsm8k
from grass_ray.tasks.row_files import BrokenRows, read_file
from grass_ray.tasks.row_source import LoadedRows, RowSource, build_mixture
from grass_ray.tasks.rows import hash_file
from grass_ray.tasks.suites import SUITES, TASKS, Suite, Task

Split = Literal["train", "test"]

_ROOTS = ("dataset", ".", "llm-adapters/dataset")
_MIXTURE_ROOTS = ("ft-training_set", ".", "llm-adapters/ft-training_set")
_GSM8K_ROOTS = ("gsm8k", "dataset/gsm8k", "../gsm8k", "grade_school_math/data", ".")


class DataFolder:
    """A folder of benchmark files.

    Args:
        path: the folder.
        broken_rows: what to do with rows that cannot be used.

    Raises:
        ConfigError: it is not a folder.
    """

    def __init__(self, path: str, broken_rows: BrokenRows = "refuse") -> None:
        self.broken_rows = broken_rows
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise ConfigError(f"the data folder {path} {what}; give one that holds dataset/<Name>/test.json files")

    def find_task_file(self, task: Task, split: Split) -> Path | None:
        """Find the file of a task's split; None if there is none."""
        candidates = [self.path / root / task.folder / f"{split}.json" for root in _ROOTS]
        if task.key == "gsm8k":
            candidates += [self.path / root / f"{split}.jsonl" for root in _GSM8K_ROOTS]
        return next((path for path in candidates if path.is_file()), None)

    def find_mixture(self, suite: Suite) -> tuple[str, Path] | None:
        """Find the suite's first training mixture: its name and file; None if there is none."""
        for name in suite.mixtures:
            for root in _MIXTURE_ROOTS:
                if (path := self.path / root / f"{name}.json").is_file():
                    return name, path
        return None

    def read(self, path: Path, task: Task | None, description: str = "") -> LoadedRows:
        """Read a file. ``task`` is None for a mixture."""
        reading = read_file(path, task, gsm8k if path.suffix == ".jsonl" else None, self.broken_rows)
        name = Path(os.path.relpath(path, self.path)).as_posix()
        entry = {"name": name, "sha256": hash_file(path), **reading.provenance}
        return LoadedRows(rows=reading.rows, files=[entry], description=description)

    def describe(self) -> str:
        """Describe in one line what the folder holds."""
        parts = [
            f"{split} sets of {', '.join(keys)}"
            for split in ("test", "train")
            if (keys := [key for key, task in TASKS.items() if self.find_task_file(task, split)])
        ]
        parts += [f"the mixture {found[0]}" for suite in SUITES.values() if (found := self.find_mixture(suite))]
        return "; ".join(parts) or "no benchmark files"


class FolderRows(RowSource[FolderSource]):
    """Rows of ``source: {kind: folder, path: DIR}``."""

    def check(self, *, training: bool) -> None:
        """Check that all test sets exist, then read every file."""
        _check_tests(self._open(), self.data.tasks)
        super().check(training=training)

    def train_rows(self) -> LoadedRows:
        """The published mixture, else the training sets of the tasks, else those of the whole suite."""
        folder, suite, tasks = self._open(), SUITES[self.data.suite], self.data.tasks
        if mixture := folder.find_mixture(suite):
            return folder.read(mixture[1], None, f"the mixture {mixture[0]}")
        for candidates in (tasks, suite.tasks):
            present = {key: path for key in candidates if (path := folder.find_task_file(TASKS[key], "train"))}
            if present:
                parts = {key: folder.read(path, TASKS[key]) for key, path in present.items()}
                return build_mixture(parts, suite.mixtures, [key for key in tasks if key not in present])
        expected = ", ".join(f"ft-training_set/{name}.json" for name in suite.mixtures) or "a mixture"
        raise ConfigError(
            f"the data folder {folder.path} has nothing to train {suite.key} on; it needs {expected} or "
            f"dataset/<Name>/train.json of one of {', '.join(suite.tasks)}. It holds: {folder.describe()}"
        )

    def test_rows(self, task: str) -> LoadedRows:
        """The test set of a task."""
        folder = self._open()
        _check_tests(folder, (task,))
        path = folder.find_task_file(TASKS[task], "test")
        assert path is not None
        return folder.read(path, TASKS[task])

    def _open(self) -> DataFolder:
        return DataFolder(self.source.path, self.data.broken_rows)


def _check_tests(folder: DataFolder, tasks: Sequence[str]) -> None:
    missing = [key for key in tasks if folder.find_task_file(TASKS[key], "test") is None]
    if missing:
        names = ", ".join(f"{key} (dataset/{TASKS[key].folder}/test.json)" for key in missing)
        raise ConfigError(f"the data folder {folder.path} has no test set of {names}. It holds: {folder.describe()}")
