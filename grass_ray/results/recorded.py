"""Recorded results: folders of run records, with the tables and pictures that were made from them.

::

    for result in find_results(Path("benchmarks/results")):
        tables = build_leaderboard(result.load())
    take_records(Path("grass_ray_results/quickstart/SWEEP_ID"), Path("benchmarks/results/mine"))

A result is a folder with ``records/*.json``, or a folder whose runs have folders of their own, such as a sweep's, or
one run's folder. Records may be compressed (``*.json.gz``).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from grass_ray.config import ConfigError, fingerprint_of, write_whole
from grass_ray.results.rate_search import SEARCH, SETTINGS, load_rate_searches, render_settings
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
        if path.parent.name in (RECORDS, SEARCH) and path.parent != folder:
            found[path.parent.parent] += [path] if path.parent.name == RECORDS else []
        elif path.name in _RUN:
            found[folder if path.parent == folder else path.parent.parent].append(path)
    return [RecordedResult(folder=place, files=tuple(files)) for place, files in sorted(found.items())]


def read_records(folder: Path) -> list[RunRecord]:
    """Read the records of a result's folder, sorted by file. Raises :class:`grass_ray.config.ConfigError`."""
    return [record for result in find_results(folder) if result.folder == folder for record in result.load()]


def take_records(source: Path, folder: Path) -> list[Path]:
    """Copy the records of all runs below a folder into a result's folder, compressed.

    Those of a search, whose runs are judged by held-out rows and never tested, are put into ``search``, and the best
    rates into ``settings.yaml``; all others, failed ones too, into ``records``. A file has the run's name and the
    fingerprint of its configuration.

    Returns:
        The files written; those that were there already are left out.

    Raises:
        ConfigError: there are no records, one cannot be read, or another run of the same configuration is there.
    """
    records = [record for result in find_results(source) for record in result.load()]
    if not records:
        raise ConfigError(f"there are no run records in {source} to take")
    written = []
    for record in records:
        place = folder / (RECORDS if record.config["evaluation"].get("test", True) else SEARCH)
        path = place / f"{record.name}-{fingerprint_of(record.config)}.json.gz"
        if path.exists() and RunRecord.load(path).model_dump_json() != record.model_dump_json():
            raise ConfigError(f"{path} holds another run of the same configuration and seed than the one in {source}")
        if not path.exists():
            place.mkdir(parents=True, exist_ok=True)
            record.save(path)
            written.append(path)
    if searches := load_rate_searches(folder):
        write_whole(folder / SETTINGS, render_settings(searches))
    return written
