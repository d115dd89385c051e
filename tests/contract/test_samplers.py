"""The contract every sampler keeps; a new sampler is one more line in SAMPLERS."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal, get_args

import pytest
import torch
from small import backward, make_llama

from grass_ray import (
    AllLayersSampler,
    ConvergingSampler,
    CyclicSampler,
    FixedSampler,
    FrequencySampler,
    GradNormSampler,
    MatrixNormSampler,
    OutlierSampler,
    RewardSampler,
    UniformSampler,
)
from grass_ray.config import (
    AnyProjectionConfig,
    AnySamplerConfig,
    AnyScheduleConfig,
    ImportedPart,
    MethodConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
)
from grass_ray.config.schedules import ScheduledCount
from grass_ray.contract.samplers import (
    SIZES,
    STOPS,
    MadeUpPasses,
    Make,
    as_json,
    check_damaged_state,
    check_draws,
    check_foreign_state,
    check_largest_sets,
    check_not_finite,
    check_other_model,
    check_resume,
    check_seed,
    check_start_again,
    drive,
    first_draws,
    held,
    norms_at,
    started,
)
from grass_ray.layerwise.drawing import draw_without_replacement
from grass_ray.layerwise.grad_norm import TEMPERATURE
from grass_ray.layerwise.sampler import Sampler
from grass_ray.layerwise.schedules import Cosine, Linear, Step, bounds_of
from grass_ray.memory.plan import Planner
from grass_ray.memory.step import StepShape
from grass_ray.training.optimizer import build_optimizer


class TopHeavySampler(UniformSampler):
    """Stands for a sampler of your own (CONTRIBUTING.md): later layers are drawn more often."""

    def probabilities(self) -> tuple[float, ...]:
        """In proportion to the layer's place, from 1."""
        total = self._num_units * (self._num_units + 1) / 2
        return tuple((layer + 1) / total for layer in range(self._num_units))

    def pick(self) -> tuple[int, ...]:
        """A draw from the probabilities."""
        log_p = torch.tensor(self.probabilities(), dtype=torch.float64).log()
        return draw_without_replacement(log_p, self.now_active, self.seed, self._draws)


class TopHeavyConfig(SamplerConfig):
    """Its configuration, which would be a line of ``AnySamplerConfig``."""

    builds: ClassVar[str] = "test_samplers.TopHeavySampler"
    kind: Literal["top_heavy"] = "top_heavy"
    num_active_layers: ScheduledCount = 2
    period: ScheduledCount = 20


class TopHeavyMethod(MethodConfig):
    sampler: TopHeavyConfig = TopHeavyConfig()


LAYERS = len(SIZES)
SAMPLERS: dict[str, Make] = {
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
    "grad_norm-fresh": lambda seed: GradNormSampler(
        2, 3, probing_steps=2, refresh_period=4, staleness="level", exploration=0.05, seed=seed
    ),
    "grad_norm-effective": lambda seed: GradNormSampler(
        2, 3, probing_steps=2, refresh_period=4, effective_layers=Linear(5.0, 1.5, 20), seed=seed
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
    "fixed": lambda seed: FixedSampler("last"),
    "fixed-index": lambda seed: FixedSampler([0]),
    "frequency": lambda seed: FrequencySampler(2, 3, probing_steps=2, refresh_period=4, decay=0.8, seed=seed),
    "frequency-alone": lambda seed: FrequencySampler(2, 3, probing_steps=1, epsilon=0.0, seed=seed),
    "converging": lambda seed: ConvergingSampler(0.3, 0.2, 3, training_steps=30, seed=seed),
    "top_heavy": lambda seed: TopHeavySampler(2, 3, seed=seed),
}
IN_TURN = {name for name in SAMPLERS if name.startswith(("all", "fixed", "cyclic", "converging"))}


KINDS: list[type[SamplerConfig]] = [
    *(kind for kind in get_args(get_args(AnySamplerConfig)[0]) if not issubclass(kind, ImportedPart)),
    TopHeavyConfig,
]


PROJECTIONS = [kind for kind in get_args(get_args(AnyProjectionConfig)[0]) if not issubclass(kind, ImportedPart)]


def kind_of(config: type[SamplerConfig]) -> str:
    return str(config.model_fields["kind"].default)


@pytest.mark.parametrize("config", KINDS, ids=kind_of)
def test_every_kind_of_a_configuration_builds_a_sampler_of_this_contract(config: type[SamplerConfig]) -> None:
    sampler = config().build(seed=7, train_steps=100)
    assert type(sampler) in {type(make(0)) for make in SAMPLERS.values()}
    assert sampler.trains_all == config.trains_all
    assert getattr(sampler, "seed", 7) == 7


@pytest.mark.parametrize("config", KINDS, ids=kind_of)
def test_a_sampler_and_its_configuration_have_the_same_settings_and_defaults(config: type[SamplerConfig]) -> None:
    sampler = type(config().build(seed=0, train_steps=100))
    settings = {name: field.default for name, field in config.model_fields.items() if name != "kind"}
    arguments = inspect.signature(sampler).parameters
    # what a configuration does not say, and a default that depends on another argument
    beside = {"seed", "training_steps", "scores"}
    defaults = {name: value.default for name, value in arguments.items() if name not in beside}
    if "temperature" in defaults:
        assert defaults["temperature"] is None, "so that effective_layers alone can be given"
        defaults["temperature"] = TEMPERATURE
    assert defaults == settings


def test_a_new_sampler_trains_and_is_planned_by_its_class_configuration_and_line_here_alone() -> None:
    method = TopHeavyMethod(name="top-heavy")
    planner = Planner(ModelConfig(name="tiny"), "cpu")
    plans = planner.plan_modes(method, StepShape(rows=2, tokens=8), train_steps=10)
    assert [plan.offload for plan in plans] == ["none", "resident", "blocking", "overlap", "lazy"]
    assert planner.apply(method).active_sets() == [(0, 3)], "of four equal layers two, one of them the lowest"
    model = make_llama()
    optimizer = build_optimizer(model, method.sampler.build(seed=0, train_steps=10), method)
    for step in range(45):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.switches == 2


@pytest.mark.parametrize("config", get_args(get_args(AnyScheduleConfig)[0]), ids=lambda config: config.__name__)
def test_every_kind_of_schedule_is_built(config: type[ScheduleConfig]) -> None:
    values = {"values": (4.0, 2.0), "at_progress": (0.5,)} if "values" in config.model_fields else {}
    settings = values or {"start": 4.0, "end": 2.0}
    kind = get_args(config.model_fields["kind"].annotation)[0]
    whole, own = config(kind=kind, **settings).build(100), config(kind=kind, steps=10, **settings).build(100)
    assert (whole.steps, own.steps) == (100, 10)
    assert (whole.at(0), whole.at(100), whole.bounds()) == (4.0, 2.0, (2.0, 4.0))


@pytest.mark.parametrize("config", PROJECTIONS, ids=kind_of)
def test_every_kind_of_projection_is_built_with_the_defaults_of_its_configuration(config) -> None:
    projection = config().build()
    assert projection == type(projection)()


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest) -> Make:
    return SAMPLERS[request.param]


