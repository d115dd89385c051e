"""A method's search while it runs: its trials, those that are left, the next point, and the winner.

A new process can read all of it again: known points are in the plan, points that Optuna chose are files in the sweep's
folder, and trials that ended have records::

    search = MethodSearch(tuning, group, trial_store, storage)
    if search.is_left():
        run_trials(search.tune_run(context, memories), context, ...)
    finals = search.finals()
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ray.tune.schedulers import TrialScheduler

from grass_ray.cluster.job import Job, SweepContext
from grass_ray.cluster.pbt import STATE_FILE, MemberState, drive_member
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.resources import driver_memory
from grass_ray.cluster.schedulers import Asha, OneByOne, Population
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.tuner import TuneRun
from grass_ray.config import RunConfig
from grass_ray.experiment.space import Picks, to_plain
from grass_ray.experiment.suggest import Observation, suggest
from grass_ray.experiment.trial_spec import TrialSpec
from grass_ray.experiment.tuning import Group, Tuning
from grass_ray.results.record import RunRecord, SearchPart
from grass_ray.results.searches import rung_losses, trial_loss, winner

SEARCH_FOLDER = "search"


@dataclass(frozen=True, kw_only=True)
class Final:
    """A trial that meets the test: one of the plan, or a search's winner with one of the seeds.

    Attributes:
        spec: the trial.
        search: the search that it won.
        start_from: URI of the checkpoint that is tested, if nothing is trained.
    """

    spec: TrialSpec
    search: SearchPart | None = None
    start_from: str | None = None


class MethodSearch:
    """One method's search.

    Args:
        tuning: how the sweep searches.
        group: the method.
        trial_store: where the trials' records are.
        storage: the sweep's folder.
    """

    def __init__(self, tuning: Tuning, group: Group, trial_store: TrialStore, storage: Storage) -> None:
        self.tuning = tuning
        self.group = group
        self._trial_store = trial_store
        self._storage = storage
        self._context: SweepContext | None = None  # known once the machines are
        self.points: list[Picks] = []
        self.specs: list[TrialSpec] = []
        self._waiting: list[int] = []
        self.exhausted = storage.exists(*self._exhausted_file)
        for picks in [*group.points, *self._saved()]:
            self._add(picks)

    # -- what there is, and what is left

    def ended(self) -> list[TrialSpec]:
        """Trials that need not run again; of a population all or none, since they depend on each other."""
        ended = [spec for spec in self.specs if self._trial_store.has_ended(spec)]
        return ended if self.tuning.scheduler != "pbt" or len(ended) == len(self.specs) else []

    def is_left(self) -> bool:
        """Whether there are trials to run."""
        more = self.tuning.search == "optuna" and len(self.specs) < (self.tuning.num_samples or 0)
        return len(self.ended()) < len(self.specs) or (more and not self.exhausted)

    def records(self) -> list[RunRecord]:
        """The trials' records, in the order of the trials."""
        records = self._trial_store.records
        return [records[spec.key] for spec in self.specs if spec.key in records]

    def tune_run(self, context: SweepContext, memories: Sequence[int]) -> TuneRun:
        """What is left, as one Tuner runs it.

        Args:
            context: what the sweep's trials share.
            memories: bytes that each machine offers.
        """
        self._context = context
        ended = {spec.key for spec in self.ended()}
        self._waiting = [place for place, spec in enumerate(self.specs) if spec.key not in ended]
        name, scheduler = f"tune-{self.group.method}", self._scheduler()
        if self.tuning.search == "optuna":
            left = (self.tuning.num_samples or 0) - len(self.specs) + len(self._waiting)
            return TuneRun(name=name, searcher=OneByOne(self._next_job), num_samples=left, scheduler=scheduler)
        jobs = [self._job(place) for place in self._waiting]
        if self.tuning.scheduler != "pbt":
            return TuneRun(name=name, jobs=jobs, scheduler=scheduler)
        memory = driver_memory(memories, context.resources.slots)
        return TuneRun(name=name, jobs=jobs, scheduler=scheduler, trainable=drive_member, driver_memory=memory)

    def _scheduler(self) -> TrialScheduler | None:
        steps = self.group.steps
        if self.tuning.scheduler == "pbt":
            return Population(steps, self.group.config.seed)
        if self.tuning.scheduler == "none":
            return None
        asha = Asha(steps)
        for record in self.records():
            asha.remember(record.run_id, rung_losses(record))
        return asha

    # -- a trial

    def _add(self, picks: Picks) -> TrialSpec:
        spec = self.group.trial(picks)
        if spec not in self.specs:  # a grid may say the same in two ways
            self.points.append(picks)
            self.specs.append(spec)
            self._trial_store.add(spec, self._search_part(len(self.specs) - 1, "search"))
        return spec

    def _search_part(self, number: int, stage: Literal["search", "winner"]) -> SearchPart:
        return SearchPart(search=self.tuning.search, scheduler=self.tuning.scheduler, stage=stage, number=number)

    def _job(self, place: int) -> Job:
        assert self._context is not None
        spec, search = self.specs[place], self._search_part(place, "search")
        if self.tuning.scheduler != "pbt":
            return Job.of(spec, self._context, search=search)
        space, picks = to_plain(self.group.space), dict(self.points[place])
        return Job.of(spec, self._context, search=search, space=space, picks=picks)

    # -- Optuna

    def _next_job(self) -> Job | None:
        """The next trial's job: one that was chosen before and did not end, else a new one. None if all are made."""
        if self._waiting:
            return self._job(self._waiting.pop(0))
        number, wanted = len(self.specs), self.tuning.num_samples or 0
        if number >= wanted:
            return None
        tried = [self._observation(picks, spec) for picks, spec in zip(self.points, self.specs, strict=True)]
        picks = suggest(self.group.space, tried, number=number, seed=self.group.config.seed, num_samples=wanted)
        if picks is None:
            self.exhausted = True
            self._storage.write_text("", *self._exhausted_file)
            return None
        self._storage.write_text(json.dumps(picks), *self._file(number))
        self._add(picks)
        return self._job(number)

    def _observation(self, picks: Picks, spec: TrialSpec) -> Observation:
        record = self._trial_store.records.get(spec.key)
        if record is None:
            return Observation(picks=picks, loss=None)
        stopped = record.status == "stopped"
        return Observation(
            picks=picks,
            loss=math.nan if stopped else trial_loss(record),
            rungs=rung_losses(record),
            stopped=stopped,
        )

    def _saved(self) -> list[Picks]:
        """Read the points that Optuna chose in an earlier process."""
        found: list[Picks] = []
        while self.tuning.search == "optuna" and self._storage.exists(*self._file(len(found))):
            found.append(json.loads(self._storage.read_text(*self._file(len(found)))))
        return found

    @property
    def _exhausted_file(self) -> tuple[str, str, str]:
        return SEARCH_FOLDER, self.group.method, "exhausted"

    def _file(self, number: int) -> tuple[str, str, str]:
        return SEARCH_FOLDER, self.group.method, f"{number:04d}.json"

    # -- the winner

    def finals(self) -> list[Final]:
        """The winner's trials with the test; none if no trial came to its end.

        A population's winner is not trained again: its last checkpoint is tested, since no configuration could say
        what it went through.
        """
        best = winner(self.records())
        if best is None or best.search is None:
            return []
        number = best.search.number
        search = self._search_part(number, "winner")
        if self.tuning.scheduler != "pbt":
            specs = self.group.finals(self.points[number], self.tuning.seeds)
            return [Final(spec=spec, search=search) for spec in specs]
        state = MemberState.model_validate_json(self._storage.read_text(self.specs[number].folder, STATE_FILE))
        config = RunConfig.parse(best.config).override({"evaluation.test": True})
        search = search.model_copy(update={"lineage": best.search.lineage})
        return [Final(spec=TrialSpec(config=config), search=search, start_from=state.checkpoint)]
