"""Loops that train nothing, or another model than they think: said once, or refused, never silent."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import backward, make_batch, make_llama, make_optimizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from grass_ray import CyclicSampler, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.optim import host_store


def build(model: nn.Module, **settings: Any) -> LayerwiseAdamW:
    return make_optimizer(model, GradNormSampler(2, 2, probing_steps=2, refresh_period=4), lr=1e-3, **settings)


def train(model: Any, optimizer: LayerwiseAdamW, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


# ----------------------------------------------------------------------------------------------------------- said once


def zero_grad_first(model: Any, optimizer: LayerwiseAdamW, step: int) -> None:
    backward(model, step)
    optimizer.zero_grad()
    optimizer.step()


def another_model(model: Any, optimizer: LayerwiseAdamW, step: int) -> None:
    backward(make_llama(), step)
    optimizer.step()
    optimizer.zero_grad()


def no_backward(model: Any, optimizer: LayerwiseAdamW, step: int) -> None:
    optimizer.step()


@pytest.mark.parametrize("loop", [zero_grad_first, another_model, no_backward])
@pytest.mark.parametrize("probing_steps", [0, 2])
def test_a_step_without_any_gradient_says_so_and_does_nothing(
    loop: Callable[[Any, LayerwiseAdamW, int], None], probing_steps: int
) -> None:
    model = make_llama()
    before = weights(model)
    sampler = GradNormSampler(2, 2, probing_steps=probing_steps, refresh_period=4)
    optimizer = LayerwiseAdamW(model, sampler, lr=1e-3)
    clock = str(sampler.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(6):
            loop(model, optimizer, step)
    assert len([w for w in said if "no parameter has a gradient, so nothing was done" in str(w.message)]) == 1
    assert not changed(before, model)
    assert str(sampler.state_dict()) == clock
    assert float(optimizer.grad_norm) == 0


def test_gradients_that_are_all_zero_are_said() -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2), lr=1e-3)
    backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    with pytest.warns(UserWarning, match="all gradients of the first step are zero"):
        optimizer.step()


class Blocks(nn.Module):
    """A user's own model that calls torch's reentrant checkpoint around every layer."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embedding = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6))
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids)
        for layer in self.layers:
            h = h + checkpoint(layer, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("sampler", [lambda: UniformSampler(2, 2), lambda: GradNormSampler(2, 2, probing_steps=2)])
def test_layers_that_get_no_gradient_are_named(sampler: Callable[[], Any]) -> None:
    for reentrant in (True, False):
        model = Blocks(reentrant=reentrant)
        optimizer = make_optimizer(model, sampler(), lr=1e-2, train_head=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(6):
                ids = make_batch(step, vocabulary=32)
                nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
        ours = [str(w.message) for w in said if "got no gradient in a whole step" in str(w.message)]
        assert len(ours) == (1 if reentrant else 0)
        assert all("layer_0" in message and "use_reentrant=False" in message for message in ours)


def test_parameters_that_nobody_trains_are_said() -> None:
    """Thawed or added after the optimizer was built."""
    model = make_llama()
    optimizer = build(model)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"model.embed_tokens.weight require a gradient now, .* does not train them"):
        train(model, optimizer, range(1))


def test_an_ordinary_loop_says_nothing() -> None:
    model = make_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, build(model, offload="lazy", chunk_bytes=65536), range(10))


# ------------------------------------------------------------------------------------------------------------- refused


def test_adapters_put_on_afterwards_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = make_llama()
    optimizer = build(model)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    backward(wrapped, 0)
    with pytest.raises(RuntimeError, match=r"wrapped \(peft adapters\) or frozen after the optimizer was built"):
        optimizer.step()


@pytest.mark.parametrize("after", [0, 3])
def test_layers_frozen_afterwards_are_refused(after: int) -> None:
    model = make_llama()
    optimizer = build(model)
    train(model, optimizer, range(after))
    before = weights(model)
    for layer in model.model.layers:
        layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match="should train now, but their parameters no longer require a gradient"):
        optimizer.step()
    assert not changed(before, model)


def test_a_model_cast_afterwards_is_refused() -> None:
    model = make_llama()
    optimizer = build(model)
    train(model, optimizer, range(3))
    model.to(torch.bfloat16)
    backward(model, 3)
    with pytest.raises(RuntimeError, match=r"the model is torch.bfloat16 on cpu now, but was torch.float32 on cpu"):
        optimizer.step()


