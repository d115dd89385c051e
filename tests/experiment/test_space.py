"""Search spaces: params lie inside them, alternatives are only asked for what they hold, mutation stays inside."""

import json
import random
from typing import Any

import pytest
from pydantic import TypeAdapter

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.experiment.space import (
    LogUniform,
    OneOf,
    Space,
    at_random,
    distributions,
    mutation,
    read_space,
    sample,
    values,
)
from grass_ray.methods import METHODS

SPACE: Space = {
    "method.optimizer.lr": LogUniform(low=1e-5, high=1e-3),
    "method.sampler.num_active_layers": (1, 2, 4),
    "method.sampler.refresh_period": (10, None),
    "method.sampler.period": LogUniform(low=2, high=9, whole=True),
    "method.sampler.temperature": OneOf(
        options={
            "constant": LogUniform(low=0.1, high=2.0),
            "falling": {"kind": "linear", "start": LogUniform(low=1, high=4), "end": LogUniform(low=0.1, high=1)},
            "steps": {"kind": "step", "values": [2.0, 0.5], "at_progress": [0.5]},
        }
    ),
}


def written(space: Space) -> Any:
    return json.loads(TypeAdapter(Space).dump_json(space))


def drawn(number: int) -> list[dict[str, float | int | str]]:
    rng = random.Random(0)
    return [sample(SPACE, at_random(rng)) for _ in range(number)]


def inside(params: dict[str, float | int | str]) -> bool:
    among = distributions(SPACE, params)
    assert among.keys() == params.keys()
    return all(
        own.low <= float(params[name]) <= own.high if isinstance(own, LogUniform) else params[name] in own
        for name, own in among.items()
    )


def test_every_draw_lies_in_the_space_and_makes_a_valid_configuration() -> None:
    config = RunConfig(method=METHODS["grass"].config, model=ModelConfig(name="tiny"))
    kinds = set()
    for params in drawn(60):
        assert inside(params)
        own = config.override(values(SPACE, params))
        temperature = own.method.sampler.temperature  # type: ignore[union-attr]
        kinds.add(getattr(temperature, "kind", "number"))
        assert isinstance(own.method.sampler.period, int)  # type: ignore[union-attr]
    assert kinds == {"number", "linear", "step"}


def test_what_is_inside_an_alternative_is_chosen_only_where_that_one_was() -> None:
    for params in drawn(60):
        chosen = params["method.sampler.temperature"]
        parts = {name for name in params if name.startswith("method.sampler.temperature:")}
        expected = {
            "constant": {"method.sampler.temperature:constant"},
            "falling": {"method.sampler.temperature:falling.start", "method.sampler.temperature:falling.end"},
            "steps": set(),
        }
        assert parts == expected[str(chosen)]


def test_params_say_the_same_again_and_a_space_survives_a_file() -> None:
    for params in drawn(10):
        assert sample(SPACE, lambda name, among, own=params: own[name]) == params  # type: ignore[misc]
        assert values(read_space(written(SPACE)), params) == values(SPACE, params)
    assert written(read_space(written(SPACE))) == written(SPACE)


def test_a_space_that_an_older_version_wrote_is_read() -> None:
    older = {
        "method.optimizer.lr": {"log_uniform": [1e-05, 0.001], "whole": False},
        "method.sampler.period": {
            "one_of": {
                "constant": {"log_uniform": [2, 9], "whole": True},
                "slower": {"kind": "linear", "start": 2, "end": {"log_uniform": [4, 9], "whole": True}},
                "never": None,
            }
        },
    }
    slower = {"kind": "linear", "start": 2, "end": LogUniform(low=4, high=9, whole=True)}
    assert read_space(older) == {
        "method.optimizer.lr": LogUniform(low=1e-5, high=1e-3),
        "method.sampler.period": OneOf(
            options={"constant": LogUniform(low=2, high=9, whole=True), "slower": slower, "never": None}
        ),
    }


def test_mutation_never_leaves_the_space_and_changes_numbers_by_its_factors() -> None:
    rng = random.Random(1)
    params = drawn(1)[0]
    for _ in range(400):
        mutated = sample(SPACE, mutation(params, rng))
        assert inside(mutated)
        params = mutated
    start = {"x": 0.1}
    space: Space = {"x": LogUniform(low=0.01, high=1.0)}
    kept = {sample(space, mutation(start, random.Random(seed), resample=0))["x"] for seed in range(20)}
    assert kept == {0.08, 0.125}
    edge = {sample(space, mutation({"x": 1.0}, random.Random(seed), resample=0))["x"] for seed in range(20)}
    assert edge == {0.8, 1.0}


def test_a_small_whole_number_moves_and_a_choice_goes_to_a_neighbour() -> None:
    space: Space = {"n": LogUniform(low=1, high=9, whole=True), "c": ("a", "b", "c", "d")}
    found = [sample(space, mutation({"n": 2, "c": "b"}, random.Random(seed), resample=0)) for seed in range(30)]
    assert {params["n"] for params in found} == {1, 3}
    assert {params["c"] for params in found} == {"a", "c"}


def test_what_was_not_chosen_before_is_drawn_afresh() -> None:
    before = {"method.sampler.temperature": "constant", "method.sampler.temperature:constant": 0.5}
    space: Space = {"method.sampler.temperature": SPACE["method.sampler.temperature"]}
    found = [sample(space, mutation(before, random.Random(seed), resample=0)) for seed in range(20)]
    falling = [params for params in found if params["method.sampler.temperature"] == "falling"]
    assert falling
    assert all(1 <= float(params["method.sampler.temperature:falling.start"]) <= 4 for params in falling)


def test_an_impossible_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to 1; it needs 0 < low <= high"):
        LogUniform(low=0, high=1)
