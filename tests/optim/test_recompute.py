"""Layers computed again in backward: the same bits as with everything kept, in any loop, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import make_batch, make_llama, recompute_layers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from grass_ray import GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.optim.recompute import Recompute

PROBING = 3


class Block(nn.Module):
    """A layer that knows of no checkpointing: dropout, and arguments by name alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, *, hidden: Tensor, scale: float) -> tuple[Tensor, float]:
        inner = functional.dropout(functional.gelu(self.up(self.norm(hidden))), 0.3, self.training)
        return hidden + scale * self.down(inner), scale


class Plain(nn.Module):
    """A model of nothing but torch's modules; ``wrapped`` calls its layers in checkpoints of its own."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Block(16) for _ in range(4))
        self.head = nn.Linear(16, 64)
        self.wrapped = wrapped

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(ids)
        for layer in self.layers:

            def call(hidden: Tensor, layer: nn.Module = layer) -> Tensor:
                output: Tensor = layer(hidden=hidden, scale=0.5)[0]
                return output

            hidden = checkpoint(call, hidden, use_reentrant=False) if self.wrapped else call(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def plain(**settings: Any) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(1)
    model = Plain(**settings)

    def loss(step: int) -> Tensor:
        ids = make_batch(step)
        return functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return model, loss


def llama(*, lora: bool = False, autocast: bool = False, **settings: Any) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(1)
    model: Any = make_llama()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "up_proj"]))

    def loss(step: int) -> Tensor:
        ids = make_batch(step)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value: Tensor = model(input_ids=ids, labels=ids, **settings).loss
        return value

    return model, loss


def llama_with_its_own(reentrant: bool) -> tuple[nn.Module, Callable[[int], Tensor]]:
    model, loss = llama()
    recompute_layers(model, reentrant=reentrant)
    if reentrant:  # inputs must require a gradient there
        model.enable_input_require_grads()
    return model, loss


MODELS: dict[str, Callable[[], tuple[Any, Callable[[int], Tensor]]]] = {
    "plain": plain,
    "plain, its own checkpoints": lambda: plain(wrapped=True),
    "llama": llama,
    "llama that fills a cache": lambda: llama(use_cache=True),
    "llama, bfloat16 autocast": lambda: llama(autocast=True),
    "llama, lora": lambda: llama(lora=True),
    "llama, its own checkpoints": lambda: llama_with_its_own(False),
    "llama, its own reentrant checkpoints": lambda: llama_with_its_own(True),
}


def train(name: str, *, micro_batches: int = 1, evaluating: bool = False) -> tuple[Any, Any, list[int]]:
    """Probe and train a while; the model, what was measured, and how often layer 1 began a forward in each step."""
    model, loss = MODELS[name]()
    model.train(not evaluating)
    sampler = GradNormSampler(2, 2, probing_steps=PROBING, refresh_period=4)
    optimizer = LayerwiseAdamW(model, sampler, lr=1e-3, offload="resident")
    begun = [0]
    first = next(optimizer.stack.modules[1].children())
    first.register_forward_pre_hook(lambda *_: begun.__setitem__(-1, begun[-1] + 1))
    torch.manual_seed(7)
    measured = []
    for step in range(PROBING + 6):
        for part in range(micro_batches):
            (loss(2 * step + part) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        measured.append((sampler.importance(), float(optimizer.grad_norm), optimizer.active_units))
        begun.append(0)
    return model, (measured, torch.get_rng_state().tolist()), begun[:-1]


def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recompute, "switch", lambda self, on: None)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_measured_and_trained_has_the_same_bits(
    name: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, measured, begun = train(name, micro_batches=micro_batches)
    keep_everything(monkeypatch)
    theirs, expected, kept = train(name, micro_batches=micro_batches)
    assert repr(measured) == repr(expected)  # NaN included
    for (parameter, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right), parameter
    if "its own" in name:  # what is computed again already is not computed a third time
        assert begun == kept
        assert begun[:PROBING] == [2 * micro_batches] * PROBING
    else:
        assert begun[:PROBING] == [2 * micro_batches] * PROBING
        assert begun[PROBING:] == kept[PROBING:] == [micro_batches] * 6
        assert kept[:PROBING] == [micro_batches] * PROBING


def test_without_dropout_a_model_may_stay_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, measured, begun = train("llama", evaluating=True)
    assert begun[:PROBING] == [2] * PROBING
    assert not ours.training
    keep_everything(monkeypatch)
    assert repr(measured) == repr(train("llama", evaluating=True)[1])


@pytest.mark.long
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_layers_are_computed_again_from_outside(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled() -> tuple[Any, Callable[[int], Tensor]]:
        torch._dynamo.reset()
        model, loss = llama(use_cache=False)
        for index, layer in enumerate(model.model.layers):
            if in_place:
                layer.compile(backend="aot_eager")
            else:
                model.model.layers[index] = torch.compile(layer, backend="aot_eager")
        return model, loss

    monkeypatch.setitem(MODELS, "compiled", compiled)
    _, measured, _ = train("compiled")
    keep_everything(monkeypatch)
    assert repr(measured) == repr(train("compiled")[1])


# --------------------------------------------------------------------------------------------------- nothing is left


def held(model: Any) -> list[Any]:
    return [vars(module).get("forward") for module in model.modules()]


def probing(model: Any) -> LayerwiseAdamW:
    return LayerwiseAdamW(model, GradNormSampler(2, 2, probing_steps=PROBING), lr=1e-3)


def step(optimizer: LayerwiseAdamW, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_layers_are_as_they_were_once_probing_is_over() -> None:
    model, loss = llama()
    given = model.model.layers[2].forward
    model.model.layers[2].forward = given  # somebody else's, which must come back
    before = held(model)
    optimizer = probing(model)
    for number in range(PROBING):
        assert held(model) != before
        step(optimizer, loss(number))
    assert held(model) == before
    assert vars(model.model.layers[2])["forward"] is given
    state = probing(llama()[0]).state_dict()
    optimizer.load_state_dict(state)  # back to the beginning
    assert held(model) != before
    for number in range(PROBING):
        step(optimizer, loss(number))
    assert held(model) == before


def test_layers_are_as_they_were_once_the_optimizer_is_gone() -> None:
    model, loss = llama()
    before = held(model)
    optimizer = probing(model)
    step(optimizer, loss(0))
    del optimizer
    gc.collect()
    assert held(model) == before


def test_a_second_optimizer_takes_over() -> None:
    model, loss = llama()
    before = held(model)
    first = probing(model)
    second = LayerwiseAdamW(model, UniformSampler(2, 2), lr=1e-3)
    assert held(model) == before
    third, fourth = probing(model), probing(model)
    assert third is not None
    for number in range(PROBING):
        step(fourth, loss(number))
    assert held(model) == before
    assert first.probing
    assert not second.probing


def test_an_optimizer_that_cannot_be_built_leaves_nothing() -> None:
    model, _ = llama()
    before = held(model)
    with pytest.raises(ValueError, match="num_active_layers"):
        LayerwiseAdamW(model, GradNormSampler(9, 2, probing_steps=PROBING))
    gc.collect()
    assert held(model) == before


def test_an_exception_in_a_forward_or_backward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(fail: bool) -> Any:
        model, loss = llama()
        optimizer = probing(model)
        mlp = model.model.layers[1].mlp
        for number in range(PROBING):
            for times in (1, 2) if fail else ():  # in the forward, and when backward computes it again
                left = [times]

                def stop(*_: Any, left: list[int] = left) -> None:
                    left[0] -= 1
                    if not left[0]:
                        raise KeyboardInterrupt

                handle = mlp.register_forward_pre_hook(stop)
                torch.manual_seed(number)
                with pytest.raises(KeyboardInterrupt):
                    loss(number).backward()
                handle.remove()
                optimizer.zero_grad()
            torch.manual_seed(number)
            step(optimizer, loss(number))
        assert all(forward is None for forward in held(model))
        return optimizer.sampler.importance()

    assert run(True) == run(False)


def test_copies_and_pickles_of_a_model_that_is_probed_are_plain_models() -> None:
    model, loss = llama()
    optimizer = probing(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        for layer in other.model.layers:
            assert layer.forward.__self__ is layer
    step(optimizer, loss(0))
    with torch.no_grad():
        for other in copies:
            other.model.layers[0].mlp.up_proj.weight.zero_()
            assert not torch.equal(other.eval()(make_batch(0)).logits, model.eval()(make_batch(0)).logits)


def test_a_model_is_freed_though_it_is_probed() -> None:
    model = llama()[0]
    layer = weakref.ref(model.model.layers[0])
    optimizer = probing(model)
    del model, optimizer
    gc.collect()
    assert layer() is None


# ---------------------------------------------------------------------------------------------------- what it stands on


def test_without_gradients_nothing_is_computed_twice_and_caches_are_filled() -> None:
    model, _ = llama()
    expected = model.eval().generate(make_batch(0), max_new_tokens=5, do_sample=False)
    optimizer = probing(model)
    assert torch.equal(model.generate(make_batch(0), max_new_tokens=5, do_sample=False), expected)
    assert optimizer.probing


def test_a_cache_that_goes_on_is_taken_as_it_was() -> None:
    """Two pieces of a text, the second one attending to the keys of the first."""

    def gradients(layers: int) -> list[Tensor]:
        model, _ = llama()
        model.eval()
        recompute = Recompute(model.model.layers[:layers])
        recompute.switch(True)
        cache = DynamicCache(config=model.config)
        first, second = make_batch(0), make_batch(1)
        losses = [model(ids, labels=ids, past_key_values=cache, use_cache=True).loss for ids in (first, second)]
        assert cache.get_seq_length() == 2 * first.shape[1]
        sum(losses).backward(retain_graph=True)
        sum(losses).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for left, right in zip(gradients(4), gradients(0), strict=True):
        assert torch.equal(left, right)


def test_only_the_layers_named_are_computed_again() -> None:
    model, loss = llama()
    model.train()
    begun = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: begun.__setitem__(index, begun[index] + 1))
    recompute = Recompute(model.model.layers[:2])
    recompute.switch(True)
    recompute.switch(True)
    loss(0).backward()
    assert begun == [2, 2, 1, 1]
    recompute.switch(False)
    recompute.switch(False)
    loss(0).backward()
    assert begun == [3, 3, 2, 2]
