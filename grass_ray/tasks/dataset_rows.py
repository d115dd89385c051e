"""Rows of a data set of the user's own: which ones are trained on, and which are held out.

::

    source = find_dataset("chats.jsonl")        # DatasetSource with a name of its own
    DatasetRows(source, data).train_rows()      # LoadedRows with shape, duplicates and skipped rows in its provenance
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from grass_ray.config import ConfigError, DatasetSource, Shape, slug
from grass_ray.tasks.dataset_files import is_data_file, is_local, read_dataset, splits_of
from grass_ray.tasks.dataset_shapes import NEEDED, Shaper, detect_shape
from grass_ray.tasks.row_files import MAX_SHOWN, BrokenRows, refuse_broken
from grass_ray.tasks.row_source import SUBSET_SEED, LoadedRows, RowSource
from grass_ray.tasks.rows import ChatRow, RowError, TextRow, hash_rows
from grass_ray.tasks.suites import SUITES, TASKS
from grass_ray.tasks.templates import TemplateName

DETECTED = 100  # rows whose columns say the shape
TEST_SPLITS = ("test", "validation")
PLAIN_NAMES = ("train", "test", "validation", "data", "rows")  # a file of such a name is named after its folder


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The rows of one split, and what the record says of them."""

    rows: tuple[ChatRow | TextRow, ...]
    entry: dict[str, Any]


def find_dataset(given: str) -> DatasetSource:
    """Return the source that a command line means by a file, a folder or a hub id.

    Raises:
        ConfigError: there is no such file or folder, and it can be no hub id.
    """
    if is_local(given) and not os.path.exists(os.path.expanduser(given)):
        raise ConfigError(f"there is no data set {given}{'' if os.path.isabs(given) else f' in {os.getcwd()}'}")
    return DatasetSource(name=_name(given), path=given)


def _name(given: str) -> str:
    """Name a task after a file, or after its folder if the name of the file says nothing."""
    path = Path(given.rstrip("/"))
    stem = re.sub(r"(\.(json|jsonl|ndjson|csv|tsv|parquet))?(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    if stem.lower() in PLAIN_NAMES:
        stem = path.absolute().parent.name or stem
    name = re.sub(r"[^A-Za-z0-9]+", "_", slug(stem)).strip("_") or "data"
    return f"{name}_rows" if name in TASKS or name in SUITES else name


class DatasetRows(RowSource[DatasetSource]):
    """Rows of ``source: {kind: dataset, path: ...}``."""

    def check_names(self) -> None:
        """Check that suite and task are the data set, and that its name is free."""
        data, name = self.data, self.source.name
        if name in TASKS or name in SUITES:
            raise ConfigError(f"the name {name!r} is taken by a built-in task or suite; set data.source.name")
        if (data.suite, data.tasks) != (name, (name,)):
            raise ConfigError(
                f"a data set is its own suite: data.suite and data.tasks must be {name}, got "
                f"{data.suite} and {', '.join(data.tasks)}"
            )

    def train_rows(self) -> LoadedRows:
        """The rows of the split to train on without those that are held out."""
        whole, (test, held_out) = self._whole(), self._test()
        chosen = set(test.rows)
        rows = tuple(row for row in whole.rows if row not in chosen)
        if not rows:
            raise ConfigError(
                f"{whole.entry['name']} has no row that is not held out, too; there is nothing to train on"
            )
        entry = whole.entry | {"rows": len(rows), "rows_held_out": len(whole.rows) - len(rows)}
        description = f"{len(rows)} rows of shape {entry['shape']} of {entry['name']}; {held_out}"
        return LoadedRows(rows=rows, files=[entry], description=description)

    def test_rows(self, task: str) -> LoadedRows:
        """The rows that are held out."""
        test, held_out = self._test()
        return LoadedRows(rows=test.rows, files=[test.entry], description=held_out)

    def _whole(self) -> _Part:
        source = self.source
        splits = splits_of(source.path, source.subset, source.revision)
        if splits and source.split not in splits:
            raise ConfigError(
                f"{source.path} has no split {source.split!r} (data.source.split); it has {', '.join(splits)}"
            )
        local = is_local(source.path)
        given = {"split": not splits and source.split != "train", "subset": source.subset, "revision": source.revision}
        for key in (key for key, value in given.items() if local and value):
            raise ConfigError(f"data.source.{key}={getattr(source, key)} has no effect on {source.path}; leave it out")
        return self._read(source.path, source.split if splits else None)

    def _test(self) -> tuple[_Part, str]:
        """The held-out rows, and where they are from, in words."""
        source = self.source
        splits = splits_of(source.path, source.subset, source.revision)
        named = source.test
        if named is not None and named not in splits:
            if not (is_data_file(named) or os.path.isdir(os.path.expanduser(named))):
                has = f"it has {', '.join(splits)}" if splits else f"{source.path} has no splits"
                raise ConfigError(f"data.source.test={named} is no data file or folder, and no split: {has}")
            return self._read(named, "test" if "test" in splits_of(named, None, None) else None), f"held out: {named}"
        split = named or next((name for name in TEST_SPLITS if name in splits and name != source.split), None)
        if split is not None:
            return self._read(source.path, split), f"held out: the split {split}"
        return self._share(self._whole())

    def _share(self, whole: _Part) -> tuple[_Part, str]:
        """A share of the different rows; the same rows whatever the seed of the run."""
        distinct = list(dict.fromkeys(whole.rows))
        if len(distinct) < 2:
            raise ConfigError(
                f"{whole.entry['name']} has {len(distinct)} different row(s), of which none can be held out; give "
                "other rows to test on (data.source.test)"
            )
        count = min(max(1, round(self.source.test_share * len(distinct))), len(distinct) - 1)
        places = sorted(Random(SUBSET_SEED).sample(range(len(distinct)), count))
        rows = tuple(distinct[place] for place in places)
        entry = {
            "name": f"{whole.entry['name']}, {count} held out",
            "sha256": hash_rows(rows),
            "shape": whole.entry["shape"],
            "rows": count,
        }
        return _Part(rows=rows, entry=entry), f"held out: {count} of {len(distinct)} different rows, by a fixed seed"

    def _read(self, path: str, split: str | None) -> _Part:
        return _read(self.source, path, split, self.data.broken_rows, self.data.template, _stamp(path))


def _stamp(path: str) -> tuple[int, int] | None:
    """When a file was last written and how large it is, so that it is read again after a change."""
    try:
        found = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4)  # checks, the memory plan and the run itself ask for the same rows
