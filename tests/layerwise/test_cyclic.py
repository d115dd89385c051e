"""LIFT, HiFT and BAdam's order of layers: every group in turn, by hand; and HiFT's blocks and learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from small import backward, make_llama, make_optimizer, short_run

from grass_ray import CyclicSampler
from grass_ray.layerwise.schedules import Step
from grass_ray.training.run import Run

NOTHING = torch.full((4,), math.nan)


def visits(sampler: CyclicSampler, units: int, steps: int) -> list[tuple[int, ...]]:
    """The active group of every step."""
    sampler.start([1] * units)
    groups: list[tuple[int, ...]] = []
    for _ in range(steps):
        groups.append(sampler.sample() if sampler.due else groups[-1])
        sampler.observe(NOTHING)
    return groups


def test_ascending_from_the_input_to_the_output_and_again() -> None:
    assert visits(CyclicSampler(1, 2), 3, 8) == [(0,), (0,), (1,), (1,), (2,), (2,), (0,), (0,)]


def test_descending() -> None:
    assert visits(CyclicSampler(1, 1, order="descending"), 3, 4) == [(2,), (1,), (0,), (2,)]


@pytest.mark.parametrize(
    ("order", "groups"),
    [
        ("ascending", [(0, 1), (2, 3), (4,), (0, 1)]),
        ("descending", [(4,), (2, 3), (0, 1), (4,)]),
    ],
)
def test_the_last_group_is_what_is_left(order: str, groups: list[tuple[int, ...]]) -> None:
    assert visits(CyclicSampler(2, 1, order=order), 5, 4) == groups  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_random_orders_visit_every_group_in_every_cycle(order: str) -> None:
    """random reshuffles for every cycle (a layer may follow itself there), shuffled keeps its first order."""
    seen = visits(CyclicSampler(1, 1, order=order, seed=3), 5, 50)  # type: ignore[arg-type]
    cycles = [tuple(seen[start : start + 5]) for start in range(0, 50, 5)]
    assert all(sorted(cycle) == [(unit,) for unit in range(5)] for cycle in cycles)
    assert (len(set(cycles)) > 5) == (order == "random")
    assert (len(set(cycles)) == 1) == (order == "shuffled")
    others = [visits(CyclicSampler(1, 1, order=order, seed=seed), 5, 5) for seed in range(8)]  # type: ignore[arg-type]
    assert len({tuple(other) for other in others}) > 4


def test_one_pass_over_the_training() -> None:
    sampler = CyclicSampler(1, None, training_steps=12)
    assert visits(sampler, 4, 12) == [(unit,) for unit in range(4) for _ in range(3)]
    assert sampler.cycle_steps == 12
    pairs = CyclicSampler(2, None, training_steps=9)
    assert visits(pairs, 5, 9) == [(0, 1)] * 3 + [(2, 3)] * 3 + [(4,)] * 3


def test_a_pass_longer_than_the_training_gives_every_group_one_step() -> None:
    assert visits(CyclicSampler(1, None, training_steps=3), 5, 3) == [(0,), (1,), (2,)]


def test_a_period_that_changes() -> None:
    """BAdam's public code trains its first block one step less than the others."""
    sampler = CyclicSampler(1, Step([2, 3], [0.01], steps=10))
    assert visits(sampler, 3, 9) == [(0,)] * 2 + [(1,)] * 3 + [(2,)] * 3 + [(0,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": None}, "period is None; it must be a number of steps, or training_steps must be given"),
        ({"order": "sideways"}, "order is 'sideways'; it must be one of ascending, descending, random, shuffled"),
        ({"num_active_layers": 0}, "num_active_layers is 0"),
        ({"period": 0}, "period is 0"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CyclicSampler(**settings)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- HiFT


@pytest.mark.parametrize("tied", [False, True])
def test_hift_visits_embeddings_layers_norm_and_head(tied: bool) -> None:
    """Exactly one of them changes at every step; a tied head trains with the embeddings and has no turn of its own."""
    model = make_llama(layers=2, tied=tied)
    optimizer = make_optimizer(model, CyclicSampler(1, 1), lr=1e-3, granularity="block")
    order = ["model.embed_tokens.", "model.layers.0.", "model.layers.1.", "model.norm."]
    order += [] if tied else ["lm_head."]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2 * len(order)):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        now = dict(model.named_parameters())
        changed = {name for name, p in now.items() if not torch.equal(before[name], p)}
        prefix = order[step % len(order)]
        assert changed == {name for name in now if name.startswith(prefix)}, step
        before = {name: p.detach().clone() for name, p in now.items()}


def hift_rates(*overrides: str, steps: int) -> tuple[list[float], int]:
    """The learning rate of every step, and the steps of a sweep over the blocks."""
    run = Run.prepare(
        short_run("hift", "training.lr_schedule=linear", "method.optimizer.lr=1.0", *overrides, steps=steps)
    )
    state = run.state
    rates = []
    for _ in range(steps):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        state.schedule.step()
    return rates, state.optimizer.sampler.cycle_steps  # type: ignore[attr-defined]


def test_hift_holds_the_learning_rate_within_a_sweep() -> None:
    """A linear decay seen at the first step of each sweep only."""
    rates, sweep = hift_rates(steps=20)
    run = Run.prepare(short_run("hift"))
    assert sweep == len(run.state.optimizer.units) < 10
    assert rates == pytest.approx([1 - (step - step % sweep) / 20 for step in range(20)])
    assert len(set(rates)) > 1
    free, _ = hift_rates("method.sampler.hold_lr=false", steps=20)
    assert free == pytest.approx([1 - step / 20 for step in range(20)])


def test_hift_trains_during_the_warm_up() -> None:
    """A sweep held at the first rate of a warm-up, zero, would pass over all blocks without moving one."""
    rates, _ = hift_rates("training.warmup_steps=3", steps=20)
    assert all(rate > 0 for rate in rates[1:])
