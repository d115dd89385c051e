"""Base class of the places that rows come from.

Each kind of source in a configuration has one subclass, which is listed in :mod:`grass_ray.tasks.sources`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

from grass_ray.config import DataConfig, SourceConfig
from grass_ray.tasks.rows import AnyRow, Row
from grass_ray.tasks.suites import check_tasks

# fixed, so that all runs use the same subset and the same order of a built mixture; not the seed of a run
SUBSET_SEED = 20_240_531

Config = TypeVar("Config", bound=SourceConfig)


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """Rows of one source.

    Attributes:
        rows: the rows.
        files: provenance of each file: name, sha256 and number of rows, as plain JSON values.
        description: where training rows come from, in a few words.
    """

    rows: tuple[AnyRow, ...]
    files: list[dict[str, Any]]
    description: str = ""


class RowSource(ABC, Generic[Config]):
    """Loads the rows of a data configuration. Methods raise :class:`ConfigError` if rows are missing or broken.

    Args:
        source: configuration of the source.
        data: configuration of the data.
    """

    def __init__(self, source: Config, data: DataConfig) -> None:
        self.source = source
        self.data = data

    def check_names(self) -> None:
        """Check that the source has the suite and the tasks, as far as their names tell."""
        check_tasks(self.data.suite, self.data.tasks)

    def check(self, *, training: bool) -> None:
        """Check everything that can be checked without a model or a network."""
        for task in self.data.tasks:
            self.test_rows(task)
        if training:
            self.train_rows()

    @abstractmethod
    def train_rows(self) -> LoadedRows:
        """Load the rows to train on."""

    @abstractmethod
    def test_rows(self, task: str) -> LoadedRows:
        """Load the whole test set of a task."""

    def written_rows(self) -> list[Row]:
        """Rows whose responses the user has written; none for built-in tasks, whose responses are made from answers."""
        return []


def build_mixture(parts: Mapping[str, LoadedRows], mixtures: Sequence[str], absent: Sequence[str]) -> LoadedRows:
    """Shuffle the training sets of several tasks into one, in the same order in every run.

    Args:
        parts: training sets by task.
        mixtures: names of the published mixtures that this one replaces.
        absent: tasks without a training set.
    """
    rows = [row for part in parts.values() for row in part.rows]
    Random(SUBSET_SEED).shuffle(rows)
    counts = ", ".join(f"{key} ({len(part.rows)})" for key, part in parts.items())
    description = f"built from the train sets of {counts}"
    if mixtures:
        description += f", in place of {' or '.join(mixtures)}"
    if absent:
        description += f"; no train set of {', '.join(absent)}"
    files = [file for part in parts.values() for file in part.files]
    return LoadedRows(rows=tuple(rows), files=files, description=description)
