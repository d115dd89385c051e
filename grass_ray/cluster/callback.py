"""What Ray Tune sees of a sweep's trials, passed on to their store.

::

    Tuner(..., run_config=tune.RunConfig(callbacks=[SweepCallback(trial_store)]))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler

from grass_ray.cluster.job import HELD, TIME, describe_death
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.schedulers import Asha


class SweepCallback(tune.Callback):  # type: ignore[misc]
    """Passes what Tune sees to the trial store. Tune pickles its callbacks; the store stays in the driver."""

    def __init__(self, trial_store: TrialStore, scheduler: TrialScheduler | None = None) -> None:
        self._trial_store: TrialStore | None = trial_store
        self._stopped = scheduler.stopped if isinstance(scheduler, Asha) else {}
        self._crashes: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_trial_store": None, "_stopped": {}, "_crashes": {}}

    @property
    def trial_store(self) -> TrialStore:
        """The driver's trial store."""
        assert self._trial_store is not None, "a callback that was pickled is used outside the driver"
        return self._trial_store

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Let plain lines come while nothing is reported."""
        self.trial_store.progress.tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's actor starts."""
        self.trial_store.start(_key(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A report arrived from the worker."""
        if result.get("phase") == "crashed":
            self._crashes[_key(trial)] = result["failure"]
        self.trial_store.result(_key(trial), result)
        # the scheduler has decided before this is called
        if result.get(HELD) and _key(trial) not in self._stopped:
            self.trial_store.let_pass(_key(trial), result[TIME])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function returned, or the scheduler stopped it."""
        key = _key(trial)
        if (stop := self._stopped.get(key)) is not None:
            reason = stop.describe(trial.config["job"]["config"]["training"]["steps"])
            self.trial_store.stop_early(key, stop.train_step, reason)
        else:
            self.trial_store.end(key, self._crashes.get(key))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's own actor died, and Tune is about to start it again."""
        self.trial_store.progress.note(_key(trial), describe_death(_last_error(trial), trial.num_failures))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's own actor died too often; or once, after it was given the trial and before that began.

        Tune does not try the latter again; it happens when a process dies that takes over from one trial to the next.
        """
        key, error = _key(trial), _last_error(trial)
        failure = describe_death(error, trial.num_failures)
        if trial.should_recover():
            self.trial_store.lost[key] = failure, error
        else:
            self.trial_store.end(key, failure, error)


def _last_error(trial: Any) -> str:
    """Why a trial's process died the last time, in Ray's words, which Tune writes into one file after another."""
    path = trial.error_file
    text = "" if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
    return text.rpartition("Failure # ")[2].partition("\n")[2]


def _key(trial: Any) -> str:
    return str(trial.config["job"]["key"])
