"""A step that is followed through a few of a model's equal layers takes, to the byte, what it takes through all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grass_ray.config import LoraConfig, PrefixConfig, PromptConfig
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.memory import known_shapes, step
from grass_ray.memory.equal_layers import equal_runs
from grass_ray.memory.step import SteppedModel, StepShape, profile_step
from grass_ray.training.adapters import add_adapter

LAYERS = 11
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = StepShape(rows=2, tokens=24)


def make(family: str = "llama", **settings: Any) -> nn.Module:
    config = AutoConfig.for_model(family, vocab_size=300, num_hidden_layers=LAYERS, **(SIZES | settings))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def train(model: nn.Module, layers: Sequence[int], *, embeddings: bool = False) -> nn.Module:
    stack = find_decoder_stack(model)
    chosen = {p for index in layers for p in stack.layers[index]} | set(stack.embeddings if embeddings else ())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in chosen)
    return model


TRAINED: tuple[tuple[int, ...], ...] = ((0, 1), (0, 10), (10,), (4, 5), (0, 5, 6, 7, 8, 9), tuple(range(LAYERS)))


@pytest.mark.long
@pytest.mark.parametrize("layers", TRAINED, ids=str)
def test_sizes_are_those_of_a_step_through_every_layer(layers: tuple[int, ...]) -> None:
    everything = len(layers) == LAYERS
    stepped = SteppedModel(train(make(tie_word_embeddings=everything), layers, embeddings=everything))
    device: Any = "cpu" if everything else "cuda"
    shapes = [replace(SHAPE, checkpointing=setting) for setting in ("none", 6, 7, "all")]
    for shape in (*shapes, replace(SHAPE, checkpointing=2, micro_batches=2)):
        whole = profile_step(stepped, shape, device=device, every_layer=True)
        assert profile_step(stepped, shape, device=device) == whole
    probed = profile_step(stepped, SHAPE, device=device, probing=True)
    assert probed == profile_step(stepped, SHAPE, device=device, probing=True, every_layer=True)
    assert all(found.repeats for found in stepped.followed.values())


@pytest.mark.long
@pytest.mark.parametrize("adapter", [LoraConfig(rank=4, targets=("q_proj",)), PrefixConfig(), PromptConfig()])
def test_sizes_with_an_adapter_are_those_of_a_step_through_every_layer(adapter: Any) -> None:
    stepped = SteppedModel(add_adapter(make(), adapter))
    for checkpointing in ("none", 5, 6):
        shape = replace(SHAPE, checkpointing=checkpointing)
        whole = profile_step(stepped, shape, device="cuda", every_layer=True)
        assert profile_step(stepped, shape, device="cuda") == whole
    # all layers' gradients of a prefix are there until the end, where they meet
    assert {found.repeats for found in stepped.followed.values()} == {adapter.kind != "prefix"}


def test_few_layers_are_run_and_a_step_of_more_equal_ones_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = []
    follow = step._follow
    monkeypatch.setattr(step, "_follow", lambda *args, **options: run.append(args[2]) or follow(*args, **options))
    stepped = SteppedModel(train(make(), (0, 1)))
    for checkpointing in (5, 6, 7):  # 3 to 5 layers are recomputed and frozen, 6 to 4 are neither
        profile_step(stepped, replace(SHAPE, checkpointing=checkpointing), device="cuda")
    assert [sum(len(one.followed) for one in runs) for runs in run] == [2 + 3 + 4, 2 + 4 + 4]
    assert len(find_decoder_stack(stepped.model).modules) == LAYERS


def test_layers_that_differ_are_no_run() -> None:
    model = make("gemma2", head_dim=8, layer_types=["sliding_attention", "full_attention"] * 5 + ["full_attention"])
    runs = equal_runs(SteppedModel(model).layers, 0)
    assert [run.count for run in runs] == [1] * 9 + [2]
    alike = equal_runs(SteppedModel(train(make(), (3,))).layers, 6)
    assert [(run.first, run.count) for run in alike] == [(0, 3), (3, 1), (4, 2), (6, 5)]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_remembered_shapes_are_those_of_the_operations(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = SteppedModel(make(family, **({"head_dim": 8} if family == "gemma" else {})).to(torch.bfloat16))
    remembered = [profile_step(stepped, SHAPE, device=device, every_layer=True) for device in ("cpu", "cuda")]
    monkeypatch.setattr(known_shapes, "call", lambda func, args, kwargs: func(*args, **kwargs))
    direct = [profile_step(stepped, SHAPE, device=device, every_layer=True) for device in ("cpu", "cuda")]
    assert remembered == direct


def test_numbers_that_are_equal_but_of_other_types_are_told_apart() -> None:
    whole = torch.empty(3, dtype=torch.int64, device="meta")
    mul = torch.ops.aten.mul.Tensor
    results = [known_shapes.call(mul, (whole, by), {}) for _ in range(2) for by in (1, 1.0, True)]
    assert [result.dtype for result in results] == 2 * [torch.int64, torch.float32, torch.int64]
    view = known_shapes.call(torch.ops.aten._unsafe_view.default, (whole, [3, 1]), {})
    again = known_shapes.call(torch.ops.aten._unsafe_view.default, (whole, [3, 1]), {})
    storages = {tensor.untyped_storage()._cdata for tensor in (whole, view, again)}
    assert len(storages) == 1
