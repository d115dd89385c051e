"""``grass-ray verify``: recompute every number of recorded results from their run records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from grass_ray.config import ConfigError

if TYPE_CHECKING:
    from grass_ray.results.verification.verify import VerifiedResult

_MOST = 20  # disagreements of a check that are printed


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Recompute every number of recorded results from their run records. Exits with 0 if all agree, else with 1.

    For example:
      grass-ray verify benchmarks/results
      grass-ray verify benchmarks/results/comparison --rewrite
      grass-ray verify benchmarks/results/mine --take grass_ray_results/quickstart/SWEEP_ID --rewrite
    """

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER ...")]
    """Folders with run records: records/*.json, or a record.json in each run's folder."""
    take: Annotated[tuple[Path, ...], arg(metavar="RUNS ...")] = ()
    """First copy the records of these folders' runs into FOLDER/records, those of a search into FOLDER/search."""
    rewrite: bool = False
    """First write tables and pictures anew from the records, unless those disagree with themselves."""
    all: bool = False
    """Print every disagreement, not only the first 20 of a check."""
    quiet: bool = False
    """Only print what disagrees, and the verdict."""

    def run(self) -> int:
        """Verify the folders and return the exit code."""
        from grass_ray.results.recorded import take_records
        from grass_ray.results.verification.verify import verify, without_records

        if not self.folders:
            raise ConfigError("verify needs a folder with run records, such as benchmarks/results")
        if self.take and len(self.folders) > 1:
            raise ConfigError(f"--take copies records into one folder; given: {', '.join(map(str, self.folders))}")
        for source in self.take:
            taken = take_records(source, self.folders[0])
            print(f"took {len(taken)} records of {source} into {self.folders[0]}")
        results = [result for folder in self.folders for result in verify(folder, rewrite=self.rewrite)]
        for result in results:
            for line in self._describe(result):
                print(line)
        for folder in () if self.quiet else self.folders:
            if alone := without_records(folder):
                print(f"no records, so nothing to recompute in {folder}:")
                print("\n".join(f"  {place}: {', '.join(names)}" for place, names in alone.items()))
        numbers = sum(check.numbers for result in results for check in result.checks)
        records = sum(result.num_records for result in results)
        if differing := sum(result.disagreements for result in results):
            print(f"not verified: {differing} disagreements in {numbers} numbers of {records} records")
            return 1
        print(f"verified: all {numbers} numbers of {records} records agree")
        return 0

    def _describe(self, result: VerifiedResult) -> Iterator[str]:
        if self.quiet and not result.disagreements:
            return
        written = "tables written anew" if result.written else "nothing written, since records disagree with themselves"
        end = f"; {written}" if self.rewrite else ""
        yield f"{result.folder}: {result.num_records} records{end}"
        width = max(len(check.what) for check in result.checks)
        for check in result.checks:
            wrong = check.disagreements
            if wrong or not self.quiet:
                yield f"  {'DIFFERS' if wrong else 'agrees':8} {check.what:{width}}  {check.numbers} compared"
            shown = wrong if self.all else wrong[:_MOST]
            yield from (f"             {text}" for text in shown)
            if len(shown) < len(wrong):
                yield f"             and {len(wrong) - len(shown)} more: --all prints them"
        if not self.quiet:
            yield from (f"  remark   {text}" for text in result.remarks)
            if result.measured:
                yield f"  measured, nothing to recompute: {', '.join(result.measured)}"
            if result.beside:
                yield f"  not compared: {', '.join(result.beside)}"
        yield ""
