"""Load the rows of a run from any source: a folder, the Hub, a custom task, a data set, or the generator.

::

    train = load_train_rows(config.data)             # RowSet: rows and provenance (files, sha256, counts)
    test = load_test_rows("boolq", config.data)
    check_data(config.data)                          # finds every mistake before a model is loaded
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from grass_ray.config import (
    CustomSource,
    DataConfig,
    DatasetSource,
    FolderSource,
    GeneratedSource,
    HubSource,
    SourceConfig,
)
from grass_ray.tasks.custom import CustomRows
from grass_ray.tasks.dataset_rows import DatasetRows
from grass_ray.tasks.folder import FolderRows
from grass_ray.tasks.generated import GeneratedRows
from grass_ray.tasks.hub import HubRows
from grass_ray.tasks.row_source import SUBSET_SEED, LoadedRows, RowSource
from grass_ray.tasks.rows import RowSet, hash_rows

SOURCES: Mapping[type[SourceConfig], Callable[[Any, DataConfig], RowSource[Any]]] = {
    GeneratedSource: GeneratedRows,
    FolderSource: FolderRows,
    HubSource: HubRows,
    CustomSource: CustomRows,
    DatasetSource: DatasetRows,
}


def open_source(data: DataConfig) -> RowSource[Any]:
    """Return the source of ``data``; reads nothing."""
    return SOURCES[type(data.source)](data.source, data)


def load_train_rows(data: DataConfig) -> RowSet:
    """Load the rows to train on: the published mixture of the suite if the source has it, else its training sets.

    At most ``data.max_train_rows`` rows, a random subset that is the same in every run.

    Raises:
        ConfigError: there is nothing to train on, or a row is broken.
    """
    source = open_source(data)
    source.check_names()
    loaded = source.train_rows()
    rows = loaded.rows
    if data.max_train_rows is not None and data.max_train_rows < len(rows):
        rows = tuple(Random(SUBSET_SEED).sample(rows, data.max_train_rows))
    provenance = {
        "source": data.source.kind,
        "description": loaded.description,
        "files": loaded.files,
        "rows": len(rows),
        "rows_available": len(loaded.rows),
        "rows_sha256": hash_rows(rows),
        **_broken_rows(data, loaded),
    }
    return RowSet(rows=rows, provenance=provenance)


def load_test_rows(task: str, data: DataConfig) -> RowSet:
    """Load the whole test set of one task.

    Raises:
        ConfigError: it is missing, or a row is broken.
    """
    open_source(data.model_copy(update={"tasks": (task,)})).check_names()
    loaded = open_source(data).test_rows(task)
    provenance = {
        "source": data.source.kind,
        "files": loaded.files,
        "rows": len(loaded.rows),
        **_broken_rows(data, loaded),
    }
    return RowSet(rows=loaded.rows, provenance=provenance)


def check_data(data: DataConfig, *, training: bool = True) -> None:
    """Check the data as far as possible without a model or a network.

    Args:
        data: the data.
        training: whether training rows are needed. An evaluation only needs the test sets.

    Raises:
        ConfigError: something is missing or wrong.
    """
    source = open_source(data)
    source.check_names()
    source.check(training=training)


def _broken_rows(data: DataConfig, loaded: LoadedRows) -> dict[str, Any]:
    skipped = sum(entry.get("rows_skipped", 0) for entry in loaded.files)
    return {"broken_rows": data.broken_rows, "rows_skipped": skipped}