def test_parts_of_another_dtype_are_no_cast() -> None:
    """Embeddings in bfloat16 under layers in float32, each trained in its turn."""

    class Mixed(Blocks):
        def __init__(self) -> None:
            super().__init__(reentrant=False)
            self.embedding.to(torch.bfloat16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embedding(ids).float()
            for layer in self.layers:
                h = h + layer(h)
            return self.head(h)

    model = Mixed()
    before = weights(model)
    optimizer = make_optimizer(model, CyclicSampler(1, 1), lr=1e-2, granularity="block")
    for step in range(len(optimizer.units)):
        ids = make_batch(step, vocabulary=32)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert changed(before, model) == set(before)


def test_float16_weights_are_refused_and_frozen_ones_are_not() -> None:
    with pytest.raises(ValueError, match=r"parameters that should train are float16 .* bfloat16"):
        build(make_llama().half())
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_llama().half(), LoraConfig(task_type="CAUSAL_LM", r=4))
    assert {p.dtype for p in LayerwiseAdamW(adapted, UniformSampler(2, 2)).active_parameters()} == {torch.float32}


def test_parameter_groups_are_closed() -> None:
    optimizer = build(make_llama())
    with pytest.raises(ValueError, match="train other parameters with an optimizer of their own"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))]})


@pytest.mark.parametrize("copy_it", [copy.copy, copy.deepcopy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())])
def test_copies_are_refused(copy_it: Callable[[Any], Any]) -> None:
    model = make_llama()
    optimizer = build(model)
    train(model, optimizer, range(3))
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy_it(optimizer)
    train(model, optimizer, range(3, 5))


def test_a_switch_that_ran_out_of_memory_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2), lr=1e-3, offload="resident")
    train(model, optimizer, range(1))
    with monkeypatch.context() as patch:
        patch.setattr(host_store, "available_bytes", lambda: 0)
        with pytest.raises(MemoryError):
            train(model, optimizer, range(1, 2))
    with pytest.raises(RuntimeError, match="interrupted in the middle of its update or switch"):
        train(model, optimizer, range(2, 3))


def test_the_checkpoint_api_of_torch_is_refused_before_it_takes_a_step() -> None:
    """It would keep moments by name and drop the sampler; a fresh optimizer it would step once, with zeros."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict

    model = make_llama()
    for trained in (0, 4):
        optimizer = build(model)
        train(model, optimizer, range(trained))
        clock = str(optimizer.sampler.state_dict())
        for call in (get_optimizer_state_dict, get_state_dict):
            with pytest.raises(RuntimeError, match="would lose the sampler's state"):
                call(model, optimizer)
        assert str(optimizer.sampler.state_dict()) == clock
        optimizer.retire()
        model.requires_grad_(True)


# --------------------------------------------------------------------------------------------- the second on one model


def test_a_second_optimizer_starts_from_the_model_as_it_was_given() -> None:
    """A notebook cell run twice: trains as one built on a fresh model with these weights, embeddings frozen or not."""
    model = make_llama()
    model.model.layers[3].requires_grad_(False)
    first = build(model)
    train(model, first, range(5))
    fresh = make_llama()
    fresh.load_state_dict(model.state_dict())
    fresh.model.layers[3].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"an earlier LayerwiseAdamW froze \d+ parameters of this model"):
        second = build(model, train_embeddings=True)
    reference = build(fresh, train_embeddings=True)
    train(model, second, range(5, 12))
    train(fresh, reference, range(5, 12))
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(RuntimeError, match="another LayerwiseAdamW was built on this model after this one"):
        first.step()


def test_a_second_optimizer_after_the_first_is_gone() -> None:
    model = make_llama()
    first = build(model)
    train(model, first, range(5))
    del first
    gc.collect()
    with pytest.warns(UserWarning, match="an earlier LayerwiseAdamW froze"):
        second = build(model)
    train(model, second, range(4))
    assert len(second.active_layers) == 2


def test_a_refused_second_optimizer_leaves_the_first_as_it_was() -> None:
    model, other = make_llama(), make_llama()
    first, reference = build(model), build(other)
    train(model, first, range(3))
    with pytest.raises(ValueError, match="num_active_layers"):
        LayerwiseAdamW(model, UniformSampler(9, 2))
    train(model, first, range(3, 9))
    train(other, reference, range(9))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_sampler_serves_one_optimizer() -> None:
    sampler = GradNormSampler(2, 2, probing_steps=2, refresh_period=4)
    model, other = make_llama(), make_llama(seed=1)
    first = LayerwiseAdamW(model, sampler, lr=1e-3)
    train(model, first, range(5))
    second = LayerwiseAdamW(other, sampler, lr=1e-3)
    train(other, second, range(5))
    backward(model, 5)
    with pytest.raises(RuntimeError, match="the sampler was given to another optimizer after this one"):
        first.step()


def test_a_sampler_may_be_of_any_class() -> None:
    """One that compares by value has no hash, as a dataclass."""

    @dataclasses.dataclass
    class Own(UniformSampler):
        def __init__(self) -> None:
            super().__init__(2, 2)

    model = make_llama()
    train(model, LayerwiseAdamW(model, Own(), lr=1e-3), range(4))


@pytest.mark.parametrize("offload", ["none", "resident", "blocking", "overlap", "lazy"])
def test_deleting_the_optimizer_frees_its_memory_while_the_model_lives(offload: Any) -> None:
    model = make_llama()
    optimizer = build(model, offload=offload, chunk_bytes=65536)
    train(model, optimizer, range(5))
    gone = weakref.ref(optimizer)
    placement = weakref.ref(optimizer._placement)
    del optimizer
    gc.collect()
    assert gone() is None
    assert placement() is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    backward(model, 0)
    model.state_dict()


# ---------------------------------------------------------------------------------------------- states that do not fit


def test_a_state_that_does_not_fit_is_refused_before_anything_changes() -> None:
    saved = {}
    for name, model, sampler in (
        ("wider", make_llama(hidden=64), None),
        ("deeper", make_llama(layers=6), None),
        ("uniform", make_llama(), UniformSampler(2, 2)),
    ):
        optimizer = LayerwiseAdamW(model, sampler, lr=5e-3) if sampler else build(model)
        train(model, optimizer, range(5))
        saved[name] = optimizer.state_dict()
    model = make_llama()
    optimizer = build(model)
    train(model, optimizer, range(5))
    before = str(optimizer.state_dict())
    for name, message in (
        ("wider", r"has exp_avg \[64, 64\] .* this optimizer keeps exp_avg \[32, 32\]"),
        ("deeper", "the saved state has parameter groups of"),
        ("uniform", "sampler"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved[name])
        assert str(optimizer.state_dict()) == before
    model = make_llama().bfloat16()
    exact = build(model, precision="exact")
    train(model, exact, range(5))
    with pytest.raises(ValueError, match="give the model and the settings"):
        build(make_llama().bfloat16()).load_state_dict(exact.state_dict())


# -------------------------------------------------------------------------------------------------------------- proof


@pytest.mark.parametrize("offload", ["resident", "lazy"])
def test_the_optimizer_proves_what_changed(offload: Any) -> None:
    """In anybody's loop; a step that was called off for gradients that are not finite is no mistake."""
    model = make_llama()
    optimizer = make_optimizer(model, UniformSampler(1, 5), lr=1e-3, offload=offload, chunk_bytes=65536)
    proof = optimizer.prove()
    train(model, optimizer, range(8))
    for parameter in optimizer.active_parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    optimizer.synchronize()
    proof.check(last=True)
    assert proof.mistakes == []


