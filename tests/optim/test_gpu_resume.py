"""Stopped at any step, saved, loaded and gone on with: the same bits, for every sampler, offload mode and device.

On a CPU nothing can lie on the wrong device, so the samplers' own tests let the meta device stand for another one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from small import make_batch, make_llama, make_optimizer
from torch import nn

from grass_ray import (
    AllLayersSampler,
    CyclicSampler,
    GradNormSampler,
    LayerwiseAdamW,
    MatrixNormSampler,
    OutlierSampler,
    RewardSampler,
    UniformSampler,
)
from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.placement import largest_active_bytes

CHUNK = 64 * 1024
STEPS = 14
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "all": AllLayersSampler,
    "uniform": lambda: UniformSampler(2, 3),
    "grad_norm": lambda: GradNormSampler(2, 2, probing_steps=3, refresh_period=4),
    "grad_norm-unprobed": lambda: GradNormSampler(1, 2, probing_steps=0, refresh_period=3),
    "grad_norm-static": lambda: GradNormSampler(2, 3, probing_steps=3, refresh_period=None),
    "grad_norm-fresh": lambda: GradNormSampler(
        2, 2, probing_steps=3, refresh_period=4, staleness="level", exploration=0.05, effective_layers=3
    ),
    "outlier": lambda: OutlierSampler([1.0, 2.0, 3.0, 0.5], 2, 3),
    "outlier-measured": lambda: OutlierSampler(None, 2, 3),
    "cyclic": lambda: CyclicSampler(1, 2, order="random"),
    "reward": lambda: RewardSampler(0.5, 2, refresh_period=3),
    "matrix_norm": lambda: MatrixNormSampler(0.2, 3, eta=50.0),
}
MODES = ("none", "resident", "blocking", "overlap", "lazy")


class Passes:
    """Made-up extra measurements: they depend on the step and on what is asked alone."""

    def __init__(self, step: int) -> None:
        self._step = step

    def loss(self, scales: Mapping[int, float]) -> float:
        return 1.0 + 0.1 * sum(unit * (1 - scale) for unit, scale in scales.items()) / (1 + self._step)

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        return (1.0, 2.0, 3.0, 4.0)


def build(kind: str, offload: Any, device: str) -> tuple[nn.Module, LayerwiseAdamW]:
    model = make_llama(hidden=72, vocabulary=61).to(device)
    granularity: Any = "matrix" if kind == "matrix_norm" else "layer"
    return model, make_optimizer(
        model,
        SAMPLERS[kind](),
        lr=1e-3,
        max_grad_norm=1.0,
        offload=offload,
        granularity=granularity,
        chunk_bytes=CHUNK,
        ring_slots=2,
    )


def largest_bytes(optimizer: LayerwiseAdamW) -> int:
    states = optimizer._placement._states
    return largest_active_bytes(optimizer.sampler, [states.unit_bytes(unit) for unit in optimizer.units])


def train(model: nn.Module, optimizer: LayerwiseAdamW, step: int, device: str) -> None:
    optimizer.probe(Passes(step))
    batch = make_batch(step, vocabulary=61).to(device)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def said(optimizer: LayerwiseAdamW) -> str:
    """The sampler's state and what it says, as text, so that NaN equals NaN."""
    sampler = optimizer.sampler
    return repr([sampler.state_dict(), sampler.probabilities(), sampler.importance(), sampler.ages()])


def stopped_and_gone_on(kind: str, offload: str, device: str, stops: range | tuple[int, ...]) -> None:
    model, optimizer = build(kind, offload, device)
    files: dict[int, bytes] = {}
    for step in range(STEPS):
        if step in stops:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            files[step] = file.getvalue()
        train(model, optimizer, step, device)
    optimizer.synchronize()
    assert files
    for stop, saved in files.items():
        for place in ("cpu", None):
            state = torch.load(io.BytesIO(saved), weights_only=True, map_location=place)
            resumed, other = build(kind, offload, device)
            resumed.load_state_dict(state["model"])
            other.load_state_dict(state["optimizer"])
            for step in range(stop, STEPS):
                train(resumed, other, step, device)
            other.synchronize()
            for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
                assert torch.equal(a, b), f"{name}, stopped after step {stop}, loaded to {place}"
            assert said(other) == said(optimizer), f"stopped after step {stop}, loaded to {place}"


@pytest.mark.parametrize("kind", SAMPLERS)
def test_in_the_middle_of_a_window(kind: str) -> None:
    stopped_and_gone_on(kind, "lazy", "cpu", (2, 9))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_largest_active_set_is_what_a_memory_plan_counts(kind: str) -> None:
    """In bytes of states: two float32 moments a parameter; no set that was ever drawn is larger."""
    model, optimizer = build(kind, "none", "cpu")
    most = 0
    for step in range(STEPS):
        train(model, optimizer, step, "cpu")
        if not optimizer.probing:
            most = max(most, 8 * sum(p.numel() for p in optimizer.active_parameters()))
    assert most <= largest_bytes(optimizer) < 1.2 * most


@pytest.mark.gpu
@pytest.mark.parametrize("offload", MODES)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_gpu_at_every_step(kind: str, offload: str) -> None:
    """While probing, at its end, at draws and refreshes, and between them."""
    stopped_and_gone_on(kind, offload, "cuda", range(STEPS))


@pytest.mark.gpu
@pytest.mark.parametrize(("saved_on", "resumed_on"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_gpu_states_move_between_devices(kind: str, saved_on: str, resumed_on: str) -> None:
    """Other kernels give other bits, so only that training goes on, and that what was saved is what is held."""
    model, optimizer = build(kind, "resident", saved_on)
    for step in range(9):
        train(model, optimizer, step, saved_on)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location=resumed_on)
    resumed, other = build(kind, "resident", resumed_on)
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert said(other) == said(optimizer)
    for step in range(9, 30):
        train(resumed, other, step, resumed_on)
    assert all(bool(p.isfinite().all()) for p in resumed.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sampler",
    [GradNormSampler(2, 1, probing_steps=2, refresh_period=100), MatrixNormSampler(0.5)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_gpu_observing_never_makes_the_host_wait(sampler: Any) -> None:
    """While a window stays open, resumed or not."""
    sampler.start([100] * 6)
    norms = torch.rand(6, device="cuda")
    for _ in range(6):
        if sampler.due:
            sampler.sample()
        sampler.observe(norms)
    sampler.load_state_dict(sampler.state_dict())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            sampler.observe(norms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(map(math.isnan, sampler.importance()[:1]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SAMPLERS)
def test_gpu_auto_sizes_the_largest_active_set(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident where the states of the largest set fit into a quarter of the free memory, else streamed."""
    _, optimizer = build(kind, "none", "cuda")
    wanted = largest_bytes(optimizer)
    for free, expected in ((4 * wanted, "resident"), (4 * wanted - 4, "lazy")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert build(kind, "auto", "cuda")[1].offload == expected
