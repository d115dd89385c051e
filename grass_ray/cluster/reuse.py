"""Take over trials that an earlier run of the same store finished, in place of running them again.

::

    reuse = Reuse(plan, storage, context, machine_of_trials(cluster, context), progress.note)
    taken = reuse.take_over([(config, None) for config in plan.trials])

A trial is taken over if it would give the same numbers: an earlier run with the same configuration finished, and
neither data, model, code, versions nor machine have changed since (:mod:`grass_ray.results.environment`). The run's
files are copied into the trial's folder as if it had ended there, so that all that comes after, ``--resume`` too,
finds it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from grass_ray.cluster.job import RECORD_FILE, SweepContext
from grass_ray.cluster.resources import ClusterInfo
from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, RunConfig, fingerprint_of
from grass_ray.experiment.plan import SweepPlan
from grass_ray.results.environment import Environment, compare_environments, environment_of
from grass_ray.results.provenance import hardware, versions
from grass_ray.results.record import CHECKPOINT_FOLDER, RunRecord, SearchPart
from grass_ray.results.store import EarlierRun, download_files, earlier_runs


@dataclass(frozen=True, kw_only=True)
class TrialMachine:
    """What trials run on: the machine in words, and its packages."""

    hardware: str
    versions: Mapping[str, str]


def _this_machine() -> TrialMachine:
    return TrialMachine(hardware=hardware(), versions=versions())


def machine_of_trials(cluster: ClusterInfo, context: SweepContext) -> TrialMachine:
    """Ask where trials run, which on a cluster may be another machine than this one."""
    found = _this_machine()
    if cluster.joined:
        each = context.resources
        ask = ray.remote(num_cpus=each.cpus, num_gpus=each.gpus)(_this_machine)
        found = ray.get(ask.remote())
    return replace(found, hardware=context.describe(found.hardware))


class Reuse:
    """Finds and takes over what earlier runs finished.

    Args:
        plan: the sweep, whose store is searched.
        storage: the sweep's folder.
        context: what its trials share.
        machine: what they run on.
        say: told of every trial that has run before, with its key.
    """

    def __init__(
        self,
        plan: SweepPlan,
        storage: Storage,
        context: SweepContext,
        machine: TrialMachine,
        say: Callable[[str, str], None],
    ) -> None:
        self._plan = plan
        self._storage = storage
        self._context = context
        self._machine = machine
        self._say = say
        self._environments: dict[Hashable, Environment] = {}

    def take_over(self, trials: Iterable[tuple[RunConfig, SearchPart | None]]) -> list[RunConfig]:
        """Take over the trials that can be, and return them."""
        wanted = {config.fingerprint: (config, search) for config, search in trials}
        found: dict[str, list[EarlierRun]] = {}
        for run in earlier_runs(self._plan.tracking_uri, wanted):
            if run.sweep_id != self._plan.sweep_id:
                found.setdefault(run.trial_key, []).insert(0, run)  # the latest first
        return [config for key, (config, search) in wanted.items() if self._take(config, search, found.get(key, []))]

    def _take(self, config: RunConfig, search: SearchPart | None, runs: Iterable[EarlierRun]) -> bool:
        said: list[str] = []
        for run in runs:
            with tempfile.TemporaryDirectory(prefix="grass_ray-reuse-") as name:
                folder = Path(name)
                try:
                    record = self._fetch(run, folder)
                    differences = self._differences(config, record)
                except ConfigError as error:
                    differences = [str(error)]
                kept = Storage(run.folder, patience_s=0).join(CHECKPOINT_FOLDER) if run.folder else None
                if not differences and self._context.keep_checkpoints and config.training.steps:
                    if kept is None or not kept.exists():
                        differences = ["what it trained was not kept (--keep-checkpoints)"]
                    else:
                        (folder / CHECKPOINT_FOLDER).mkdir()
                        kept.download(folder / CHECKPOINT_FOLDER)
                if not differences:
                    self._write(config, search, record, folder)
                    return True
                said = said or differences
        if said:
            more = "" if len(said) < 3 else f", and {len(said) - 2} more"
            self._say(config.fingerprint, f"has run before, and runs again: {'; '.join(said[:2])}{more}")
        return False

    def _fetch(self, run: EarlierRun, folder: Path) -> RunRecord:
        download_files(self._plan.tracking_uri, run.run_id, folder)
        return RunRecord.load(folder / RECORD_FILE)

    def _differences(self, config: RunConfig, record: RunRecord) -> list[str]:
        """Why the record is not what the trial would give, one sentence each."""
        if record.status != "finished" or fingerprint_of(record.config) != config.fingerprint:
            return [f"it is {record.status}, of another configuration"]
        if record.search is not None and (record.search.lineage or record.search.stopped_after is not None):
            return ["it was a member of a population, or stopped early"]
        if not record.data.get("inputs"):
            return ["its record does not say what code it ran; an earlier version wrote it"]
        resources = self._context.resources
        found = compare_environments(record, self._environment(config))
        if record.world_size != resources.workers:
            found.append(f"workers were {record.world_size}, are {resources.workers}")
        if record.threads != resources.cpus:
            found.append(f"CPU threads were {record.threads}, are {resources.cpus}")
        return found

    def _environment(self, config: RunConfig) -> Environment:
        key = (config.model, config.data, config.evaluation)
        if key not in self._environments:
            found, machine = environment_of(config), self._machine
            self._environments[key] = replace(found, hardware=machine.hardware, versions=machine.versions)
        return self._environments[key]

    def _write(self, config: RunConfig, search: SearchPart | None, record: RunRecord, folder: Path) -> None:
        """Write the trial's folder, the record last: a folder with a record is complete."""
        (folder / RECORD_FILE).unlink()
        own = record.model_copy(
            update={
                "run_id": f"{self._plan.sweep_id}-{config.fingerprint}",
                "sweep": self._plan.name,
                "sweep_id": self._plan.sweep_id,
                "search": search,
                "reused_from": record.reused_from or record.run_id,
            }
        )
        self._storage.upload(folder, config.folder)
        self._storage.write_text(own.model_dump_json(indent=1), config.folder, RECORD_FILE)
