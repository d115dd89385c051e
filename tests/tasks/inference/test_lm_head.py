"""The head of a model on its own: the logits of the model itself for every family, and told apart where it is none."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from small import make_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from grass_ray.tasks.inference import lm_head
from grass_ray.tasks.inference.lm_head import Head, splits, with_head

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "llama4_text": GEMMA | {"num_local_experts": 2, "intermediate_size_mlp": 64},
    "mistral": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen2": GROUPED,
    "qwen3": GEMMA,
    "gemma": GEMMA,
    "gemma2": GEMMA | {"final_logit_softcapping": 0.5},  # capped hard
    "gemma3_text": GEMMA | {"final_logit_softcapping": 0.5},
    "recurrent_gemma": GEMMA | {"logits_soft_cap": 0.5},
    "phi": SIZES,  # the head has a bias
    "phi3": GROUPED,
    "cohere": GROUPED | {"logit_scale": 0.25},
    "granite": GROUPED | {"logits_scaling": 8.0},
    "minicpm3": SIZES | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8},
    "falcon": SIZES,
    "falcon_h1": GEMMA | {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "bloom": {key: value for key, value in SIZES.items() if key != "intermediate_size"},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt2": GPT2,
    "gpt_neox": SIZES,
    "gptj": GPT2 | {"rotary_dim": 8},
    "opt": {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "modernbert-decoder": SIZES | {"sep_token_id": 3, "cls_token_id": 4},  # its head has two layers
    "bert-generation": SIZES | {"is_decoder": True},
}


def build(family: str, **settings: Any) -> Any:
    """A small random model of the family, with large logits, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **settings))
        head = model.get_output_embeddings()
        head.weight.data *= 20
        if head.bias is not None:
            head.bias.data.normal_()
    return model.train()


def all_logits(hidden: Tensor, head: Head) -> Tensor:
    return torch.stack([head(row) for row in hidden])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_makes_the_logits_of_the_model(family: str) -> None:
    model = build(family).eval()
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert splits(model)
    expected = model(input_ids=ids, use_cache=False).logits
    rounding = 1e-5 * float(expected.abs().max())
    found = with_head(model, all_logits, input_ids=ids, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    few = with_head(model, lambda hidden, head: head(hidden[1, 3:5]), input_ids=ids, use_cache=False)
    torch.testing.assert_close(few, expected[1, 3:5], rtol=0, atol=rounding)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected), "the model is as it was"


def test_a_model_is_left_as_it_was() -> None:
    model = make_llama()
    ids = torch.arange(1, 9).unsqueeze(0)
    before = copy.copy(model.__dict__), copy.copy(model.model.__dict__), dict(model.named_parameters())
    assert splits(model)
    assert model.training

    def fail(hidden: Tensor, head: Head) -> None:
        with head.stand_ins() as leaves:
            assert leaves
            assert model.lm_head.weight is leaves[0]
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        with_head(model, fail, input_ids=ids)
    assert before == (model.__dict__, model.model.__dict__, dict(model.named_parameters()))


def test_a_forward_of_ones_own_is_used_and_kept() -> None:
    """As libraries that place a model on several devices do."""
    model = make_llama()
    own, calls = model.forward, []

    def forward(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return own(*args, **options)

    model.forward = forward
    with_head(model, lambda hidden, head: head(hidden[0]), input_ids=torch.arange(1, 9).unsqueeze(0))
    assert model.forward is forward
    assert len(calls) > 1


class Mixing(LlamaForCausalLM):
    """The logits of a position depend on those before it."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.cumsum(1)
        return output


class Skipping(LlamaForCausalLM):
    """The logits depend on the input beside the decoder's result."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits + self.get_input_embeddings()(options["input_ids"]).sum(-1, keepdim=True)
        return output


class Bare(torch.nn.Module):
    """No decoder inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(64))
        self.dtype = torch.float32

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return (self.table[input_ids],)


@pytest.mark.parametrize("kind", [Mixing, Skipping, Bare])
def test_what_is_more_than_a_head_is_told_once(kind: Any) -> None:
    model = Bare() if kind is Bare else kind(make_llama().config)
    with pytest.warns(UserWarning, match=f"the logits of {kind.__name__} are not made of the last hidden state"):
        assert not splits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not splits(model)


def test_what_was_found_is_forgotten_with_the_model() -> None:
    gc.collect()  # models of other tests, which a collection in the middle of this one would take away
    before = len(lm_head._decoders)
    model = make_llama()
    splits(model)
    assert len(lm_head._decoders) == before + 1
    del model
    gc.collect()
    assert len(lm_head._decoders) == before
