"""Training under a loss scaler against the same training without one: bit for bit, since scales are powers of two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import make_batch, make_llama, make_optimizer
from torch import nn

from grass_ray import AllLayersSampler, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.layerwise.matrix_norm import MatrixNormSampler

STEPS = 14
SAMPLERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "grass": (lambda: GradNormSampler(2, 2, probing_steps=2, refresh_period=4, normalise="none"), {}),
    "without probing": (lambda: GradNormSampler(2, 2, probing_steps=0, refresh_period=4), {}),
    "misa": (lambda: MatrixNormSampler(0.2, 2, eta=20.0), {"granularity": "matrix"}),
    "uniform": (lambda: UniformSampler(2, 2), {}),
    "all": (AllLayersSampler, {"train_head": True}),
}


def train(
    name: str,
    *,
    scale: float | None = None,
    growth_interval: int = 10**6,
    unscale: bool = False,
    accumulation: int = 1,
    overflow_at: int | None = None,
    **settings: Any,
) -> tuple[nn.Module, LayerwiseAdamW, list[float]]:
    """Train for a few steps; the scale that each step's gradients had."""
    make, options = SAMPLERS[name]
    model = make_llama()
    optimizer = make_optimizer(model, make(), lr=1e-3, **options, **settings)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, growth_interval=growth_interval, enabled=scale is not None
    )
    scales = []
    for step in range(STEPS):
        for micro in range(accumulation):
            batch = make_batch(accumulation * step + micro)
            loss = model(input_ids=batch, labels=batch).loss / accumulation
            scaler.scale(loss * math.inf if step == overflow_at else loss).backward()
        scales.append(scaler.get_scale())
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, optimizer, scales


def assert_same(left: tuple[nn.Module, LayerwiseAdamW, Any], right: tuple[nn.Module, LayerwiseAdamW, Any]) -> None:
    for (name, a), b in zip(left[0].named_parameters(), right[0].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert str(left[1].sampler.state_dict()) == str(right[1].sampler.state_dict())
    assert left[1].active_units == right[1].active_units


@pytest.mark.parametrize(("name", "unscale"), list(itertools.product(SAMPLERS, [False, True])))
def test_scaled_training_is_unscaled_training(name: str, unscale: bool) -> None:
    """Also where the scale grows, and where the loop unscales and clips the gradients itself."""
    for accumulation in (1, 2) if name == "grass" else (1,):
        plain = train(name, unscale=unscale, accumulation=accumulation)
        scaled = train(name, scale=2.0**12, growth_interval=2, unscale=unscale, accumulation=accumulation)
        assert scaled[2][-1] > scaled[2][0]
        assert_same(plain, scaled)


@pytest.mark.parametrize(("name", "unscale", "step"), list(itertools.product(SAMPLERS, [False, True], [1, 5])))
def test_a_step_that_the_scaler_skips_is_not_measured(name: str, unscale: bool, step: int) -> None:
    """The clock goes on, weights, states and importance do not; the scale backs off, in probing as well."""
    scaled = train(name, scale=2.0**12, unscale=unscale, overflow_at=step)
    assert scaled[2][step + 1] == scaled[2][step] / 2
    assert scaled[2][-1] == scaled[2][step + 1]
    assert all(p.isfinite().all() for p in scaled[0].parameters())
    importance = scaled[1].sampler.importance()
    if importance is not None and "grass" in name:
        calm = train(name, unscale=unscale)[1].sampler.importance()
        assert importance == pytest.approx(calm, rel=0.2)
    if not unscale:  # clipping by an infinite norm leaves another trace in torch than not clipping
        assert_same(train(name, overflow_at=step), scaled)


@pytest.mark.parametrize("offload", ["none", "resident", "blocking", "overlap", "lazy"])
def test_every_mode_unscales(offload: Any) -> None:
    plain = train("grass", offload="none", max_grad_norm=0.05)
    scaled = train("grass", scale=2.0**14, growth_interval=3, offload=offload, max_grad_norm=0.05, chunk_bytes=65536)
    assert_same(plain, scaled)


def test_autocast_to_float16_under_accelerate() -> None:
    """Accelerate steps the scaler itself; importance stays that of a float32 run whatever the scale."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    found = {}
    for scale in (None, 2.0**10, 2.0**15):
        model = make_llama()
        optimizer = LayerwiseAdamW(model, GradNormSampler(2, 2, probing_steps=3, refresh_period=4), lr=1e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=4, enabled=scale is not None)
        wrapped = AcceleratedOptimizer(optimizer, scaler=scaler if scale else None)
        for step in range(10):
            batch = make_batch(step)
            with torch.autocast("cpu", dtype=torch.float16, enabled=scale is not None):
                loss = model(input_ids=batch, labels=batch).loss
            scaler.scale(loss).backward()
            wrapped.step()
            wrapped.zero_grad()
        found[scale] = optimizer.sampler.importance()
    for scale in (2.0**10, 2.0**15):
        assert found[scale] == pytest.approx(found[None], rel=0.05)


def test_the_witness_of_the_scale_is_no_part_of_the_state() -> None:
    optimizer = train("grass")[1]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict()
    assert sum(len(group["params"]) for group in saved["param_groups"]) == len(parameters) - 1
    assert max(i for group in saved["param_groups"] for i in group["params"]) == len(parameters) - 2
    other = LayerwiseAdamW(make_llama(), SAMPLERS["grass"][0](), lr=1e-3)
    other.load_state_dict(saved)
    assert str(other.sampler.state_dict()) == str(saved["layerwise"]["sampler"])


@pytest.mark.gpu
def test_gpu_trainer_in_float16(tmp_path: Any) -> None:
    """transformers' Trainer with fp16=True: Accelerate's scaler, unscaling and clipping, probing included."""
    from transformers import Trainer, TrainingArguments

    from grass_ray import hold_while_probing

    model = make_llama().cuda()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sampler = GradNormSampler(2, 2, probing_steps=3, refresh_period=4)
    optimizer = LayerwiseAdamW(model, sampler, lr=1e-3)
    schedule = hold_while_probing(torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), optimizer)
    rows = [{"input_ids": row, "labels": row} for step in range(12) for row in make_batch(step)]
    arguments = TrainingArguments(
        str(tmp_path), fp16=True, max_steps=12, per_device_train_batch_size=4, report_to=[], save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    changed = [name for name, p in model.named_parameters() if not torch.equal(before[name], p.detach())]
    assert changed
    assert all(p.isfinite().all() for p in model.parameters())
    importance = [value for value in sampler.importance() if not math.isnan(value)]
    assert len(importance) == 4
    assert max(importance) < 1, "importance is not in scaled units"