def test_draws_valid_distinct_layers_and_probabilities(make: Make) -> None:
    check_draws(make, SIZES)


@pytest.fixture(scope="module")
def from_a_fresh_process() -> dict[str, object]:
    """Every sampler's sequence from seed 7, all of them from one process."""
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:]; import test_samplers as t\n"
        "samplers = {name: make(7) for name, make in t.SAMPLERS.items()}\n"
        "for sampler in samplers.values(): sampler.start(t.SIZES)\n"
        "print(json.dumps({name: t.drive(sampler, 30) for name, sampler in samplers.items()}))"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent)]
    sequences: dict[str, object] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return sequences


@pytest.mark.long
def test_same_seed_same_sequence_in_a_fresh_process(
    make: Make, request: pytest.FixtureRequest, from_a_fresh_process: dict[str, object]
) -> None:
    sampler = make(7)
    sampler.start(SIZES)
    name = request.node.callspec.params["make"]
    assert as_json(from_a_fresh_process[name]) == as_json(drive(sampler, 30))


def test_another_seed_gives_another_sequence(make: Make) -> None:
    check_seed(make, SIZES)


def test_what_is_drawn_at_random_is_known_by_its_probabilities() -> None:
    for name, make_one in SAMPLERS.items():
        assert (started(make_one, SIZES, 60).probabilities() is None) == (name in IN_TURN), name
    check_seed(lambda seed: CyclicSampler(1, 2, order="random", seed=seed), SIZES)


@pytest.mark.parametrize("stop", STOPS)
def test_state_round_trip_at_every_step(make: Make, stop: int) -> None:
    check_resume(make, SIZES, [stop])


# ------------------------------------------------------------------------------------- states that do not fit, and new


@pytest.mark.parametrize("other", ["all", "uniform", "grad_norm", "outlier", "cyclic", "reward", "matrix_norm"])
def test_the_state_of_another_kind_is_refused_and_changes_nothing(make: Make, other: str) -> None:
    check_foreign_state(make, SIZES, started(SAMPLERS[other], SIZES, 7))


def test_the_state_of_an_unknown_kind_is_refused(make: Make) -> None:
    check_foreign_state(make, SIZES)


def test_a_state_of_another_number_of_units_is_refused(make: Make, request) -> None:
    if request.node.callspec.params["make"] != "outlier":  # which has six scores
        check_other_model(make, SIZES)


def test_damaged_states_are_refused_one_value_at_a_time(make: Make) -> None:
    check_damaged_state(make, SIZES)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_a_sampler_that_is_started_again_is_new(make: Make, steps: int) -> None:
    check_start_again(make, SIZES, [steps])