def _read(
    source: DatasetSource,
    path: str,
    split: str | None,
    broken_rows: BrokenRows,
    template: TemplateName,
    stamp: tuple[int, int] | None,
) -> _Part:
    """Read one split. ``stamp`` tells versions of a file apart."""
    own = path == source.path
    found = read_dataset(
        path, split=split, subset=source.subset if own else None, revision=source.revision if own else None
    )
    shape = source.shape or _detect(found.records, source, found.name)
    shaper = Shaper(shape, source.columns, template)
    rows: list[ChatRow | TextRow] = []
    mistakes: list[str] = []
    for number, record in found.records:
        try:
            rows.append(shaper.shape(record, f"row {number} of {found.name}"))
        except RowError as mistake:
            mistakes.append(f"row {number}: {mistake}")
    refuse_broken(mistakes, len(rows), found.name, broken_rows)
    if not rows:
        raise ConfigError(f"{found.name} holds no rows; it needs at least one")
    entry: dict[str, Any] = {
        "name": found.name,
        "sha256": found.sha256 or hash_rows(rows),
        "rows": len(rows),
        "shape": shape,
        "duplicates": len(rows) - len(set(rows)),
    }
    if shaper.numbers:
        entry["numbers_as_text"] = shaper.numbers
    if mistakes:
        entry |= {"rows_skipped": len(mistakes), "mistakes": mistakes[:MAX_SHOWN]}
    return _Part(rows=tuple(rows), entry=entry)


def _detect(records: list[tuple[int, Any]], source: DatasetSource, where: str) -> Shape:
    first = [record for _, record in records[:DETECTED] if isinstance(record, Mapping)]
    if not first:
        raise ConfigError(
            f"{where} holds no rows that are objects; a row is an object with the columns of one shape: "
            + "; ".join(f"{shape}: {' and '.join(roles)}" for shape, roles in NEEDED.items())
        )
    return detect_shape(first, source.columns, where)
