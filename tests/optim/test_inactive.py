"""Small updates of inactive layers in backward (BREAD) against a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import backward, make_batch, make_llama, make_optimizer

from grass_ray.layerwise.cyclic import CyclicSampler
from grass_ray.layerwise.fixed import FixedSampler
from grass_ray.optim.inactive import InactiveSGD

RESET: dict[str, Any] = {"inactive_states": "reset", "lr": 1e-2}


@pytest.mark.parametrize("layers", ["all", "above"])
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_adamw_on_one_layer_and_sgd_on_the_others(layers: Any, sign: bool, clip: float | None) -> None:
    ours, theirs = make_llama(), make_llama()
    updates = InactiveSGD(lr_scale=3.0, sign=sign, layers=layers)
    optimizer = make_optimizer(
        ours, FixedSampler([1]), inactive_updates=updates, weight_decay=0.1, max_grad_norm=clip, **RESET
    )
    active = list(theirs.model.layers[1].parameters())
    matrices, vectors = [p for p in active if p.ndim > 1], [p for p in active if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)
    corrected = [layer for layer in range(4) if layer != 1 and (layers == "all" or layer > 1)]
    for step in range(6):
        for part in range(2):
            backward(ours, 10 * step + part)
            backward(theirs, 10 * step + part)
            with torch.no_grad():
                for parameter in (p for layer in corrected for p in theirs.model.layers[layer].parameters()):
                    assert parameter.grad is not None
                    parameter.add_(parameter.grad.sign() if sign else parameter.grad, alpha=-1e-2 * 3.0)
                    parameter.grad = None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(active, clip)
        optimizer.step()
        adamw.step()
        optimizer.zero_grad()
        theirs.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name
    before = make_llama()
    for (name, mine), first in zip(ours.named_parameters(), before.parameters(), strict=True):
        moved = name.split(".")[2:3] and name.split(".")[2] in map(str, [1, *corrected])
        assert torch.equal(mine, first) is not moved, name


@pytest.mark.parametrize("inside", [False, True])
def test_nothing_of_inactive_layers_is_kept_and_the_proof_knows(inside: bool) -> None:
    model = make_llama()
    optimizer = make_optimizer(
        model,
        CyclicSampler(1, 3, order="random", seed=1),
        inactive_updates=InactiveSGD(),
        update_in_backward=inside,
        **RESET,
    )
    proof = optimizer.prove()
    visited = set()
    for step in range(20):
        visited.add(optimizer.active_units)
        optimizer.last_micro_batch = True
        backward(model, step)
        kept = {p for p in model.parameters() if p.grad is not None}
        assert kept == (set() if inside else set(optimizer.active_parameters()))
        optimizer.step()
        optimizer.zero_grad()
    assert len(visited) == 4
    held = [p for p, state in optimizer.state.items() if state]
    assert len(held) <= len(optimizer.active_parameters())
    proof.check(last=True)
    assert not proof.mistakes
    proof = optimizer.prove()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    proof.check(last=True)
    assert proof.mistakes == ["parameters outside the optimizer changed"]


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = make_llama()
    optimizer = make_optimizer(model, FixedSampler([1]), inactive_updates=InactiveSGD(), **RESET)
    before = copy.deepcopy(model.state_dict())
    model.model.layers[3].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    backward(model, 0)
    optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["model.layers.3.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"])
    assert all(weight.isfinite().all() for weight in after.values())
    assert not torch.equal(before["model.layers.3.mlp.down_proj.weight"], after["model.layers.3.mlp.down_proj.weight"])


def test_a_backward_that_is_thrown_away_stays_interrupted() -> None:
    """Inactive layers have moved already."""
    model = make_llama()
    optimizer = make_optimizer(model, FixedSampler([1]), inactive_updates=InactiveSGD(), **RESET)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    backward(model, 0)
    optimizer.zero_grad()
    for action in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="interrupted"):
            action()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    backward(model, 0)
    optimizer.step()


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"inactive_states": "keep"}, {"inactive_states": "reset", "weights": "streamed"}):
        with pytest.raises(ValueError, match="inactive_states='reset' and weights='resident'"):
            make_optimizer(make_llama(), FixedSampler([1]), inactive_updates=InactiveSGD(), **settings)
    with pytest.raises(ValueError, match="lr_scale is 0; it must be above 0"):
        InactiveSGD(lr_scale=0)
    with pytest.raises(ValueError, match="layers is 'below'; available: all, above"):
        InactiveSGD(layers="below")  # type: ignore[arg-type]
    model = make_llama()
    optimizer = make_optimizer(model, FixedSampler([1]), inactive_updates=InactiveSGD(), **RESET)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=make_batch(0), labels=make_batch(0)).loss).backward()
    with pytest.raises(RuntimeError, match="loss scaler"):
        scaler.step(optimizer)
