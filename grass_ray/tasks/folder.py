"""The folder source: files in the published layout, found wherever in it the user points.

Under the given path a task's files are looked for as ``dataset/<Name>/{train,test}.json``, ``<Name>/...`` and
``llm-adapters/dataset/<Name>/...``; GSM8K also in its authors' own form, ``{train,test}.jsonl`` in ``gsm8k/`` (in the
path, in its ``dataset/``, or beside it), in ``grade_school_math/data/``, or in the path itself; the training
mixtures as ``ft-training_set/<mixture>.json``::

    folder = DataFolder("data/llm-adapters")
    folder.find_task_file(TASKS["boolq"], "test")
    folder.describe()                                # what is there, for error messages
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from grass_ray.config import ConfigError
from grass_ray.tasks.mappings import gsm8k
from grass_ray.tasks.rows import BrokenRows, Row, hash_file, read_file
from grass_ray.tasks.suites import SUITES, TASKS, Suite, Task

Split = Literal["train", "test"]

_ROOTS = ("dataset", ".", "llm-adapters/dataset")
_MIXTURE_ROOTS = ("ft-training_set", ".", "llm-adapters/ft-training_set")
_GSM8K_ROOTS = ("gsm8k", "dataset/gsm8k", "../gsm8k", "grade_school_math/data", ".")


class DataFolder:
    """A folder of benchmark files; ``broken_rows`` says what becomes of rows that cannot be used.

    Raises :class:`ConfigError` when it is not a folder.
    """

    def __init__(self, path: str, broken_rows: BrokenRows = "refuse") -> None:
        self.broken_rows = broken_rows
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise ConfigError(f"the data folder {path} {what}; give one that holds dataset/<Name>/test.json files")

    def find_task_file(self, task: Task, split: Split) -> Path | None:
        """The task's file of that split, or None."""
        candidates = [self.path / root / task.folder / f"{split}.json" for root in _ROOTS]
        if task.key == "gsm8k":
            candidates += [self.path / root / f"{split}.jsonl" for root in _GSM8K_ROOTS]
        return next((path for path in candidates if path.is_file()), None)

    def find_mixture(self, suite: Suite) -> tuple[str, Path] | None:
        """(name, file) of the suite's first training mixture that is there, or None."""
        for name in suite.mixtures:
            for root in _MIXTURE_ROOTS:
                if (path := self.path / root / f"{name}.json").is_file():
                    return name, path
        return None

    def read(self, path: Path, task: Task | None) -> tuple[tuple[Row, ...], dict[str, Any]]:
        """A file's rows, and its entry in a provenance: name, sha256, numbers of rows."""
        reading = read_file(path, task, gsm8k if path.suffix == ".jsonl" else None, self.broken_rows)
        name = Path(os.path.relpath(path, self.path)).as_posix()
        return reading.rows, {"name": name, "sha256": hash_file(path), **reading.provenance}

    def describe(self) -> str:
        """What the folder holds, in one line."""
        parts = [
            f"{split} sets of {', '.join(keys)}"
            for split in ("test", "train")
            if (keys := [key for key, task in TASKS.items() if self.find_task_file(task, split)])
        ]
        parts += [f"the mixture {found[0]}" for suite in SUITES.values() if (found := self.find_mixture(suite))]
        return "; ".join(parts) or "no benchmark files"