EARLIER = {"steps": 4, "draws": 2, "next_draw": 6}
EARLIER_STATES: dict[str, dict[str, object]] = {
    "all": {"drawn": True},
    "uniform": EARLIER,
    "cyclic": EARLIER,
    "grad_norm": EARLIER
    | {
        "probed": 2,
        "refreshes": 2,
        "importance": [1.0] * 6,
        "window_sum": [0.0, 3.0] * 3,
        "window_count": [0.0, 1.0] * 3,
    },
    "grad_norm-static": EARLIER
    | {"probed": 2, "refreshes": 1, "importance": [1.0] * 6, "window_sum": None, "window_count": None},
    "outlier": EARLIER | {"scores": [1.0, 2.0, 3.0, 0.5, 0.0, 1.5]},
    "reward": EARLIER | {"importance": [0.5] * 6, "refreshes": 1, "refreshed_at": 3},
    "matrix_norm": EARLIER
    | {"last_used": [0, 0, 1, 1, 1, 1], "visits": [1] * 6, "means": [0.2] * 6, "refreshes": 1}
    | {"sums": [0.0, 3.0] * 3, "counts": [0.0, 1.0] * 3},
}


@pytest.mark.parametrize("name", EARLIER_STATES)
def test_states_of_earlier_versions_are_gone_on_from(name: str) -> None:
    sampler = started(SAMPLERS[name], SIZES)
    sampler.load_state_dict(json.loads(json.dumps(EARLIER_STATES[name])))
    assert len(drive(sampler, 20, (0, 1), start=4)) == 20
    assert held(started(SAMPLERS[name], SIZES)) != held(sampler)


# -------------------------------------------------------------------------------------------- devices, and bad steps


LONG: dict[str, Callable[[], Sampler]] = {
    "all": AllLayersSampler,
    "uniform": lambda: UniformSampler(2, 100),
    "grad_norm-probing": lambda: GradNormSampler(2, 100, probing_steps=50),
    "grad_norm": lambda: GradNormSampler(2, 3, probing_steps=2, refresh_period=100),
    "grad_norm-static": lambda: GradNormSampler(2, 3, probing_steps=2, refresh_period=None),
    "outlier": lambda: OutlierSampler([1.0, 2.0, 3.0, 0.5, 0.0, 1.5], 2, 3),
    "cyclic": lambda: CyclicSampler(2, 3),
    "reward": lambda: RewardSampler(0.34, refresh_period=3),
    "matrix_norm": lambda: MatrixNormSampler(0.34, 100),
}


@pytest.mark.parametrize("stop", range(1, 9))
@pytest.mark.parametrize("kind", LONG)
def test_an_open_window_goes_on_with_norms_of_another_device(kind: str, stop: int) -> None:
    """The meta device stands for any: mixing it with another raises, and so does whatever would make the host wait."""
    if stop < {"matrix_norm": 6, "grad_norm": 2, "grad_norm-static": 2}.get(kind, 0):
        return  # a first sweep closes a window at every step, probing one at its end
    first = LONG[kind]()
    first.start(SIZES)
    drive(first, stop)
    resumed = LONG[kind]()
    resumed.start(SIZES)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for sampler in (first, resumed):
        for _ in range(3):
            if kind != "matrix_norm" and sampler.due:
                sampler.sample()
            sampler.observe(torch.empty(LAYERS, device="meta"))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("when", range(10))
def test_a_step_that_is_not_finite_leaves_finite_numbers(make: Make, when: int, bad: float) -> None:
    check_not_finite(make, SIZES, [when], [bad])


def test_a_trial_whose_loss_is_not_a_number_tells_nothing() -> None:
    class Broken(MadeUpPasses):
        def loss(self, scales: Mapping[int, float]) -> float:
            return math.nan if 0 in scales else super().loss(scales)

    sampler = RewardSampler(0.34, refresh_period=1, trials=4)
    sampler.start(SIZES)
    for step in range(20):
        sampler.probe(Broken(step, LAYERS))
        sampler.sample()
        sampler.observe(norms_at(step, None, LAYERS))
    assert all(map(math.isfinite, sampler.importance()))
    assert sampler.importance()[0] == 0
    assert any(sampler.importance())


# --------------------------------------------------------------------------------------------------- what it may draw


def test_no_draw_is_heavier_than_the_heaviest_that_is_foretold(make: Make) -> None:
    """Whatever the weights of units are: their parameters, or the bytes of their states."""
    check_largest_sets(make, SIZES)


def test_the_heaviest_set_of_a_sampler_is_not_one_unit() -> None:
    reward, matrix = RewardSampler(0.5), MatrixNormSampler(0.5)
    for sampler in (reward, matrix):
        sampler.start([10] * 8, total=80)
        assert [len(active) for active in sampler.largest_active_sets([3] * 8)] == [4]
    tight = MatrixNormSampler(10 / 16)
    tight.start([6, 5, 5], total=16)
    assert tight.largest_active_sets([6, 5, 5]) == [(0,), (1, 2)], "the largest first would leave no room"


def test_one_layer(make: Make, request) -> None:
    name = request.node.callspec.params["make"]
    sampler = make(0)
    if name == "grad_norm-effective":
        sampler.effective_layers = 1  # type: ignore[attr-defined]
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
    counts, p_value = first_draws(sampler)  # type: ignore[arg-type]
    assert p_value > 1e-3
    if kind != "uniform":
        assert chisquare(counts).pvalue < 1e-6, "the case must tell p from uniform"


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
