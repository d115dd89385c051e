"""Flags and defaults that several verbs share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import arg

from grass_ray.config import ConfigError

if TYPE_CHECKING:
    from grass_ray.results.record import RunRecord
    from grass_ray.results.selection import Selection

RESULTS = Path("grass_ray_results")
Names = Annotated[tuple[str, ...], arg(metavar="NAME ...")]
Settings = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")]


def tracking_store(given: str | None) -> str:
    """Return the URI of the MLflow store: that of the flag or the environment, else ``grass_ray_results/mlflow.db``."""
    from grass_ray.results.connection import default_tracking_uri

    return given or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(RESULTS)


@dataclass(frozen=True, kw_only=True)
class RunFilters:
    """Which runs of which tracking stores."""

    experiment: str | None = None
    """Name of a sweep. Defaults to all experiments."""
    tracking_uri: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, arg(metavar="URI")] = ()
    """MLflow store; repeat the flag for several. Defaults to MLFLOW_TRACKING_URI, else mlflow.db."""
    records: Path | None = None
    """Folder with run records, such as benchmarks/results/comparison, in place of a tracking store."""
    method: Names = ()
    """Only show the rows of these methods. Statistics still take all methods into account."""
    model: Names = ()
    """Only use runs of these models."""
    suite: Names = ()
    """Only use runs on these suites."""
    task: Names = ()
    """Only average over these tasks."""
    seed: Annotated[tuple[int, ...], arg(metavar="N ...")] = ()
    """Only use runs with these seeds."""
    status: Names = ()
    """Only show rows with these statuses: finished, partial, failed, out_of_memory, stopped."""

    def selection(self, sort: str | None = None, reverse: bool = False) -> Selection:
        """Return the filters as they apply to records. Raises :class:`ConfigError` on names that do not exist."""
        from grass_ray.results.selection import Selection

        return Selection(
            methods=self.method,
            models=self.model,
            suites=self.suite,
            tasks=self.task,
            seeds=self.seed,
            statuses=self.status,
            sort=sort,
            reverse=reverse,
        )

    def load(self, *, series: bool = True) -> list[RunRecord]:
        """Load the records of all stores, each run once. ``series=False`` takes a tenth of the memory."""
        from grass_ray.results.selection import merge_records
        from grass_ray.results.store import load_records

        if self.records is not None:
            return self._of_experiment(self._in_folder(self.records), "this folder")
        if len(self.tracking_uri) < 2:
            return load_records(tracking_store("".join(self.tracking_uri)), self.experiment, series=series)
        records = merge_records(load_records(uri, series=series) for uri in self.tracking_uri)
        return self._of_experiment(records, "these stores")

    def _in_folder(self, folder: Path) -> list[RunRecord]:
        from grass_ray.results.recorded import RECORDS, find_results

        if self.tracking_uri:
            raise ConfigError("--records and --tracking-uri both say where runs are; give one of them")
        whole = folder.resolve()
        if not (results := find_results(whole.parent if whole.name == RECORDS else folder)):
            raise ConfigError(f"there are no run records in {folder}; give a folder with records/*.json or run folders")
        return [record for result in results for record in result.load()]

    def _of_experiment(self, records: list[RunRecord], where: str) -> list[RunRecord]:
        chosen = [record for record in records if self.experiment in (None, record.sweep)]
        if records and not chosen:
            known = ", ".join(sorted({record.sweep for record in records}))
            raise ConfigError(f"unknown experiment {self.experiment!r} in {where}; available: {known}")
        return chosen
