"""The next point of a search by Optuna: TPE (arXiv 1105.5986, 2304.11127) over a space with alternatives.

A suggestion depends on nothing but what is known - the space, the trials so far and their losses, the seed. So a search
that was interrupted goes on as if it had not been, and one that runs a trial at a time comes out the same again::

    picks = suggest(space, [Observation(picks=..., loss=0.61)], number=1, seed=0, num_samples=20)
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grass_ray.experiment.space import LogUniform, Pick, Picks, RandomPicker, Space, choose, ranges

if TYPE_CHECKING:
    import optuna

MOST_ATTEMPTS = 60
_ATTEMPTS_OF_TPE = 10


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A trial of the search: what was picked and what came of it.

    ``loss`` is the loss on held-out rows; None while the trial runs, NaN where it failed. ``rungs`` are the losses on
    the way, by step; a trial that was ``stopped`` early is judged by them.
    """

    picks: Picks
    loss: float | None
    rungs: Mapping[int, float] = field(default_factory=dict)
    stopped: bool = False


def suggest(
    space: Space, tried: Sequence[Observation], *, number: int, seed: int, num_samples: int
) -> dict[str, Pick] | None:
    """The picks of trial ``number`` (from 0), none of which were tried; None where the space seems exhausted.

    Args:
        space: where to search.
        tried: the trials before, by number.
        number: of this trial.
        seed: of the search.
        num_samples: trials of the search in all; the first quarter (3 to 10) is drawn at random.
    """
    known = [dict(trial.picks) for trial in tried]
    for attempt in range(MOST_ATTEMPTS):
        chance = random.Random(f"{seed}:{number}:{attempt}")
        if attempt < _ATTEMPTS_OF_TPE:
            picks = choose(space, _ask(space, tried, chance.randrange(2**32), num_samples))
        else:  # in a small space TPE may insist on what was tried
            picks = choose(space, RandomPicker(chance))
        if picks not in known:
            return picks
    return None


def _ask(space: Space, tried: Sequence[Observation], seed: int, num_samples: int) -> _Asking:
    """A new trial of a study that holds what is known."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=min(10, max(3, num_samples // 4)),
        )
    study = optuna.create_study(direction="minimize", sampler=sampler)
    study.add_trials([_frozen(space, trial) for trial in tried])
    return _Asking(study.ask())


class _Asking:
    """Lets an Optuna trial pick."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def number(self, name: str, among: LogUniform) -> float:
        if among.whole:
            return self._trial.suggest_int(name, math.ceil(among.low), math.floor(among.high), log=True)
        return self._trial.suggest_float(name, among.low, among.high, log=True)

    def option(self, name: str, labels: Sequence[str]) -> str:
        return str(self._trial.suggest_categorical(name, list(labels)))


def _frozen(space: Space, tried: Observation) -> optuna.trial.FrozenTrial:
    """A trial as Optuna keeps it."""
    import optuna
    from optuna.trial import TrialState

    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, among in ranges(space, tried.picks).items():
        if not isinstance(among, LogUniform):
            distributions[name] = optuna.distributions.CategoricalDistribution(list(among))
        elif among.whole:
            distributions[name] = optuna.distributions.IntDistribution(
                math.ceil(among.low), math.floor(among.high), log=True
            )
        else:
            distributions[name] = optuna.distributions.FloatDistribution(among.low, among.high, log=True)
    loss, state = tried.loss, TrialState.COMPLETE
    if tried.stopped:
        loss, state = None, TrialState.PRUNED if tried.rungs else TrialState.FAIL
    elif loss is None:
        state = TrialState.RUNNING
    elif not math.isfinite(loss):
        loss, state = None, TrialState.FAIL
    return optuna.trial.create_trial(
        state=state,
        value=loss,
        params=dict(tried.picks),
        distributions=distributions,
        intermediate_values=dict(tried.rungs),
    )
