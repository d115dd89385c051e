"""Search by Optuna: TPE (arXiv 1105.5986, 2304.11127) over a space with alternatives.

Optuna is imported when a point is asked for, which keeps command lines instant.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from grass_ray.experiment.observation import Observation
from grass_ray.experiment.space import Distribution, LogUniform, Param, Params, Space, at_random, distributions, sample

if TYPE_CHECKING:
    import optuna

ATTEMPTS = 60
_ATTEMPTS_OF_TPE = 10


class OptunaSearch:
    """TPE. The first quarter of the trials (3 to 10) is drawn at random."""

    help: ClassVar[str] = "--num-samples trials a method, each chosen by the losses before it"
    adaptive: ClassVar[bool] = True

    def __init__(self, space: Space, *, method: str, seed: int, num_samples: int | None) -> None:
        self._space = space
        self._seed = seed
        self._num_samples = num_samples or 0

    def ask(self, history: Sequence[Observation]) -> Params | None:
        """Ask TPE for a point, or draw one where TPE insists on what was tried."""
        known = [trial.params for trial in history]
        for attempt in range(ATTEMPTS):
            # a generator per question: a search that was interrupted goes on as if it had not been
            rng = random.Random(f"{self._seed}:{len(history)}:{attempt}")
            if attempt < _ATTEMPTS_OF_TPE:
                params = self._ask_tpe(history, rng.randrange(2**32))
            else:  # the space is small
                params = sample(self._space, at_random(rng))
            if params not in known:
                return params
        return None

    def _ask_tpe(self, history: Sequence[Observation], seed: int) -> dict[str, Param]:
        """Ask a new study that is told the history."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        startup = min(10, max(3, self._num_samples // 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup
            )
        study = optuna.create_study(direction="minimize", sampler=sampler)
        study.add_trials([self._frozen(trial) for trial in history])
        trial = study.ask()

        def choose(name: str, among: Distribution) -> Param:
            if not isinstance(among, LogUniform):
                return str(trial.suggest_categorical(name, list(among)))
            if among.whole:
                return trial.suggest_int(name, math.ceil(among.low), math.floor(among.high), log=True)
            return trial.suggest_float(name, among.low, among.high, log=True)

        return sample(self._space, choose)

    def _frozen(self, trial: Observation) -> optuna.trial.FrozenTrial:
        """Return a trial as Optuna keeps it."""
        import optuna
        from optuna.trial import TrialState

        loss, state = trial.loss, TrialState.COMPLETE
        if trial.stopped:
            loss, state = None, TrialState.PRUNED if trial.rungs else TrialState.FAIL
        elif loss is None:
            state = TrialState.RUNNING
        elif not math.isfinite(loss):
            loss, state = None, TrialState.FAIL
        among = distributions(self._space, trial.params)
        return optuna.trial.create_trial(
            state=state,
            value=loss,
            params=dict(trial.params),
            distributions={name: _distribution(own) for name, own in among.items()},
            intermediate_values=dict(trial.rungs),
        )


def _distribution(among: Distribution) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(among, LogUniform):
        return CategoricalDistribution(list(among))
    if among.whole:
        return IntDistribution(math.ceil(among.low), math.floor(among.high), log=True)
    return FloatDistribution(among.low, among.high, log=True)
