"""A method's search while it runs: its trials, those that are left, the next point, and the winner.

A new process can read all of it again: known points are in the plan, points that an adaptive algorithm chose are
files in the sweep's folder, and trials that ended have records::

    search = MethodSearch(plan, spec, trial_store, storage)
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

from grass_ray.cluster.job import Job, SweepContext, has_ended
from grass_ray.cluster.pbt import STATE_FILE, MemberState
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.resources import driver_memory
from grass_ray.cluster.schedulers import Asha, OneByOne, Population
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.tuner import TuneRun
from grass_ray.config import RunConfig
from grass_ray.experiment.algorithms import make_algorithm
from grass_ray.experiment.observation import Observation
from grass_ray.experiment.search import SearchPlan, SearchSpec
from grass_ray.experiment.space import Params
from grass_ray.results.record import RunRecord, SearchPart
from grass_ray.results.searches import rung_losses, trial_loss, winner

SEARCH_FOLDER = "search"


@dataclass(frozen=True, kw_only=True)
class Final:
    """A trial that meets the test: one of the plan, or a search's winner with one of the seeds.

    Attributes:
        config: the trial.
        search: the search that it won.
        start_from: URI of the checkpoint that is tested, if nothing is trained.
    """

    config: RunConfig
    search: SearchPart | None = None
    start_from: str | None = None


class MethodSearch:
    """One method's search.

    Args:
        plan: how the sweep searches.
        spec: the method, and where it is searched.
        trial_store: where the trials' records are.
        storage: the sweep's folder.
    """

    def __init__(self, plan: SearchPlan, spec: SearchSpec, trial_store: TrialStore, storage: Storage) -> None:
        self.plan = plan
        self.spec = spec
        self._trial_store = trial_store
        self._storage = storage
        self._context: SweepContext | None = None  # known once the machines are
        self.points: list[Params] = []
        self.trials: list[RunConfig] = []
        self._waiting: list[int] = []
        self.exhausted = storage.exists(*self._exhausted_file)
        for params in [*spec.points, *self._saved()]:
            self._add(params)

    # -- what there is, and what is left

    def ended(self) -> list[RunConfig]:
        """Trials that need not run again; of a population all or none, since they depend on each other."""
        ended = [config for config in self.trials if has_ended(self._storage, config)]
        return ended if self.plan.scheduler != "pbt" or len(ended) == len(self.trials) else []

    def is_left(self) -> bool:
        """Whether there are trials to run."""
        more = self.plan.adaptive and len(self.trials) < (self.plan.num_samples or 0)
        return len(self.ended()) < len(self.trials) or (more and not self.exhausted)

    def known(self) -> list[tuple[RunConfig, SearchPart]]:
        """The trials that are known, with what their records say of the search."""
        return [(config, self._search_part(number, "search")) for number, config in enumerate(self.trials)]

    def records(self) -> list[RunRecord]:
        """The trials' records, in the order of the trials."""
        records = self._trial_store.records
        return [records[key] for key in (config.fingerprint for config in self.trials) if key in records]

    def tune_run(self, context: SweepContext, memories: Sequence[int]) -> TuneRun:
        """What is left, as one Tuner runs it.

        Args:
            context: what the sweep's trials share.
            memories: bytes that each machine offers.
        """
        self._context = context
        ended = self.ended()
        self._waiting = [place for place, config in enumerate(self.trials) if config not in ended]
        name, scheduler = f"tune-{self.spec.method}", self._scheduler()
        if self.plan.adaptive:
            left = (self.plan.num_samples or 0) - len(self.trials) + len(self._waiting)
            return TuneRun(name=name, searcher=OneByOne(self._next_job), num_samples=left, scheduler=scheduler)
        jobs = [self._job(place) for place in self._waiting]
        if self.plan.scheduler != "pbt":
            return TuneRun(name=name, jobs=jobs, scheduler=scheduler)
        memory = driver_memory(memories, context.resources.slots)
        return TuneRun(name=name, jobs=jobs, scheduler=scheduler, population=True, driver_memory=memory)

    def _scheduler(self) -> TrialScheduler | None:
        steps = self.spec.steps
        if self.plan.scheduler == "pbt":
            return Population(steps, self.spec.config.seed)
        if self.plan.scheduler == "none":
            return None
        asha = Asha(steps)
        for record in self.records():
            asha.remember(record.run_id, rung_losses(record))
        return asha

    # -- a trial

    def _add(self, params: Params) -> None:
        config = self.spec.trial(params)
        if config not in self.trials:  # a grid may say the same in two ways
            self.points.append(params)
            self.trials.append(config)
            self._trial_store.add(config, self._search_part(len(self.trials) - 1, "search"))

    def _search_part(self, number: int, stage: Literal["search", "winner"]) -> SearchPart:
        return SearchPart(search=self.plan.search, scheduler=self.plan.scheduler, stage=stage, number=number)

    def _job(self, place: int) -> Job:
        assert self._context is not None
        config, search = self.trials[place], self._search_part(place, "search")
        if self.plan.scheduler != "pbt":
            return Job.of(config, self._context, search=search)
        return Job.of(config, self._context, search=search, space=self.spec.space, params=self.points[place])

    # -- points of an adaptive algorithm

    def _next_job(self) -> Job | None:
        """The next trial's job: one that was chosen before and did not end, else a new one. None if all are made."""
        if self._waiting:
            return self._job(self._waiting.pop(0))
        number = len(self.trials)
        if number >= (self.plan.num_samples or 0):
            return None
        # made anew for each point, as by a process that continues the sweep
        algorithm = make_algorithm(self.plan.search, self.spec.space, self.spec.config, self.plan.num_samples)
        params = algorithm.ask([self._observation(*trial) for trial in zip(self.points, self.trials, strict=True)])
        if params is None:
            self.exhausted = True
            self._storage.write_text("", *self._exhausted_file)
            return None
        self._storage.write_text(json.dumps(params), *self._file(number))
        self._add(params)
        return self._job(number)

    def _observation(self, params: Params, config: RunConfig) -> Observation:
        record = self._trial_store.records.get(config.fingerprint)
        if record is None:
            return Observation(params=params)
        stopped = record.status == "stopped"
        return Observation(
            params=params,
            loss=math.nan if stopped else trial_loss(record),
            rungs=rung_losses(record),
            stopped=stopped,
        )

    def _saved(self) -> list[Params]:
        """Read the points that were chosen in an earlier process."""
        found: list[Params] = []
        while self.plan.adaptive and self._storage.exists(*self._file(len(found))):
            found.append(json.loads(self._storage.read_text(*self._file(len(found)))))
        return found

    @property
    def _exhausted_file(self) -> tuple[str, str, str]:
        return SEARCH_FOLDER, self.spec.method, "exhausted"

    def _file(self, number: int) -> tuple[str, str, str]:
        return SEARCH_FOLDER, self.spec.method, f"{number:04d}.json"

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
        if self.plan.scheduler != "pbt":
            configs = self.spec.finals(self.points[number], self.plan.seeds)
            return [Final(config=config, search=search) for config in configs]
        state = MemberState.model_validate_json(self._storage.read_text(self.trials[number].folder, STATE_FILE))
        config = RunConfig.parse(best.config).override({"evaluation.test": True})
        search = search.model_copy(update={"lineage": best.search.lineage})
        return [Final(config=config, search=search, start_from=state.checkpoint)]
