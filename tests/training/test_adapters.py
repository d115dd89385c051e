"""Adapters: what a class of a few lines gives to peft, and what it answers to the rest of the library."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from small import make_batch, make_llama

from grass_ray import AllLayersSampler, LayerwiseAdamW
from grass_ray.config import AdapterConfig, ConfigError, LoraConfig, PrefixConfig, PromptConfig
from grass_ray.training.adapters import add_adapter


class VeraConfig(AdapterConfig):
    """An adapter of peft that this library does not have: the lines that adding it takes."""

    peft_type: ClassVar[str] = "VERA"

    kind: Literal["vera"] = "vera"
    r: int = 8
    target_modules: tuple[str, ...] = ("q_proj",)

    def peft_settings(self):
        return {"r": self.r, "target_modules": list(self.target_modules)}


def test_one_more_adapter_of_peft_is_one_class() -> None:
    model = add_adapter(make_llama(), VeraConfig())
    assert model.active_peft_config.r == 8
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("vera_lambda" in name for name in trained)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = LayerwiseAdamW(model, AllLayersSampler(), lr=1e-2)
    batch = make_batch(0)
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == trained


@pytest.mark.parametrize(
    ("adapter", "mergeable", "shardable", "virtual_tokens"),
    [
        (LoraConfig(), True, True, 0),
        (PrefixConfig(num_virtual_tokens=3), False, False, 3),
        (PromptConfig(num_virtual_tokens=4), False, False, 4),
    ],
)
def test_an_adapter_answers_what_it_can_be_combined_with(adapter, mergeable, shardable, virtual_tokens) -> None:
    assert (adapter.mergeable, adapter.shardable, adapter.virtual_tokens) == (mergeable, shardable, virtual_tokens)


def test_a_refusal_of_peft_names_the_adapter_and_the_model() -> None:
    with pytest.raises(ConfigError, match=r"cannot put LoRA on nowhere: .* Name the model's own linear layers with"):
        add_adapter(make_llama(), LoraConfig(targets=("nowhere",)))
    with pytest.raises(ConfigError, match="peft cannot put vera tuning on LlamaForCausalLM: "):
        add_adapter(make_llama(), VeraConfig(target_modules=("nowhere",)))
