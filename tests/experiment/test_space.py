"""Search spaces: picks lie inside them, alternatives are only asked for what they hold, mutation stays inside."""

import random

import pytest

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.experiment.space import (
    LogUniform,
    Mutation,
    OneOf,
    RandomPicker,
    Replay,
    Space,
    choose,
    from_plain,
    ranges,
    to_plain,
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


def drawn(number: int) -> list[dict[str, float | int | str]]:
    rng = random.Random(0)
    return [choose(SPACE, RandomPicker(rng)) for _ in range(number)]


def inside(picks: dict[str, float | int | str]) -> bool:
    among = ranges(SPACE, picks)
    assert among.keys() == picks.keys()
    return all(
        own.low <= float(picks[name]) <= own.high if isinstance(own, LogUniform) else picks[name] in own
        for name, own in among.items()
    )


def test_every_draw_lies_in_the_space_and_makes_a_valid_configuration() -> None:
    config = RunConfig(method=METHODS["grass"].config, model=ModelConfig(name="tiny"))
    kinds = set()
    for picks in drawn(60):
        assert inside(picks)
        own = config.override(values(SPACE, picks))
        temperature = own.method.sampler.temperature  # type: ignore[union-attr]
        kinds.add(getattr(temperature, "kind", "number"))
        assert isinstance(own.method.sampler.period, int)  # type: ignore[union-attr]
    assert kinds == {"number", "linear", "step"}


def test_what_is_inside_an_alternative_is_picked_only_where_that_one_was() -> None:
    for picks in drawn(60):
        chosen = picks["method.sampler.temperature"]
        parts = {name for name in picks if name.startswith("method.sampler.temperature:")}
        expected = {
            "constant": {"method.sampler.temperature:constant"},
            "falling": {"method.sampler.temperature:falling.start", "method.sampler.temperature:falling.end"},
            "steps": set(),
        }
        assert parts == expected[str(chosen)]


def test_picks_say_the_same_again_and_a_space_survives_a_file() -> None:
    for picks in drawn(10):
        assert choose(SPACE, Replay(picks)) == picks
        assert values(from_plain(to_plain(SPACE)), picks) == values(SPACE, picks)
    assert from_plain(to_plain(SPACE)) == SPACE


def test_mutation_never_leaves_the_space_and_changes_numbers_by_its_factors() -> None:
    rng = random.Random(1)
    picks = drawn(1)[0]
    for _ in range(400):
        mutated = choose(SPACE, Mutation(picks, rng))
        assert inside(mutated)
        picks = mutated
    start = {"x": 0.1}
    space: Space = {"x": LogUniform(low=0.01, high=1.0)}
    kept = {choose(space, Mutation(start, random.Random(seed), resample=0))["x"] for seed in range(20)}
    assert kept == {0.08, 0.125}
    edge = {choose(space, Mutation({"x": 1.0}, random.Random(seed), resample=0))["x"] for seed in range(20)}
    assert edge == {0.8, 1.0}


def test_a_small_whole_number_moves_and_a_choice_goes_to_a_neighbour() -> None:
    space: Space = {"n": LogUniform(low=1, high=9, whole=True), "c": ("a", "b", "c", "d")}
    found = [choose(space, Mutation({"n": 2, "c": "b"}, random.Random(seed), resample=0)) for seed in range(30)]
    assert {picks["n"] for picks in found} == {1, 3}
    assert {picks["c"] for picks in found} == {"a", "c"}


def test_what_was_not_picked_before_is_drawn_afresh() -> None:
    before = {"method.sampler.temperature": "constant", "method.sampler.temperature:constant": 0.5}
    space: Space = {"method.sampler.temperature": SPACE["method.sampler.temperature"]}
    found = [choose(space, Mutation(before, random.Random(seed), resample=0)) for seed in range(20)]
    falling = [picks for picks in found if picks["method.sampler.temperature"] == "falling"]
    assert falling
    assert all(1 <= float(picks["method.sampler.temperature:falling.start"]) <= 4 for picks in falling)


def test_an_impossible_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to 1; it needs 0 < low <= high"):
        LogUniform(low=0, high=1)
