"""Recompute every number of recorded results from their run records.

::

    for result in verify(Path("benchmarks/results")):
        print(result.folder, result.agrees, result.checks, result.remarks)

Records are checked against themselves; then the leaderboard is built from them anew, and every table that was made of
them is compared with it, cell by cell. What has no records is not passed but named (:func:`without_records`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grass_ray.config import ConfigError, RunConfig
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.rate_search import SETTINGS, RateSearch, is_record, load_rate_searches, search_files
from grass_ray.results.record import RunRecord
from grass_ray.results.recorded import RECORDS, RecordedResult, find_results
from grass_ray.results.verification.check import Check
from grass_ray.results.verification.records import Found, check_records, measured
from grass_ray.results.verification.rules import entry_remarks
from grass_ray.results.verification.tables import Recomputed, check_tables, rewrite_tables


@dataclass(frozen=True, kw_only=True)
class VerifiedResult:
    """One result and what came of it.

    Attributes:
        folder: of the result.
        num_records: how many records it has, those of its search included.
        checks: groups of numbers, with what disagrees.
        remarks: what a reader should know, although no number is wrong.
        measured: metrics that were only measured, so that there is nothing to compute them from.
        beside: files of the folder that are not compared with the records.
        written: the tables were written anew before they were compared.
    """

    folder: Path
    num_records: int
    checks: Sequence[Check]
    remarks: Sequence[str] = ()
    measured: Sequence[str] = ()
    beside: Sequence[str] = ()
    written: bool = False

    @property
    def disagreements(self) -> int:
        """How many numbers differ from what they come to."""
        return sum(len(check.disagreements) for check in self.checks)


@dataclass(kw_only=True)
class _Loaded:
    """A result's records, those of its search, and whether all could be read."""

    result: RecordedResult
    found: list[Found] = field(default_factory=list)
    searched: list[Found] = field(default_factory=list)
    files: Check = field(default_factory=lambda: Check(what="files"))

    def __post_init__(self) -> None:
        for path in self.result.files:
            self._read(path, self.found)
        for path in search_files(self.result.folder):
            self._read(path, self.searched)

    def _read(self, path: Path, into: list[Found]) -> None:
        name = self.result.name(path).removeprefix(f"{RECORDS}/")
        self.files.numbers += 1
        try:
            if into is self.searched and not is_record(path):
                return
            record = RunRecord.load(path)
            RunConfig.parse(record.config)  # one of an earlier version gets the defaults of newer keys
            into.append(Found(name=name, path=path, record=record))
        except ConfigError as error:
            self.files.disagreements.append(f"{name}: {error}")

    @property
    def records(self) -> list[RunRecord]:
        return [one.record for one in self.found]


def verify(folder: Path, *, rewrite: bool = False) -> list[VerifiedResult]:
    """Verify all results in a folder and below it.

    Args:
        folder: a recorded result, a sweep's folder, a run's folder, or a folder of such folders.
        rewrite: write tables and pictures anew before they are compared, where the records agree with themselves.

    Raises:
        ConfigError: there is no such folder, or no record in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give one with run records")
    results = find_results(folder)
    if not results:
        raise ConfigError(f"there are no run records in {folder}: neither {RECORDS}/*.json nor record.json below it")
    return [_verify(_Loaded(result=result), rewrite=rewrite) for result in results]


def _verify(loaded: _Loaded, *, rewrite: bool) -> VerifiedResult:
    folder, records = loaded.result.folder, loaded.records
    checks = [loaded.files, *check_records([*loaded.found, *loaded.searched])]
    number = len(loaded.result.files) + len(loaded.searched)
    try:
        searches = load_rate_searches(folder)
    except ConfigError as error:
        searches = []
        loaded.files.disagreements.append(str(error))
    if not records:
        return VerifiedResult(folder=folder, num_records=number, checks=checks)
    result = Recomputed(folder=folder, records=records, searches=searches, tables=build_leaderboard(records))
    written = rewrite and not any(check.disagreements for check in checks)
    if written:
        rewrite_tables(result)
    checks += check_tables(result)
    return VerifiedResult(
        folder=folder,
        num_records=number,
        checks=checks,
        remarks=[
            *(text for check in checks for text in check.remarks),
            *entry_remarks(result),
        ],
        measured=measured(records),
        beside=_beside(loaded.result, {check.what for check in checks}, searches),
        written=written,
    )


def _beside(result: RecordedResult, compared: set[str], searches: Sequence[RateSearch]) -> list[str]:
    """Files of the folder that nothing was compared with: pictures, numbers behind them, pages of prose."""
    own = compared | ({SETTINGS} if searches else set())
    names = [path.name for path in sorted(result.folder.iterdir()) if path.is_file() and path not in result.files]
    return [name for name in names if name not in own]


def without_records(folder: Path) -> dict[str, list[str]]:
    """Files below a folder that belong to no result, by their own folder: nothing is there to compute them from."""
    places = {result.folder for result in find_results(folder)}
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not places & {path.parent, *path.parents}:
            found.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path.name)
    return found
