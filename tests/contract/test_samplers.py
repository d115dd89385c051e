"""The contract every sampler keeps; a new sampler is one more line in SAMPLERS."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from grass_ray.layerwise.samplers import AllLayersSampler, GradNormSampler, Sampler, UniformSampler

LAYERS = 6
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "all": lambda seed: AllLayersSampler(),
    "uniform": lambda seed: UniformSampler(2, 3, seed=seed),
    "grad_norm": lambda seed: GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=seed),
    "grad_norm-static": lambda seed: GradNormSampler(2, 3, probing_steps=2, refresh_period=None, seed=seed),
    "grad_norm-unprobed": lambda seed: GradNormSampler(2, 3, probing_steps=0, refresh_period=4, seed=seed),
    "grad_norm-as-printed": lambda seed: GradNormSampler(
        2, 3, probing_steps=1, refresh_period=4, normalise="none", temperature=1e-3, exploration=0.1, seed=seed
    ),
}


def norms_at(step: int, active: tuple[int, ...] | None) -> torch.Tensor:
    """Made-up RMS gradients of a step; frozen layers are NaN."""
    values = torch.rand(LAYERS, generator=torch.Generator().manual_seed(step)) * 1e-3
    if active is not None:
        values[[layer for layer in range(LAYERS) if layer not in active]] = math.nan
    return values


def drive(sampler: Sampler, steps: int, active: tuple[int, ...] | None = None, start: int = 0) -> list[object]:
    """Drive a started sampler as the optimizer does; what it said at every step."""
    said: list[object] = []
    for step in range(start, start + steps):
        if active is None and sampler.due:
            active = sampler.sample()
        sampler.observe(norms_at(step, None if sampler.probing else active))
        if sampler.due:
            active = sampler.sample()
        said.append([active, sampler.probabilities(), sampler.refreshes])
    return said


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest) -> Callable[[int], Sampler]:
    return SAMPLERS[request.param]


def test_draws_valid_distinct_layers_and_probabilities(make: Callable[[int], Sampler]) -> None:
    sampler = make(0)
    sampler.start(LAYERS)
    for active, probabilities, _ in drive(sampler, 40):
        if active is not None:
            assert list(active) == sorted(set(active))
            assert set(active) <= set(range(LAYERS))
        if probabilities is not None:
            assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-9)
            assert min(probabilities) >= 0


def test_same_seed_same_sequence_in_a_fresh_process(make: Callable[[int], Sampler], request) -> None:
    name = request.node.callspec.params["make"]
    sampler = make(7)
    sampler.start(LAYERS)
    here = json.loads(json.dumps(drive(sampler, 30)))
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_samplers as t\n"
        f"s = t.SAMPLERS[{name!r}](7); s.start(t.LAYERS); print(json.dumps(t.drive(s, 30)))"
    )
    from pathlib import Path

    folder = str(Path(__file__).parent)
    there = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True).stdout
    assert json.loads(there) == here


def test_another_seed_gives_another_sequence() -> None:
    for name, make_one in SAMPLERS.items():
        if name == "all":
            continue
        first, second = make_one(0), make_one(1)
        first.start(LAYERS)
        second.start(LAYERS)
        assert drive(first, 60) != drive(second, 60), name


@pytest.mark.parametrize("stop", range(1, 12))
def test_state_round_trip_at_every_step(make: Callable[[int], Sampler], stop: int) -> None:
    whole = make(3)
    whole.start(LAYERS)
    expected = drive(whole, 30)
    first = make(3)
    first.start(LAYERS)
    said = drive(first, stop)
    resumed = make(3)
    resumed.start(LAYERS)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    active = said[-1][0]  # type: ignore[index]
    assert said + drive(resumed, 30 - stop, active, start=stop) == expected


def test_one_layer(make: Callable[[int], Sampler]) -> None:
    sampler = make(0)
    if hasattr(sampler, "num_active_layers"):
        with pytest.raises(ValueError, match=r"gamma.* is 2, but the model has 1 decoder layers; choose 1 to 1"):
            sampler.start(1)
        sampler.num_active_layers = 1
    sampler.start(1)
    while sampler.probing:
        sampler.observe(torch.tensor([1.0]))
    assert sampler.sample() == (0,)


def test_first_draw_frequencies_match_the_probabilities() -> None:
    sampler = GradNormSampler(1, 1, probing_steps=1, refresh_period=None, temperature=0.7, exploration=0.05)
    sampler.start(LAYERS)
    sampler.observe(norms_at(5, None))
    draws = 6000
    counts = [0] * LAYERS
    for _ in range(draws):
        counts[sampler.sample()[0]] += 1
    from scipy.stats import chisquare

    expected = [p * draws for p in sampler.probabilities()]
    assert chisquare(counts, expected).pvalue > 1e-3
    assert chisquare(counts, [draws / LAYERS] * LAYERS).pvalue < 1e-6, "the case must tell p from uniform"


def test_draws_without_replacement_follow_sequential_drawing() -> None:
    """Two of three layers: P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    sampler = GradNormSampler(2, 1, probing_steps=1, refresh_period=None, temperature=1.0)
    sampler.start(3)
    sampler.observe(torch.tensor([1.0, 2.0, 4.0]))
    p = sampler.probabilities()
    pairs = [(0, 1), (0, 2), (1, 2)]
    exact = [p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs]
    draws = 6000
    counts = dict.fromkeys(pairs, 0)
    for _ in range(draws):
        counts[sampler.sample()] += 1  # type: ignore[index]
    from scipy.stats import chisquare

    assert chisquare(list(counts.values()), [share * draws for share in exact]).pvalue > 1e-3
