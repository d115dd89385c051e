"""Search algorithms: what they answer depends on what is known and nothing else, never repeats, and goes where losses
are low."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import ClassVar

import pytest

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.experiment.algorithms import ALGORITHMS, SearchAlgorithm, known_points
from grass_ray.experiment.observation import Observation
from grass_ray.experiment.optuna_search import OptunaSearch
from grass_ray.experiment.plan import SweepOptions, plan_trials
from grass_ray.experiment.search import SearchPlan
from grass_ray.experiment.space import LogUniform, OneOf, Params, Space, at_random, distributions, sample
from grass_ray.experiment.sweep import Sweep
from grass_ray.methods import METHODS

SPACE: Space = {
    "lr": LogUniform(low=1e-5, high=1e-3),
    "kind": OneOf(
        options={"flat": LogUniform(low=1, high=9, whole=True), "falling": {"end": LogUniform(low=1, high=2)}}
    ),
}
GRID: Space = {"a": (1, 2, None), "b": ("x", "y")}
CONFIG = RunConfig(method=METHODS["grass"].config, model=ModelConfig(name="tiny"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_gives_different_points_of_its_space_until_it_is_exhausted(name: str) -> None:
    algorithm: SearchAlgorithm = ALGORITHMS[name](GRID, method="grass", seed=0, num_samples=9)  # type: ignore[index]
    history: list[Observation] = []
    while (params := algorithm.ask(history)) is not None:
        assert all(params[key] in labels for key, labels in distributions(GRID, params).items())  # type: ignore[operator]
        assert params not in [trial.params for trial in history]
        history.append(Observation(params=params, loss=1.0))
    assert len(history) == 6
    assert algorithm.help


def test_points_that_are_known_beforehand_are_the_same_for_every_seed() -> None:
    first, second = (known_points("random", SPACE, CONFIG.override({"seed": seed}), 5) for seed in (0, 1))
    assert first == second
    assert len(first) == 5
    assert known_points("optuna", SPACE, CONFIG, 5) == ()


class HalvedSearch:
    """An algorithm of a user's own: the better half of what was tried, with smaller learning rates."""

    help: ClassVar[str] = "halves the learning rate of what was best"
    adaptive: ClassVar[bool] = True

    def __init__(self, space: Space, *, method: str, seed: int, num_samples: int | None) -> None:
        self._first = sample(space, at_random(random.Random(seed)))

    def ask(self, history: Sequence[Observation]) -> Params | None:
        if not history:
            return self._first
        best = min(history, key=lambda trial: trial.loss or math.inf)
        return {**best.params, "method.optimizer.lr": float(best.params["method.optimizer.lr"]) / 2}


def test_an_algorithm_of_ones_own_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "optuna", HalvedSearch)  # type: ignore[arg-type]
    sweep = Sweep(name="s", question="?", models=("tiny",), methods=("full",), tasks=("generated",), seeds=(0,))
    options = SweepOptions(search="optuna", num_samples=3, set=("data.validation_rows=8",))
    plan = plan_trials(sweep, options)[1]
    assert isinstance(plan, SearchPlan)
    assert plan.adaptive
    assert plan.trials == []


# ------------------------------------------------------------------------------------------------------------- optuna


def loss_of(params: Params) -> float:
    return abs(math.log(float(params["lr"]) / 1e-4)) + (params["kind"] == "flat")


def ask(space: Space, tried: Sequence[Observation], *, seed: int = 0, num_samples: int = 24) -> Params | None:
    return OptunaSearch(space, method="grass", seed=seed, num_samples=num_samples).ask(tried)


def search(number: int, tried: list[Observation] | None = None, seed: int = 0) -> list[Observation]:
    tried = list(tried or [])
    while len(tried) < number:
        params = ask(SPACE, tried, seed=seed)
        assert params is not None
        tried.append(Observation(params=params, loss=loss_of(params)))
    return tried


def test_a_search_comes_out_the_same_again_also_when_it_was_interrupted() -> None:
    whole = search(12)
    assert search(12, search(5)) == whole
    assert search(12, seed=1) != whole


def test_later_trials_go_where_losses_are_low() -> None:
    losses = [trial.loss or 0.0 for trial in search(24)]
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])


def test_no_point_is_tried_twice_and_an_exhausted_space_says_so() -> None:
    space: Space = {"a": (1, 2), "b": (1, None)}
    tried: list[Observation] = []
    while (params := ask(space, tried, num_samples=9)) is not None:
        assert params not in [trial.params for trial in tried]
        tried.append(Observation(params=params, loss=1.0))
    assert len(tried) == 4


def test_failed_stopped_and_running_trials_are_part_of_what_is_known() -> None:
    tried = search(4)
    for other in (
        Observation(params=tried[3].params, loss=math.nan),
        Observation(params=tried[3].params, loss=math.nan, stopped=True, rungs={4: 2.0}),
        Observation(params=tried[3].params, loss=math.nan, stopped=True),
        Observation(params=tried[3].params, loss=None),
    ):
        params = ask(SPACE, [*tried[:3], other])
        assert params is not None
        assert params != tried[3].params
