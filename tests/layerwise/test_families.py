"""Families of decoders, tiny and random: where their layers are, and that exactly the active ones train.

Nothing in the package knows a model by name; what is named here are models it must take apart rightly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from small import make_batch, make_llama, recompute_layers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    SiglipVisionConfig,
)

from grass_ray import GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.layerwise.stack import DecoderStack, decay_parameters, find_decoder_stack

LAYERS = 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
OPT_SIZES = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "num_key_value_heads")}
OPT_SIZES |= {"ffn_dim": 64, "word_embed_proj_dim": 32}


@dataclass(frozen=True)
class Family:
    """A configuration, and the names its parts must have."""

    config: type[PretrainedConfig]
    settings: dict[str, Any] = field(default_factory=lambda: SIZES)
    path: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens.weight",)
    head: tuple[str, ...] = ("lm_head.weight",)
    norm: tuple[str, ...] = ("model.norm.weight",)

    def build(self, *, tied: bool = False) -> Any:
        """The model, the same at every call, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(self.config(**self.settings, tie_word_embeddings=tied)).train()


FAMILIES = {
    "llama": Family(LlamaConfig),
    "mistral": Family(MistralConfig),
    "mixtral": Family(MixtralConfig, SIZES | {"num_local_experts": 4}),
    "qwen2": Family(Qwen2Config),
    "qwen3": Family(Qwen3Config, SIZES | {"head_dim": 8}),
    "gemma": Family(GemmaConfig, SIZES | {"head_dim": 8}),
    "gemma2": Family(Gemma2Config, SIZES | {"head_dim": 8}),
    "gemma3": Family(Gemma3TextConfig, SIZES | {"head_dim": 8}),
    "phi": Family(
        PhiConfig,
        head=("lm_head.weight", "lm_head.bias"),
        norm=("model.final_layernorm.weight", "model.final_layernorm.bias"),
    ),
    "phi3": Family(Phi3Config),
    "gpt2": Family(
        GPT2Config,
        GPT2_SIZES,
        path="transformer.h",
        embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        norm=("transformer.ln_f.weight", "transformer.ln_f.bias"),
    ),
    "gpt_neox": Family(
        GPTNeoXConfig,
        {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        path="gpt_neox.layers",
        embeddings=("gpt_neox.embed_in.weight",),
        norm=("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"),
    ),
    "opt": Family(
        OPTConfig,
        OPT_SIZES,
        path="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
        norm=("model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"),
    ),
    "jamba": Family(  # Mamba blocks and attention blocks, dense and with experts: several classes in one list
        JambaConfig,
        SIZES
        | {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2}
        | {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        norm=("model.final_layernorm.weight",),
    ),
}
BOTH = [(name, tied) for name in FAMILIES for tied in (False, True)]


def names(model: nn.Module, parameters: tuple[nn.Parameter, ...]) -> set[str]:
    chosen = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def assert_a_partition(model: nn.Module, stack: DecoderStack) -> None:
    parts = [*stack.layers, stack.embeddings, stack.head, stack.norm, stack.unmanaged]
    ids = [id(p) for part in parts for p in part]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()), "every parameter is in exactly one part"


def backward(model: Any, step: int) -> float:
    torch.manual_seed(step)  # dropout
    batch = make_batch(step)
    loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def assert_exactly_the_active_layers_change(model: Any, optimizer: LayerwiseAdamW, backward: Any = backward) -> None:
    """Twelve steps: two of probing, then a draw every second step."""
    drawn = set()
    for step in range(12):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        active = set() if optimizer.probing else set(optimizer.active_layers)
        drawn.add(frozenset(active))
        assert math.isfinite(backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
        changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        layers = {index for index, layer in enumerate(optimizer.stack.layers) if names(model, layer) & changed}
        assert layers == active
        outside = changed - set().union(*(names(model, layer) for layer in optimizer.stack.layers))
        assert not outside, "embeddings, head, norm and towers stay frozen"
    assert len(drawn) > 2, "the layers were switched"


def make_optimizer(model: nn.Module) -> LayerwiseAdamW:
    sampler = GradNormSampler(2, 2, probing_steps=2, refresh_period=4, temperature=5.0, seed=1)
    return LayerwiseAdamW(model, sampler, lr=1e-3)


@pytest.mark.parametrize(("name", "tied"), BOTH)
def test_parts(name: str, tied: bool) -> None:
    family = FAMILIES[name]
    model = family.build(tied=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    stack = find_decoder_stack(model)
    assert stack.path == family.path
    assert stack.num_layers == LAYERS
    assert_a_partition(model, stack)
    assert names(model, stack.embeddings) == set(family.embeddings)
    head = family.head if hasattr(model, "lm_head") else ("embed_out.weight",)  # gpt_neox in older transformers
    own_head = {name for name in head if not (tied and name.endswith(".weight"))}
    assert names(model, stack.head) == own_head, "a tied head is the embedding"
    assert names(model, stack.norm) == set(family.norm)
    assert not stack.unmanaged
    for index, layer in enumerate(stack.layers):
        assert all(layer_name.startswith(f"{family.path}.{index}.") for layer_name in names(model, layer))


@pytest.mark.parametrize(("name", "tied"), BOTH)
def test_exactly_the_active_layers_train(name: str, tied: bool) -> None:
    model = FAMILIES[name].build(tied=tied)
    assert_exactly_the_active_layers_change(model, make_optimizer(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_backward_stops_at_the_lowest_active_layer_and_checkpointing_changes_no_gradient(name: str) -> None:
    """Layers below take no part in autograd: their outputs need no gradient, and nothing is computed twice."""
    plain, checkpointed = FAMILIES[name].build(), FAMILIES[name].build()
    recompute_layers(checkpointed)
    checkpointed.disable_input_require_grads()
    optimizers = [LayerwiseAdamW(model, UniformSampler(2, 1, seed=2), lr=1e-3) for model in (plain, checkpointed)]
    needed: dict[int, bool] = {}
    calls = [0] * LAYERS

    def note_output(index: int, output: Any) -> None:
        needed[index] = (output[0] if isinstance(output, tuple) else output).requires_grad

    def count(index: int) -> None:
        calls[index] += 1

    for index, layer in enumerate(optimizers[1].stack.modules):
        inside = next(layer.children())  # hooks of the layer itself stay outside its checkpoint
        inside.register_forward_pre_hook(lambda module, inputs, index=index: count(index))
        layer.register_forward_hook(lambda module, inputs, output, index=index: note_output(index, output))
    lowest = set()
    for step in range(6):
        active = optimizers[1].active_layers
        lowest.add(active[0])
        calls[:] = [0] * LAYERS
        assert backward(plain, step) == backward(checkpointed, step)
        assert needed == {index: index >= active[0] for index in range(LAYERS)}
        assert calls == [2 if index >= active[0] else 1 for index in range(LAYERS)], "recomputed only where needed"
        for (parameter, left), right in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None), parameter
            assert left.grad is None or torch.equal(left.grad, right.grad), parameter
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(lowest) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_decay_is_for_matrices(name: str) -> None:
    """In these families norm weights and biases are vectors; Conv1D's weights and experts' 3-D tensors do decay."""
    model = FAMILIES[name].build()
    vectors = {parameter for parameter, p in model.named_parameters() if p.ndim == 1}
    decayed = names(model, tuple(decay_parameters(model)))
    assert decayed == {parameter for parameter, _ in model.named_parameters()} - vectors
    assert any("norm" in parameter or ".ln_" in parameter for parameter in vectors)
    if name in ("gpt2", "opt", "qwen2"):
        assert any(parameter.endswith("bias") for parameter in vectors)
    if name == "mixtral":
        assert any(p.ndim == 3 for p in decay_parameters(model))


def test_biases_of_experts_do_not_decay() -> None:
    """One row an expert makes them matrices, but they are biases all the same."""
    model = Family(GptOssConfig, SIZES | {"num_local_experts": 4, "head_dim": 8}).build()
    decayed = names(model, tuple(decay_parameters(model)))
    rest = {name: p for name, p in model.named_parameters() if name not in decayed}
    assert all("bias" in name or "norm" in name or "sinks" in name for name in rest)
    assert any(p.ndim == 2 and name.endswith("bias") for name, p in rest.items())
    assert any(p.ndim == 3 for p in decay_parameters(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_adapters_train_layer_by_layer(name: str) -> None:
    family = FAMILIES[name]
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    model = peft.get_peft_model(family.build(), lora)
    stack = find_decoder_stack(model)
    assert stack.path == f"base_model.model.{family.path}"
    assert_a_partition(model, stack)
    adapters = {parameter for parameter, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in parameter for parameter in adapters)
    before = {parameter: p.detach().clone() for parameter, p in model.named_parameters()}
    assert_exactly_the_active_layers_change(model, make_optimizer(model))
    changed = {parameter for parameter, p in model.named_parameters() if not torch.equal(before[parameter], p)}
    assert changed
    assert changed <= adapters


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
def test_a_prompt_encoder_is_no_part_of_the_decoder(kind: Any) -> None:
    model = peft.get_peft_model(make_llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    stack = find_decoder_stack(model)
    assert_a_partition(model, stack)
    assert names(model, stack.embeddings) == {"base_model.model.embed_tokens.weight"}
    prompt = {name for name, _ in model.named_parameters() if name.startswith("prompt_encoder.")}
    assert prompt
    assert names(model, stack.unmanaged) == prompt


# ---------------------------------------------------------------------------------------------- pictures and text


IMAGE_TOKEN = 63


def build_llava() -> Any:
    """As many layers in the vision tower as in the language model: the length does not tell them apart."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(**SIZES)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4)
    )


def build_gemma3() -> Any:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    text = Gemma3TextConfig(**SIZES, head_dim=8)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, mm_tokens_per_image=4)
    )


def build_qwen2_vl() -> Any:
    vision = {"depth": LAYERS, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    text = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )


def backward_with_picture(model: Any, step: int) -> float:
    batch = make_batch(step, vocabulary=IMAGE_TOKEN)
    batch[:, 1:5] = IMAGE_TOKEN
    pictures = torch.randn(len(batch), 3, 16, 16, generator=torch.Generator().manual_seed(step))
    loss = model(input_ids=batch, pixel_values=pictures, labels=batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("build", [build_llava, build_gemma3, build_qwen2_vl])
def test_the_vision_tower_is_not_managed(build: Any) -> None:
    model = build().train()
    stack = find_decoder_stack(model)
    assert stack.path == "model.language_model.layers"
    assert stack.num_layers == LAYERS
    assert_a_partition(model, stack)
    assert names(model, stack.embeddings) == {"model.language_model.embed_tokens.weight"}
    assert names(model, stack.head) <= {"lm_head.weight"}
    assert names(model, stack.norm) == {"model.language_model.norm.weight"}
    outside = {name for name, _ in model.named_parameters() if ".language_model." not in name and "lm_head" not in name}
    assert len(outside) > 10
    assert names(model, stack.unmanaged) == outside
    optimizer = make_optimizer(model)
    pictured = build is build_llava
    assert_exactly_the_active_layers_change(model, optimizer, backward_with_picture if pictured else backward)
    assert not any(p.requires_grad for p in stack.unmanaged)
