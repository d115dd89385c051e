"""``grass-ray sync``: upload to MLflow what it lacks of runs on disk."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from grass_ray.commands.flags import RESULTS
from grass_ray.config import ConfigError
from grass_ray.errors import MASK

if TYPE_CHECKING:
    from grass_ray.experiment.plan import SweepPlan
    from grass_ray.results.record import RunRecord
    from grass_ray.results.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Upload to MLflow what it lacks of runs on disk. What is there already is not sent again.

    For example:
      grass-ray sync
      grass-ray sync grass_ray_results/quickstart/SWEEP_ID
      grass-ray sync grass_ray_results --tracking-uri http://127.0.0.1:5000
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUNS ...")] = ()
    """Folders of runs, of sweeps, or above them. Defaults to grass_ray_results."""
    tracking_uri: str | None = None
    """MLflow store. Defaults to the sweep's own, then MLFLOW_TRACKING_URI, else mlflow.db in the results folder."""
    quiet: bool = False
    """Only print what could not be uploaded, and the sum."""

    def run(self) -> int:
        """Upload and return the exit code: 1 if something stayed behind."""
        from grass_ray.results.sync import run_folders

        places = self.runs or (RESULTS,)
        for place in places:
            if not place.is_dir():
                raise ConfigError(f"{place} is no folder; give folders of runs or of sweeps")
        folders = sorted({folder.resolve() for place in places for folder in run_folders(place)})
        if not folders:
            raise ConfigError(
                f"no run below {', '.join(map(str, places))} has a record yet; --resume goes on with what ended early"
            )
        return _Upload(self).carry_out(folders)


class _Upload:
    """Uploads run by run, and says what it did."""

    def __init__(self, command: Sync) -> None:
        self._command = command
        self._trackers: dict[tuple[str, str], Tracker] = {}
        self._uploaded = self._complete = self._behind = 0

    def carry_out(self, folders: list[Path]) -> int:
        from grass_ray.results.record import RunRecord
        from grass_ray.results.store import RECORD_FILE
        from grass_ray.results.sync import is_tracked, sync_run

        sweeps: defaultdict[Path, list[RunRecord]] = defaultdict(list)
        try:
            for folder in folders:
                try:
                    record = RunRecord.load(folder / RECORD_FILE)
                except ConfigError as error:
                    self._behind += 1
                    print(f"left out: {error}", file=sys.stderr)
                    continue
                if is_tracked(record):
                    numbers = sync_run(self._tracker(folder, record), record, folder)
                    self._tell(f"{record.name} of {record.sweep_id}", numbers)
                    sweeps[folder.parent].append(record)
            for folder, records in sweeps.items():
                self._sync_sweep(folder, records)
        except OSError as error:
            print(f"error: {error}; what was uploaded stays, and the same command goes on", file=sys.stderr)
            self._behind += 1
        print(f"{self._uploaded} uploaded, {self._complete} complete already, {self._behind} left behind")
        return 1 if self._behind else 0

    def _sync_sweep(self, folder: Path, records: list[RunRecord]) -> None:
        from grass_ray.results.sync import sync_sweep

        plan = _plan_in(folder)
        if plan is None:
            return
        if len(records) < plan.num_trials:
            self._say(f"{plan.sweep_id}: {len(records)} of {plan.num_trials} trials have ended; --resume goes on")
        elif sync_sweep(self._tracker(folder / "trial", records[0]), records, question=plan.question, folder=folder):
            self._say(f"uploaded  ranking of {plan.sweep_id}")

    def _tracker(self, folder: Path, record: RunRecord) -> Tracker:
        """An open tracker of a run's experiment."""
        from grass_ray.results.tracker import Tracker

        uri = self._command.tracking_uri or _store_of(folder)
        if (uri, record.sweep) not in self._trackers:
            tracker = self._trackers[uri, record.sweep] = Tracker(uri, record.sweep)
            tracker.open()
        return self._trackers[uri, record.sweep]

    def _tell(self, name: str, numbers: int | None) -> None:
        if numbers is None:
            self._complete += 1
        else:
            self._uploaded += 1
            self._say(f"uploaded  {name}: {numbers} numbers, and the files")

    def _say(self, line: str) -> None:
        if not self._command.quiet:
            print(line, flush=True)


def _plan_in(folder: Path) -> SweepPlan | None:
    """The plan of the sweep that a folder is of, if it is of one."""
    from grass_ray.experiment.plan import PLAN_FILE, SweepPlan

    path = folder / PLAN_FILE
    return SweepPlan.from_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def _store_of(folder: Path) -> str:
    """The store that a run's folder belongs to: its sweep's, else that of the environment, else the one above it."""
    from grass_ray.results.connection import default_tracking_uri

    plan = _plan_in(folder.parent)
    if plan is not None and MASK not in plan.tracking_uri:
        return plan.tracking_uri
    if plan is not None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            f"the sweep's store is {plan.tracking_uri}, and its password was not written down; give the whole address "
            "with --tracking-uri or MLFLOW_TRACKING_URI"
        )
    above = folder.parent
    return os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(
        above.parent if above.name == "train" else above
    )
