"""The layers that the fixed sampler names, and AdaGradSelect's draws against the plain rule."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from small import short_run

from grass_ray import FixedSampler, FrequencySampler
from grass_ray.config import ConfigError, FixedSamplerConfig
from grass_ray.contract.samplers import drive


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("first", 30, range(10)),
        ("middle", 30, range(10, 20)),
        ("last", 30, range(20, 30)),
        ("first", 4, [0]),
        ("middle", 4, [1]),
        ("last", 4, [3]),
        ("first", 22, range(7)),
        ("middle", 22, range(7, 14)),
        ("last", 22, range(15, 22)),
        ([5, 2], 6, [2, 5]),
    ],
)
def test_the_named_layers_train_throughout(layers: str | list[int], count: int, expected: range | list[int]) -> None:
    sampler = FixedSampler(layers)
    sampler.start([10] * count)
    active = {tuple(step[0]) for step in drive(sampler, 20)}
    assert active == {tuple(expected)}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("upper", "layers is 'upper'; it must be first, middle, last, or indices"),
        ([], "layers is []; it must be at least one index"),
        ([1, 1], "each only once"),
        ([-1], "from 0"),
        ([3, 6], "layers is [3, 6]; it must be below 6, the number of layers"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers: str | list[int], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FixedSampler(layers).start([10] * 6)


def test_the_state_of_other_layers_is_refused() -> None:
    first, last = FixedSampler("first"), FixedSampler("last")
    for sampler in (first, last):
        sampler.start([10] * 6)
    with pytest.raises(ValueError, match="trains the layers"):
        last.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("upper", "method.sampler.layers: Input should be 'first', 'middle' or 'last' (given: 'upper')"),
        ([2, -1], "method.sampler.layers.1: Input should be greater than or equal to 0 (given: -1)"),
    ],
)
def test_a_configuration_says_what_layers_may_be(layers: object, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        short_run("last-third").override({"method.sampler.layers": layers})
    assert words in str(error.value)
    assert ";" not in str(error.value), "one message for one mistake"


def test_indices_are_read_from_a_configuration() -> None:
    config = FixedSamplerConfig.model_validate({"layers": [3, 1]})
    assert config.build(seed=0, train_steps=9).layers == (3, 1)


def measured(sampler: FrequencySampler, norms: list[float], steps: int) -> list[tuple[int, ...]]:
    """Active sets of a training in which every layer's norm stays the same."""
    sampler.start([10] * len(norms))
    sets = []
    for _ in range(steps):
        sampler.observe(torch.tensor(norms))
        if sampler.due:
            sets.append(sampler.sample())
    return sets


def test_epsilon_of_one_takes_the_largest_gradients_for_ever() -> None:
    sampler = FrequencySampler(2, 1, probing_steps=1, decay=1.0)
    assert set(measured(sampler, [1.0, 5.0, 2.0, 4.0], 30)) == {(1, 3)}


def test_later_draws_follow_how_often_layers_were_drawn_at_first() -> None:
    """The share of draws that take the largest gradients decays; then the urn of Polya keeps the early favourites."""
    early, late = 0, np.zeros(6)
    for seed in range(200):
        sampler = FrequencySampler(1, 1, probing_steps=1, decay=0.8, prior=0.5, seed=seed)
        sets = measured(sampler, [1.0, 1.0, 9.0, 1.0, 1.0, 1.0], 61)
        early += sum(active == (2,) for active in sets[:3])
        late += np.bincount([active[0] for active in sets[-20:]], minlength=6)
    # of the first three draws 1, 0.8 and 0.64 are greedy, and some of the others find the favourite as well
    assert early / 600 > (1 + 0.8 + 0.64) / 3
    assert late[2] / late.sum() > 0.6
    assert (np.delete(late, 2) / late.sum()).max() < 0.12


def test_probabilities_are_the_mixture_of_both_rules() -> None:
    sampler = FrequencySampler(1, 1, probing_steps=1, epsilon=0.6, decay=0.5, prior=2.0)
    sets = measured(sampler, [1.0, 3.0, 2.0], 4)
    counts = np.array([sum(unit in active for active in sets) for unit in range(3)])
    greedy = 0.6 * 0.5 ** len(sets)
    expected = (1 - greedy) * (counts + 2.0) / (counts.sum() + 6.0) + greedy * np.array([0, 1, 0])
    assert np.allclose(sampler.probabilities(), expected)
    assert math.isclose(sum(sampler.probabilities()), 1.0)
