"""Recorded results: folders of run records, with the tables and pictures that were made from them.

::

    for result in find_results(Path("benchmarks/results")):
        tables = build_leaderboard(result.load())

A result is a folder with ``records/*.json``, or a folder whose runs have folders of their own, such as a sweep's, or
one run's folder. Records may be compressed (``*.json.gz``).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from grass_ray.results.record import RunRecord

RECORDS = "records"  # the folder beside a recorded result's tables
_RUN = ("record.json", "record.json.gz")  # in a run's own folder


@dataclass(frozen=True, kw_only=True)
class RecordedResult:
    """A folder and the files of its records, sorted."""

    folder: Path
    files: tuple[Path, ...]

    def load(self) -> list[RunRecord]:
        """Read all records. Raises :class:`grass_ray.config.ConfigError` if one cannot be read."""
        return [RunRecord.load(path) for path in self.files]

    def name(self, path: Path) -> str:
        """A file's path inside the folder."""
        return path.relative_to(self.folder).as_posix()


def find_results(folder: Path) -> list[RecordedResult]:
    """The results in a folder and below it, sorted by path."""
    found: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith((".json", ".json.gz")):
            continue
        if path.parent.name == RECORDS and path.parent != folder:
            found[path.parent.parent].append(path)
        elif path.name in _RUN:
            found[folder if path.parent == folder else path.parent.parent].append(path)
    return [RecordedResult(folder=place, files=tuple(files)) for place, files in sorted(found.items())]


def read_records(folder: Path) -> list[RunRecord]:
    """Read the records of a result's folder, sorted by file. Raises :class:`grass_ray.config.ConfigError`."""
    return [record for result in find_results(folder) if result.folder == folder for record in result.load()]
