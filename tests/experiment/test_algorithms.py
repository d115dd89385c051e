"""Optuna's suggestions: they depend on what is known and nothing else, never repeat, and go where losses are low."""

import math

from grass_ray.experiment.suggest import Observation, suggest

from grass_ray.experiment.space import LogUniform, OneOf, Picks, Space

SPACE: Space = {
    "lr": LogUniform(low=1e-5, high=1e-3),
    "kind": OneOf(
        options={"flat": LogUniform(low=1, high=9, whole=True), "falling": {"end": LogUniform(low=1, high=2)}}
    ),
}


def loss_of(picks: Picks) -> float:
    return abs(math.log(float(picks["lr"]) / 1e-4)) + (picks["kind"] == "flat")


def search(number: int, tried: list[Observation] | None = None, seed: int = 0) -> list[Observation]:
    tried = list(tried or [])
    while len(tried) < number:
        picks = suggest(SPACE, tried, number=len(tried), seed=seed, num_samples=24)
        assert picks is not None
        tried.append(Observation(picks=picks, loss=loss_of(picks)))
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
    while (picks := suggest(space, tried, number=len(tried), seed=0, num_samples=9)) is not None:
        assert picks not in [trial.picks for trial in tried]
        tried.append(Observation(picks=picks, loss=1.0))
    assert len(tried) == 4


def test_failed_stopped_and_running_trials_are_part_of_what_is_known() -> None:
    tried = search(4)
    for other in (
        Observation(picks=tried[3].picks, loss=math.nan),
        Observation(picks=tried[3].picks, loss=math.nan, stopped=True, rungs={4: 2.0}),
        Observation(picks=tried[3].picks, loss=math.nan, stopped=True),
        Observation(picks=tried[3].picks, loss=None),
    ):
        picks = suggest(SPACE, [*tried[:3], other], number=4, seed=0, num_samples=24)
        assert picks is not None
        assert picks != tried[3].picks
