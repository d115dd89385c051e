"""Tune's schedulers and searcher as a sweep uses them: ASHA, synchronous PBT, and jobs that are chosen one by one.

All look at the loss on held-out rows by training step, never at Tune's own counters, which begin anew with every
restored process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from grass_ray.cluster.job import TIME, Job
from grass_ray.experiment.search import REDUCTION, generation_ends, rungs
from grass_ray.experiment.space import mutation, read_space, sample
from grass_ray.training.report import VALIDATION


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Why ASHA stopped a trial."""

    train_step: int
    loss: float

    def describe(self, steps: int) -> str:
        """The reason, for the record."""
        return (
            f"stopped early at step {self.train_step} of {steps} by ASHA: its validation loss {self.loss:.4f} was not "
            f"among the best 1/{REDUCTION} there"
        )


class Asha(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA (arXiv 1810.05934) that never stops a trial at its end.

    Args:
        steps: training steps of a trial.

    Attributes:
        stopped: the trials that it stopped, by key.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(
            time_attr=TIME,
            metric=VALIDATION,
            mode="min",
            grace_period=rungs(steps)[0],
            max_t=steps + 1,
            reduction_factor=REDUCTION,
        )
        self.stopped: dict[str, EarlyStop] = {}

    def remember(self, name: str, losses: Mapping[int, float]) -> None:
        """Count a trial of an earlier process.

        Args:
            name: anything unique.
            losses: on held-out rows, by training step.
        """
        for rung, recorded in self._brackets[0]._rungs:
            if rung in losses:
                recorded[name] = -losses[rung]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether the trial goes on."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            stop = EarlyStop(train_step=result[TIME], loss=result[VALIDATION])
            self.stopped[trial.config["job"]["key"]] = stop
        return decision


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Synchronous PBT: all members end a generation before any begins the next, so that it comes out the same again.

    The worst quarter goes on from the checkpoints of the best quarter, with changed settings
    (:func:`grass_ray.experiment.space.mutation`).

    Args:
        steps: training steps of a member.
        seed: of the search.
    """

    def __init__(self, steps: int, seed: int) -> None:
        super().__init__(
            time_attr=TIME,
            metric=VALIDATION,
            mode="min",
            perturbation_interval=generation_ends(steps)[0],
            quantile_fraction=0.25,
            custom_explore_fn=_unchanged,  # Tune wants one of its own ways; _get_new_config below is what explores
            log_config=False,
            require_attrs=False,  # most reports are of steps
            synch=True,
        )
        self._seed = seed

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pause the member until all have ended the generation; it goes on from its own or a better checkpoint."""
        before = random.getstate()
        random.seed(f"{self._seed}:{result.get(TIME)}")  # Tune draws the donor from the global generator
        try:
            return str(super().on_trial_result(tune_controller, trial, result))
        finally:
            random.setstate(before)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do not wait for a member that ends early."""
        self._go_on_without(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Do not wait for it, either."""
        self._go_on_without(tune_controller, trial)

    def _go_on_without(self, tune_controller: Any, gone: Any) -> None:
        due = self._next_perturbation_sync
        state = self._trial_state[gone]
        state.last_score, state.last_train_time = None, max(state.last_train_time, due)
        waiting = [trial for trial in tune_controller.get_live_trials() if trial is not gone]
        if waiting and all(self._trial_state[trial].last_train_time >= due for trial in waiting):
            last = waiting[-1]
            self._trial_state[last].last_perturbation_time = -float("inf")
            self.on_trial_result(tune_controller, last, self._trial_state[last].last_result)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        own, donor = trial.config["job"], trial_to_clone.config["job"]
        train_step = self._trial_state[trial_to_clone].last_train_time
        rng = random.Random(f"{self._seed}:{own['key']}:{train_step}")
        params = sample(read_space(own["space"]), mutation(donor["params"], rng))
        return {**trial.config, "job": {**own, "params": params}}, {}


def _unchanged(config: dict[str, Any]) -> dict[str, Any]:
    return config


class OneByOne(Searcher):  # type: ignore[misc]
    """Hands Tune the next job when it has room for one. Tune pickles its searcher; what chooses stays in the driver."""

    def __init__(self, next_job: Callable[[], Job | None]) -> None:
        super().__init__(metric=VALIDATION, mode="min")
        self._next_job: Callable[[], Job | None] | None = next_job

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next_job": None}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's parameters."""
        assert self._next_job is not None, "a searcher that was pickled is used outside the driver"
        job = self._next_job()
        return str(Searcher.FINISHED) if job is None else {"job": job.to_dict()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: what chooses reads the records."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep reads the records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""
