"""Search algorithms: which point of a space is tried next.

::

    algorithm = make_algorithm("optuna", space, config, num_samples=20)
    params = algorithm.ask(history)                   # None: there is no further point

An algorithm of your own is a class like those below in a file of its own, its name in ``Search`` and a line in
``ALGORITHMS``. Imports neither ray nor torch nor optuna.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from grass_ray.config import RunConfig
from grass_ray.experiment.observation import Observation
from grass_ray.experiment.optuna_search import OptunaSearch
from grass_ray.experiment.space import Params, Space, at_random, labels, sample

Search = Literal["grid", "random", "optuna"]


class SearchAlgorithm(Protocol):
    """Chooses the trials of one method's search, one after another.

    ``adaptive`` algorithms look at the losses of earlier trials. They are asked again by every process that continues a
    sweep, so that an answer must follow from the constructor's arguments and the history alone. The points of the
    others are drawn when the sweep is planned.

    Args:
        space: where to search.
        method: the method's name.
        seed: of the search.
        num_samples: trials of the method, None where the flag ``--num-samples`` was not given.
    """

    help: ClassVar[str]
    adaptive: ClassVar[bool]

    def __init__(self, space: Space, *, method: str, seed: int, num_samples: int | None) -> None: ...

    def ask(self, history: Sequence[Observation]) -> Params | None:
        """Return a point that the history lacks, or None if there is none; ``history`` is in the order of asking."""


class GridSearch:
    """Every combination of a grid's values."""

    help: ClassVar[str] = "the sweep's own grid"
    adaptive: ClassVar[bool] = False

    def __init__(self, space: Space, *, method: str, seed: int, num_samples: int | None) -> None:
        grid: Mapping[str, Any] = space  # every dimension is a sequence of values
        axes = [list(labels(values)) for values in grid.values()]
        self._points = [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]

    def ask(self, history: Sequence[Observation]) -> Params | None:
        """Return the next combination."""
        return self._points[len(history)] if len(history) < len(self._points) else None


class RandomSearch:
    """Points drawn independently; the same ones for every model and seed, and in any process."""

    help: ClassVar[str] = "--num-samples points a method"
    adaptive: ClassVar[bool] = False

    def __init__(self, space: Space, *, method: str, seed: int, num_samples: int | None) -> None:
        self._space = space
        self._rng = random.Random(f"{method}:{sorted(space)}")
        self._wanted = num_samples or 0
        self._draws_left = 50 * self._wanted  # a small space may have fewer points than are wanted

    def ask(self, history: Sequence[Observation]) -> Params | None:
        """Draw a point."""
        known = [trial.params for trial in history]
        while len(known) < self._wanted and self._draws_left:
            self._draws_left -= 1
            params = sample(self._space, at_random(self._rng))
            if params not in known:
                return params
        return None


ALGORITHMS: Mapping[Search, type[SearchAlgorithm]] = {
    "grid": GridSearch,
    "random": RandomSearch,
    "optuna": OptunaSearch,
}


def make_algorithm(search: Search, space: Space, config: RunConfig, num_samples: int | None) -> SearchAlgorithm:
    """Return the algorithm that searches for settings of a configuration's method."""
    return ALGORITHMS[search](space, method=config.method.name, seed=config.seed, num_samples=num_samples)


def known_points(search: Search, space: Space, config: RunConfig, num_samples: int | None) -> tuple[Params, ...]:
    """Return all points of a search before it runs; none of an adaptive one."""
    algorithm = make_algorithm(search, space, config, num_samples)
    history: list[Observation] = []
    while not algorithm.adaptive and (params := algorithm.ask(history)) is not None:
        history.append(Observation(params=params))
    return tuple(trial.params for trial in history)
