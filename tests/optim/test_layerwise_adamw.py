"""LayerwiseAdamW against torch.optim.AdamW and against plain per-layer references, bit for bit."""

from __future__ import annotations

import gc
import io
import itertools
import weakref
from typing import Any

import pytest
import torch
from small import backward, make_batch, make_llama, make_optimizer, recompute_layers
from torch import nn

from grass_ray import AllLayersSampler, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.optim.chunks import SMALLEST_CHUNK_BYTES, cut, total_bytes
from grass_ray.optim.kernels import state_layout

EVERYTHING = {"train_embeddings": True, "train_head": True, "train_norm": True}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def torch_adamw(parameters: list[nn.Parameter], *, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], fused=True, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize("tied", [False, True])
def test_all_layers_is_torchs_adamw_bitwise(tied: bool) -> None:
    """A tied embedding is one tensor, trained once."""
    ours, theirs = make_llama(tied=tied), make_llama(tied=tied)
    train(ours, make_optimizer(ours, AllLayersSampler(), lr=1e-3, weight_decay=0.1, **EVERYTHING), range(12))
    train(theirs, torch_adamw(list(theirs.parameters()), lr=1e-3, weight_decay=0.1), range(12))
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("offload", ["none", "resident", "auto"])
def test_gamma_equal_to_the_number_of_layers_is_full_fine_tuning_of_the_layers(offload: str) -> None:
    ours, theirs = make_llama(), make_llama()
    sampler = GradNormSampler(4, 3, probing_steps=0, refresh_period=5)
    train(ours, LayerwiseAdamW(ours, sampler, lr=1e-3, offload=offload), range(15))
    layers = [p for layer in find_decoder_stack(theirs).layers for p in layer]
    for parameter in set(theirs.parameters()) - set(layers):
        parameter.requires_grad_(False)
    train(theirs, torch_adamw(layers, lr=1e-3), range(15))
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("period", [1, 3, 10])
@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize(
    ("offload", "inactive_states"), [("none", "keep"), ("resident", "keep"), ("resident", "reset")]
)
def test_every_layer_follows_its_own_adamw(period: int, gamma: int, offload: str, inactive_states: str) -> None:
    """A plain reference: one torch AdamW a layer, kept or made anew at a visit, stepped while its layer is active."""
    ours, theirs = make_llama(), make_llama()
    optimizer = make_optimizer(
        ours,
        UniformSampler(gamma, period, seed=1),
        lr=1e-3,
        weight_decay=0.1,
        offload=offload,
        inactive_states=inactive_states,
    )
    layers = find_decoder_stack(theirs).layers
    references: dict[int, torch.optim.AdamW] = {}
    previous: tuple[int, ...] = ()
    for step in range(30):
        active = optimizer.active_layers
        for index in range(4):
            if inactive_states == "reset" and index not in active:
                references.pop(index, None)
            elif index in active and index not in references:
                references[index] = torch_adamw(list(layers[index]), lr=1e-3, weight_decay=0.1)
        previous = active
        train(ours, optimizer, range(step, step + 1))
        backward(theirs, step)
        for index in previous:
            references[index].step()
        theirs.zero_grad()
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(("gamma", "period"), [(1, 1), (2, 3), (2, 10), (4, 3)])
def test_exactly_the_active_layers_change_and_frozen_ones_hold_no_gradient(gamma: int, period: int) -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, GradNormSampler(gamma, period, probing_steps=2, refresh_period=4), lr=1e-3)
    layers = optimizer.stack.layers
    for step in range(32):
        before = weights(model)
        active = () if optimizer.probing else optimizer.active_layers
        backward(model, step)
        optimizer.step()
        for index, layer in enumerate(layers):
            if index not in optimizer.active_layers:
                assert all(p.grad is None and not p.requires_grad for p in layer)
        optimizer.zero_grad()
        after = weights(model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        expected = {name for name in before if any(name.startswith(f"model.layers.{index}.") for index in active)}
        assert changed == expected


def test_probing_updates_nothing_and_holds_no_gradients() -> None:
    model = make_llama()
    optimizer = make_optimizer(model, GradNormSampler(2, 5, probing_steps=3), lr=1e-3, **EVERYTHING)
    before = weights(model)
    held: list[int] = []
    for layer in optimizer.stack.layers:
        for parameter in layer:
            parameter.register_post_accumulate_grad_hook(
                lambda _: held.append(sum(p.grad is not None for p in model.parameters()))
            )
    for step in range(3):
        assert optimizer.probing
        backward(model, step)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.probing
    assert max(held) <= 1, "a gradient is measured and dropped the moment it is ready"
    assert not optimizer.state
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert len(optimizer.active_layers) == 2


def test_static_is_grass_whose_refresh_never_comes() -> None:
    static, late = make_llama(), make_llama()
    for model, refresh in ((static, None), (late, 10_000)):
        sampler = GradNormSampler(2, 3, probing_steps=2, refresh_period=refresh)
        train(model, LayerwiseAdamW(model, sampler, lr=1e-3), range(24))
    assert_same_weights(static, late)


def test_states_on_the_device_never_exceed_gamma_layers() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2), lr=1e-3, offload="resident")
    per_layer = 2 * 4 * sum(p.numel() for p in optimizer.stack.layers[0])
    layout = state_layout(torch.float32, "rem16")
    blocks = total_bytes(cut("layer", list(optimizer.stack.layers[0]), layout))
    assert per_layer <= blocks < per_layer + 2 * SMALLEST_CHUNK_BYTES
    visited: set[int] = set()
    for step in range(40):
        visited |= set(optimizer.active_layers)
        train(model, optimizer, range(step, step + 1))
        resident, host = optimizer.state_bytes()
        assert resident <= 2 * per_layer
        assert host <= len(visited) * blocks
    assert visited == {0, 1, 2, 3}
    assert host == 4 * blocks

    reset = make_optimizer(make_llama(), UniformSampler(2, 2), lr=1e-3, inactive_states="reset", offload="none")
    kept = make_llama()
    keeping = LayerwiseAdamW(kept, UniformSampler(2, 2), lr=1e-3, offload="none")
    train(kept, keeping, range(40))
    assert keeping.state_bytes() == (4 * per_layer, 0), "the published behaviour: grows to full AdamW"
    assert reset.state_bytes() == (0, 0)


