"""Read the records of a data set: a file, a folder written by ``save_to_disk``, or the Hugging Face Hub.

::

    records = read_dataset("chats.jsonl.gz")                   # numbered records as they stand in the file
    records = read_dataset("owner/name", split="train")

JSON is read as it stands and not through Arrow, which would give every object of a column the same keys: tools and
messages of different kinds would get keys with nulls.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from grass_ray.config import ConfigError
from grass_ray.tasks.row_files import data_suffix, read_records, read_text
from grass_ray.tasks.rows import MAX_ROW_CHARACTERS, RowError, hash_file

JSON = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".parquet")
KNOWN = f"{', '.join((*JSON[:2], *TABLES))} (all but .parquet also .gz), a folder written by save_to_disk, or a hub id"

Numbered = tuple[int, Any]  # number of a row from 1, and what it holds; a RowError if it cannot be read


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records of one split.

    Attributes:
        name: file, folder or hub id, with the split.
        sha256: of the file; None for folders and the Hub, whose rows are hashed instead.
        records: numbered records.
    """

    name: str
    sha256: str | None
    records: list[Numbered]


def is_data_file(name: str) -> bool:
    """Whether a name has the suffix of a data file."""
    return data_suffix(Path(name)) in (*JSON, *TABLES)


def is_local(path: str) -> bool:
    """Whether a path is a file or a folder of this machine, there or not; otherwise it is an id on the Hub."""
    name = os.path.expanduser(path)
    looks = os.path.isabs(name) or is_data_file(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    return looks or name.startswith(".") or os.path.exists(name)


def splits_of(path: str, subset: str | None, revision: str | None) -> tuple[str, ...]:
    """Return the names of the splits of a data set; empty if it has only one, without a name.

    Raises:
        ConfigError: there is no such data set.
    """
    if not is_local(path):
        return _hub_splits(path, subset, revision)
    place = _existing(path)
    if place.is_file():
        return ()
    return tuple(_load_folder(place)) if (place / "dataset_dict.json").is_file() else ()


def read_dataset(
    path: str, *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> Records:
    """Read one split.

    Args:
        path: a file, a folder, or an id on the Hub.
        split: which one, if there are several.
        subset: configuration of a data set on the Hub.
        revision: of a data set on the Hub.

    Raises:
        ConfigError: it cannot be read, or has no such split.
    """
    if not is_local(path):
        name = "/".join(part for part in (path, subset, split) if part)
        return Records(name=name, sha256=None, records=_numbered(_load_hub(path, subset, revision, split)))
    place = _existing(path)
    if place.is_dir():
        found = _load_folder(place)
        if (place / "dataset_dict.json").is_file():
            if split not in found:
                raise ConfigError(f"{place} has no split {split!r}; it has {', '.join(found)}")
            return Records(name=f"{place} ({split})", sha256=None, records=_numbered(found[split]))
        return Records(name=str(place), sha256=None, records=_numbered(found))
    return Records(name=str(place), sha256=hash_file(place), records=_read_file(place))


def _existing(path: str) -> Path:
    place = Path(os.path.expanduser(path))
    if not place.exists():
        raise ConfigError(f"there is no data set {path}; give a file ({KNOWN}")
    if place.is_dir() and not any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(child.name for child in place.iterdir() if is_data_file(child.name))
        there = f"; it has {', '.join(files[:5])}: name one of them" if files else ""
        raise ConfigError(f"the folder {path} was not written by save_to_disk of datasets{there}")
    if not place.is_dir() and not (place.is_file() and is_data_file(place.name)):  # a device or a pipe never ends
        raise ConfigError(f"{path} is no data file that is known; give {KNOWN}")
    if place.suffix == ".gz" and data_suffix(place) == ".parquet":
        raise ConfigError(f"{path} is compressed twice: Parquet is compressed in itself; unpack it with gunzip")
    return place


def _read_file(path: Path) -> list[Numbered]:
    suffix = data_suffix(path)
    if suffix in JSON:
        return list(read_records(path))
    return _read_parquet(path) if suffix == ".parquet" else list(_read_csv(path, "\t" if suffix == ".tsv" else ","))


def _read_csv(path: Path, separator: str) -> Iterator[Numbered]:
    """Yield the rows of a table with a header. Every value is text: 007 stays 007."""
    text = read_text(path)
    if "\x00" in text:
        raise ConfigError(f"{path} is no text in UTF-8: it holds zero bytes; save it as UTF-8 (not UTF-16)")
    csv.field_size_limit(MAX_ROW_CHARACTERS + 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    number = 0
    header: list[str] | None = None
    try:
        for cells in rows:
            if header is None:
                header = _header(cells, path)
                continue
            number += 1
            if not cells:
                continue
            if len(cells) != len(header):
                yield number, RowError(f"it has {len(cells)} values, and the header {len(header)}")
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path} is broken CSV in line {rows.line_num}, row {number + 1}: {error}") from None
    if header is None:
        raise ConfigError(f"{path} is empty; it must begin with a line that names the columns")


def _header(cells: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in cells]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path} names a column twice: {', '.join(doubled)}")
    return names


def _read_parquet(path: Path) -> list[Numbered]:
    import datasets

    with tempfile.TemporaryDirectory(prefix="grass-ray-data-") as cache, _quiet(datasets):
        try:
            return _numbered(datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"cannot read {path} as Parquet: {_first_line(error)}") from None


def _load_folder(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {path} as a folder of save_to_disk: {_first_line(error)}") from None


@lru_cache(maxsize=8)
def _hub_splits(path: str, subset: str | None, revision: str | None) -> tuple[str, ...]:
    import datasets

    return tuple(_ask_hub(path, lambda: datasets.get_dataset_split_names(path, subset, revision=revision)))


def _load_hub(path: str, subset: str | None, revision: str | None, split: str | None) -> Any:
    import datasets

    return _ask_hub(path, lambda: datasets.load_dataset(path, subset, split=split, revision=revision))


def _ask_hub(path: str, ask: Any) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        with _quiet(datasets):
            return ask()
    except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"cannot load the data set {path} from the Hugging Face Hub ({type(error).__name__}: "
            f"{_first_line(error)}); there is no file or folder of this name here either. A data set is {KNOWN}"
        ) from None


class _quiet:  # noqa: N801
    """No progress bars of datasets in the block, and no lines of its log: what is wrong is raised, too."""

    def __init__(self, datasets: Any) -> None:
        self._datasets = datasets
        self._were_off = datasets.are_progress_bars_disabled()
        self._level = datasets.logging.get_verbosity()

    def __enter__(self) -> None:
        self._datasets.disable_progress_bars()
        self._datasets.logging.set_verbosity(self._datasets.logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self._datasets.logging.set_verbosity(self._level)
        if not self._were_off:
            self._datasets.enable_progress_bars()


def _numbered(rows: Iterable[Any]) -> list[Numbered]:
    return list(enumerate(rows, start=1))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
