"""Adapters: what a class of a few lines gives to peft, and what it answers to the rest of the library."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from small import make_batch, make_llama

from grass_ray import AllLayersSampler, LayerwiseAdamW
from grass_ray.config import AdapterConfig, ConfigError, LoraConfig, PeftConfig, PrefixConfig, PromptConfig, RunConfig
from grass_ray.methods import METHODS
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
    ("adapter", "abilities", "virtual_tokens"),
    [
        (LoraConfig(), {"merge", "shard", "pack"}, 0),
        (PrefixConfig(num_virtual_tokens=3), set(), 3),
        (PromptConfig(num_virtual_tokens=4), set(), 4),
        (PeftConfig(peft_type="LORA", use_rslora=True), {"merge", "shard", "pack"}, 0),
        (PeftConfig(peft_type="VERA"), {"merge", "pack"}, 0),
    ],
)
def test_an_adapter_answers_what_it_can_be_combined_with(adapter, abilities, virtual_tokens) -> None:
    assert {ability for ability in ("merge", "shard", "pack") if adapter.can(ability)} == abilities
    assert adapter.virtual_tokens == virtual_tokens


def test_any_adapter_of_peft_is_named_by_its_type_and_keys() -> None:
    model = add_adapter(make_llama(), PeftConfig(peft_type="HRA", r=4, target_modules=["q_proj"]))
    assert (model.active_peft_config.peft_type, model.active_peft_config.r) == ("HRA", 4)
    config = RunConfig(method=METHODS["vera"].config).override({"method.adapter.r": 8})
    assert RunConfig.parse(config.to_dict()) == config
    assert config.method.adapter.settings["r"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "VERO"}, r"peft [\d.]+ has no adapter 'VERO'; available: .*VERA"),
        ({"peft_type": "VERA", "rank": 8}, r"peft's VERA has no key rank; available: .*d_initial.* r, "),
        ({"peft_type": "VERA", "target_modules": ["nowhere"]}, r"cannot put VERA tuning on LlamaForCausalLM: "),
        ({"peft_type": "C3A", "target_modules": ["q_proj"], "block_size": 5}, r"cannot put C3A tuning on Llama"),
        ({"peft_type": "LORA", "r": "many"}, r"cannot put LORA tuning on Llama"),
    ],
)
def test_what_peft_does_not_take_is_told_before_weights_are_loaded(settings, message) -> None:
    config = PeftConfig(**settings)
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        add_adapter(make_llama(), config)


@pytest.mark.parametrize("name", ["ADALORA", "SHIRA", "XLORA", "P_TUNING"])
def test_adapters_that_need_more_than_a_loss_are_refused_with_the_reason(name: str) -> None:
    adapter = {"kind": "peft", "peft_type": name}
    with pytest.raises(ConfigError, match=rf"adapter.peft_type: .*{name} (cannot be trained here: it |adds virtual)"):
        RunConfig(method=METHODS["lora"].config).override({"method.adapter": adapter})


def test_a_refusal_of_peft_names_the_adapter_and_the_model() -> None:
    with pytest.raises(ConfigError, match=r"cannot put LoRA on nowhere: .* Name the model's own linear layers with"):
        add_adapter(make_llama(), LoraConfig(targets=("nowhere",)))
    with pytest.raises(ConfigError, match="peft cannot put vera tuning on LlamaForCausalLM: "):
        add_adapter(make_llama(), VeraConfig(target_modules=("nowhere",)))