def test_clipping_is_torchs() -> None:
    ours, theirs = make_llama(), make_llama()
    train(ours, make_optimizer(ours, AllLayersSampler(), lr=1e-3, max_grad_norm=0.05, **EVERYTHING), range(8))
    reference = torch_adamw(list(theirs.parameters()), lr=1e-3)
    for step in range(8):
        backward(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert norm > 0.05
        reference.step()
        reference.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)


def test_gradients_left_as_zeros_do_not_move_frozen_layers() -> None:
    """zero_grad(set_to_none=False) leaves zeros; momentum and decay must not act on frozen layers through them."""
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(1, 2, seed=4), lr=1e-2, weight_decay=0.5)
    for step in range(12):
        active = optimizer.active_layers
        before = weights(model)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for name, p in model.named_parameters():
            moved = any(name.startswith(f"model.layers.{index}.") for index in active)
            assert torch.equal(before[name], p) != moved, name


@pytest.mark.parametrize("offload", ["none", "resident"])
@pytest.mark.parametrize("inactive_states", ["keep", "reset"])
def test_resume_is_bitwise_at_every_step(offload: str, inactive_states: str) -> None:
    """Through probing, sampling and refresh; the state loads with weights_only=True."""

    def build() -> tuple[nn.Module, LayerwiseAdamW]:
        model = make_llama()
        sampler = GradNormSampler(2, 3, probing_steps=3, refresh_period=4, seed=5)
        return model, make_optimizer(
            model, sampler, lr=1e-3, offload=offload, inactive_states=inactive_states, train_norm=True
        )

    whole, optimizer = build()
    snapshots = []
    for step in range(16):
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        snapshots.append((weights(whole), buffer.getvalue()))
        train(whole, optimizer, range(step, step + 1))
    for step, (saved_weights, saved_state) in enumerate(snapshots):
        resumed, other = build()
        resumed.load_state_dict(saved_weights)
        other.load_state_dict(torch.load(io.BytesIO(saved_state), weights_only=True))
        train(resumed, other, range(step, 16))
        assert_same_weights(whole, resumed)
        assert other.sampler.state_dict() == optimizer.sampler.state_dict()
        assert other.active_layers == optimizer.active_layers
        assert other.state_bytes()[0] == optimizer.state_bytes()[0]