@pytest.mark.parametrize(
    ("spoil", "mistake"),
    [
        (
            lambda m, o: o.units[1 - o.active_units[0]].parameters[0].data.add_(1),
            "while frozen",
        ),
        (lambda m, o: m.lm_head.weight.data.add_(1), "parameters outside the optimizer changed"),
    ],
)
def test_a_change_that_should_not_be_is_found(spoil: Callable[[Any, LayerwiseAdamW], Any], mistake: str) -> None:
    model = make_llama(layers=2)
    optimizer = LayerwiseAdamW(model, UniformSampler(1, 5), lr=1e-3)
    proof = optimizer.prove()
    train(model, optimizer, range(2))
    spoil(model, optimizer)
    proof.check(last=True)
    assert any(mistake in found for found in proof.mistakes)


def test_a_mistake_is_said_at_the_next_switch() -> None:
    model = make_llama(layers=2)
    optimizer = LayerwiseAdamW(model, UniformSampler(1, 5), lr=1e-3)
    optimizer.prove()
    train(model, optimizer, range(2))
    (frozen,) = {0, 1} - set(optimizer.active_units)
    optimizer.units[frozen].parameters[0].data.add_(1)
    with pytest.warns(UserWarning, match=f"not exactly the active units have changed: layer_0{frozen} changed"):
        train(model, optimizer, range(2, 6))


def test_parameters_outside_the_language_model_are_named_when_they_are_frozen() -> None:
    class WithVision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = make_llama()
            self.vision = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})

    model = WithVision()
    with pytest.warns(UserWarning, match=r"vision.blocks.0.weight, .* require a gradient but are outside"):
        LayerwiseAdamW(model, UniformSampler(2, 2))
    assert not any(p.requires_grad for p in model.vision.parameters())


@pytest.mark.parametrize("offload", ["none", "resident", "lazy"])
def test_copies_of_the_model_have_nothing_to_do_with_its_optimizer(offload: Any) -> None:
    """Deep copies (averages of weights, references of DPO) and pickled models."""
    model = make_llama()
    optimizer = build(model, offload=offload, chunk_bytes=65536)
    train(model, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        backward(other, 0)
        other.state_dict()
        other.requires_grad_(True)
        train(other, build(other), range(4))
    train(model, optimizer, range(5, 8))
