"""The contract every sampler keeps; a new sampler is one more line in SAMPLERS."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch

from grass_ray import (
    AllLayersSampler,
    CyclicSampler,
    GradNormSampler,
    MatrixNormSampler,
    OutlierSampler,
    RewardSampler,
    UniformSampler,
)
from grass_ray.layerwise.samplers import Sampler
from grass_ray.layerwise.schedules import Cosine, Linear, Step, bounds_of

LAYERS = 6
SIZES = [10, 20, 30, 10, 20, 30]
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "all": lambda seed: AllLayersSampler(),
    "uniform": lambda seed: UniformSampler(2, 3, seed=seed),
    "uniform-scheduled": lambda seed: UniformSampler(Linear(4, 1, 20), Step([2, 5], [0.5], 20), seed=seed),
    "grad_norm": lambda seed: GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=seed),
    "grad_norm-static": lambda seed: GradNormSampler(2, 3, probing_steps=2, refresh_period=None, seed=seed),
    "grad_norm-unprobed": lambda seed: GradNormSampler(2, 3, probing_steps=0, refresh_period=4, seed=seed),
    "grad_norm-as-printed": lambda seed: GradNormSampler(
        2, 3, probing_steps=1, refresh_period=4, normalise="none", temperature=1e-3, exploration=0.1, seed=seed
    ),
    "grad_norm-scheduled": lambda seed: GradNormSampler(
        Step([3, 1], [0.5], 20),
        Linear(1, 4, 20),
        probing_steps=2,
        refresh_period=4,
        temperature=Cosine(2.0, 0.2, 20),
        ema=Linear(1.0, 0.1, 20),
        seed=seed,
    ),
    "outlier": lambda seed: OutlierSampler([1.0, 2.0, 3.0, 0.5, 0.0, 1.5], 2, 3, seed=seed),
    "outlier-measured": lambda seed: OutlierSampler(None, 2, 3, seed=seed),
    "cyclic": lambda seed: CyclicSampler(2, 3, seed=seed),
    "cyclic-descending": lambda seed: CyclicSampler(4, 1, order="descending", seed=seed),
    "cyclic-random": lambda seed: CyclicSampler(1, 2, order="random", seed=seed),
    "cyclic-shuffled": lambda seed: CyclicSampler(1, 2, order="shuffled", seed=seed),
    "cyclic-one-pass": lambda seed: CyclicSampler(1, None, training_steps=40, seed=seed),
    "reward": lambda seed: RewardSampler(0.34, refresh_period=3, seed=seed),
    "matrix_norm": lambda seed: MatrixNormSampler(0.34, 3, eta=1e4, seed=seed),
}
WITHOUT_CHANCE = {"all", "cyclic", "cyclic-descending", "cyclic-one-pass"}


class Passes:
    """What a training loop would measure at a step, made up from the step and the question alone."""

    def __init__(self, step: int) -> None:
        self._step = step

    def loss(self, scales: Mapping[int, float]) -> float:
        return 1.0 + 0.1 * sum(layer * (1 - scale) for layer, scale in scales.items()) / (1 + self._step)

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        return tuple(float(1 + layer) for layer in range(LAYERS))


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
        sampler.probe(Passes(step))
        if sampler.due:
            active = sampler.sample()
        sampler.observe(norms_at(step, None if sampler.probing else active))
        if sampler.due:
            active = sampler.sample()
        said.append([active, sampler.probabilities(), sampler.refreshes, sampler.importance()])
    return said


def as_json(said: object) -> str:
    """What was said as text, so that NaN equals NaN."""
    return json.dumps(said)


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest) -> Callable[[int], Sampler]:
    return SAMPLERS[request.param]


def test_draws_valid_distinct_layers_and_probabilities(make: Callable[[int], Sampler]) -> None:
    sampler = make(0)
    sampler.start(SIZES)
    for active, probabilities, *_ in drive(sampler, 40):
        if active is not None:
            assert list(active) == sorted(set(active))
            assert set(active) <= set(range(LAYERS))
        if probabilities is not None:
            assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-9)
            assert min(probabilities) >= 0


def test_same_seed_same_sequence_in_a_fresh_process(make: Callable[[int], Sampler], request) -> None:
    name = request.node.callspec.params["make"]
    sampler = make(7)
    sampler.start(SIZES)
    here = as_json(drive(sampler, 30))
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_samplers as t\n"
        f"s = t.SAMPLERS[{name!r}](7); s.start(t.SIZES); print(json.dumps(t.drive(s, 30)))"
    )
    from pathlib import Path

    folder = str(Path(__file__).parent)
    there = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True).stdout
    assert as_json(json.loads(there)) == here


def test_another_seed_gives_another_sequence() -> None:
    for name, make_one in SAMPLERS.items():
        if name in WITHOUT_CHANCE:
            continue
        first, second = make_one(0), make_one(1)
        first.start(SIZES)
        second.start(SIZES)
        assert drive(first, 60) != drive(second, 60), name


@pytest.mark.parametrize("stop", range(1, 12))
def test_state_round_trip_at_every_step(make: Callable[[int], Sampler], stop: int) -> None:
    whole = make(3)
    whole.start(SIZES)
    expected = drive(whole, 30)
    first = make(3)
    first.start(SIZES)
    said = drive(first, stop)
    resumed = make(3)
    resumed.start(SIZES)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    active = said[-1][0]  # type: ignore[index]
    assert as_json(said + drive(resumed, 30 - stop, active, start=stop)) == as_json(expected)


def test_one_layer(make: Callable[[int], Sampler], request) -> None:
    name = request.node.callspec.params["make"]
    sampler = make(0)
    most = bounds_of(getattr(sampler, "num_active_layers", 1))[1]
    if most > 1:
        with pytest.raises(ValueError, match=rf"gamma.* is {most:g}, but the model has 1 decoder layers"):
            sampler.start([10])
        sampler.num_active_layers = 1
    if name == "matrix_norm":
        with pytest.raises(ValueError, match=r"budget is 0.34 of 10 parameters, but the largest matrix has 10"):
            sampler.start([10])
        sampler.budget = 1.0
    if name == "outlier":
        with pytest.raises(ValueError, match=r"there are 6 scores for 1 layers"):
            sampler.start([10])
        sampler = OutlierSampler([2.0], 1)
    sampler.start([10])
    if name == "outlier-measured":
        return  # the made-up passes speak of six layers
    while sampler.probing:
        sampler.observe(torch.tensor([1.0]))
    assert sampler.sample() == (0,)


FIRST_DRAWS: dict[str, Callable[[], Sampler]] = {
    "uniform": lambda: UniformSampler(1, 1),
    "grad_norm": lambda: GradNormSampler(1, 1, probing_steps=1, temperature=0.7, exploration=0.05),
    "outlier": lambda: OutlierSampler([1.0, 2.0, 3.0, 0.5, 1.0, 1.5], 1, 1),
    "reward": lambda: RewardSampler(0.17, refresh_period=1, learning_rate=200.0),
    "matrix_norm": lambda: MatrixNormSampler(1 / LAYERS, 1, eta=3e6, forced=0),
}


@pytest.mark.parametrize("kind", FIRST_DRAWS)
def test_first_draw_frequencies_match_the_probabilities(kind: str) -> None:
    from scipy.stats import chisquare

    sampler = FIRST_DRAWS[kind]()
    sampler.start([10] * LAYERS)
    drive(sampler, 12)
    draws = 6000
    counts = [0] * LAYERS
    p = sampler.probabilities()
    assert p is not None
    for _ in range(draws):
        (layer,) = sampler.pick()  # type: ignore[attr-defined]
        sampler._draws += 1  # type: ignore[attr-defined]
        counts[layer] += 1
    assert chisquare(counts, [share * draws for share in p]).pvalue > 1e-3
    if kind != "uniform":
        assert chisquare(counts, [draws / LAYERS] * LAYERS).pvalue < 1e-6, "the case must tell p from uniform"


def test_draws_without_replacement_follow_sequential_drawing() -> None:
    """Two of three layers: P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    sampler = GradNormSampler(2, 1, probing_steps=1, refresh_period=None, temperature=1.0)
    sampler.start([1] * 3)
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