def test_state_of_another_optimizer_is_refused() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2))
    with pytest.raises(ValueError, match="not saved by LayerwiseAdamW"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    other = LayerwiseAdamW(make_llama(layers=6), UniformSampler(2, 2))
    with pytest.raises(ValueError, match=r"parameter groups of \[42, 12\], this optimizer of \[28, 8\]"):
        optimizer.load_state_dict(other.state_dict())


def test_learning_rate_schedules_of_torch_apply_to_every_group() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2 / 8}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_stops_at_the_lowest_active_layer(checkpointing: bool) -> None:
    """Nothing below the lowest active layer takes part in autograd when the embeddings are frozen."""
    model = make_llama()
    model.train()
    if checkpointing:
        recompute_layers(model)
        model.disable_input_require_grads()
    optimizer = LayerwiseAdamW(model, UniformSampler(1, 1, seed=2))
    needed: dict[int, bool] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, index=index: needed.__setitem__(
                index, (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    for step in range(6):
        active = optimizer.active_layers[0]
        backward(model, step)
        assert needed == {index: index >= active for index in range(4)}
        assert all(p.grad is not None for p in optimizer.stack.layers[active])
        optimizer.step()
        optimizer.zero_grad()


def test_closure() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2), lr=1e-3)

    def closure() -> float:
        optimizer.zero_grad()
        return backward(model, 0)

    assert optimizer.step(closure) > optimizer.step(closure)  # type: ignore[call-overload]


def test_parameters_frozen_beforehand_stay_frozen() -> None:
    model = make_llama()
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(False)
    before = weights(model)
    train(model, LayerwiseAdamW(model, GradNormSampler(2, 2, probing_steps=1), lr=1e-3), range(8))
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed
    assert not [name for name in changed if "self_attn" in name]

    frozen = make_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 4 layers has a parameter that requires a gradient"):
        LayerwiseAdamW(frozen, UniformSampler(2, 2))


def test_a_sampler_draws_among_the_layers_that_were_not_frozen() -> None:
    """Freezing layers beforehand names the ones to sample from; indices of layers stay those of the model."""
    model = make_llama(layers=6)
    for index in (0, 1, 4):
        model.model.layers[index].requires_grad_(False)
    before = weights(model)
    optimizer = LayerwiseAdamW(model, GradNormSampler(2, 1, probing_steps=2, refresh_period=4), lr=1e-3)
    seen = set()
    for step in range(14):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        seen |= set(optimizer.active_layers)
    assert seen == {2, 3, 5}
    changed = {name.split(".")[2] for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"2", "3", "5"}
    with pytest.raises(ValueError, match="num_active_layers"):
        LayerwiseAdamW(model, UniformSampler(4, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"offload": "disk"}, "offload is 'disk'; available: none, resident, blocking, overlap, lazy, auto"),
        ({"inactive_states": "drop"}, "inactive_states is 'drop'; available: keep, reset"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(make_llama(), UniformSampler(2, 2), **settings)  # type: ignore[arg-type]


def test_learns() -> None:
    """Two of four layers and frozen embeddings still fit one batch."""
    model = make_llama()
    optimizer = LayerwiseAdamW(model, GradNormSampler(2, 5, probing_steps=2, refresh_period=10), lr=1e-2)
    batch = make_batch(0)
    losses = []
    for _ in itertools.repeat(None, 60):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("offload", ["none", "resident", "overlap", "lazy"])
def test_model_and_optimizer_are_freed_together(offload: Any) -> None:
    """Many runs in one process: what a hook holds must not keep the last run's model alive."""
    model = make_llama()
    optimizer = make_optimizer(
        model, GradNormSampler(2, 2, probing_steps=1, refresh_period=4), lr=1e-3, offload=offload, chunk_bytes=65536
    )
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    watched = [weakref.ref(optimizer), *(weakref.ref(parameter) for parameter in model.parameters())]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)


def test_what_is_no_sampler_is_told_what_it_lacks():
    class Own:
        due = probing = False

    with pytest.raises(TypeError, match=r"Own is no sampler: it lacks .*largest_active_sets.*; derive it from"):
        LayerwiseAdamW(make_llama(), Own())


def test_a_state_from_after_probing_ends_it() -> None:
    """A backward that the loop takes back is not measured, in the first step after loading as in any other."""
    trained = make_llama()
    saved = LayerwiseAdamW(trained, GradNormSampler(2, 10, probing_steps=1, seed=1), lr=1e-3)
    train(trained, saved, range(3))
    weights, state = trained.state_dict(), saved.state_dict()
    found = []
    for taken_back in (False, True):
        model = make_llama()
        optimizer = LayerwiseAdamW(model, GradNormSampler(2, 10, probing_steps=1, seed=1), lr=1e-3)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        if taken_back:
            backward(model, 99)
            model.zero_grad()
        train(model, optimizer, range(3, 4))
        found.append(optimizer.sampler.state_dict())
    assert repr(found[0]) == repr(found[1])
