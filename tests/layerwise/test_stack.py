"""Taking models apart, and refusing those that are no decoders."""

from __future__ import annotations

import pytest
import torch
from small import make_llama
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from grass_ray.layerwise.stack import decay_parameters, find_decoder_stack


def names(model: nn.Module, parameters: tuple[nn.Parameter, ...]) -> list[str]:
    return [name for name, p in model.named_parameters() if any(p is q for q in parameters)]


def test_every_parameter_is_in_exactly_one_part() -> None:
    for tied in (False, True):
        model = make_llama(tied=tied)
        stack = find_decoder_stack(model)
        assert stack.path == "model.layers"
        assert stack.num_layers == 4
        parts = [*stack.layers, stack.embeddings, stack.head, stack.norm, stack.unmanaged]
        ids = [id(p) for part in parts for p in part]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        assert names(model, stack.embeddings) == ["model.embed_tokens.weight"]
        assert names(model, stack.head) == ([] if tied else ["lm_head.weight"]), "a tied head is the embedding"
        assert names(model, stack.norm) == ["model.norm.weight"]


def test_gpt2_positions_are_embeddings() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64))
    stack = find_decoder_stack(model)
    assert stack.num_layers == 3
    assert names(model, stack.embeddings) == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert names(model, stack.norm) == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_refuses_encoders_and_encoder_decoders() -> None:
    bert = BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    )
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=64))
    for model in (bert, t5):
        with pytest.raises(ValueError, match="is not a decoder-only language model"):
            find_decoder_stack(model)


def test_ambiguity_fails_and_lists_what_was_found() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.right = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    with pytest.raises(ValueError, match=r"2 possible decoder stacks.*left \(2 x Linear\), right \(3 x Linear\)"):
        find_decoder_stack(Two())
    assert find_decoder_stack(Two(), "right").num_layers == 3
    with pytest.raises(ValueError, match="has no list of layers called 'middle'"):
        find_decoder_stack(Two(), "middle")
    with pytest.raises(ValueError, match="no decoder stack in Linear"):
        find_decoder_stack(nn.Linear(2, 2))


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64))
    decayed = names(model, tuple(decay_parameters(model)))
    assert "transformer.h.0.attn.c_attn.weight" in decayed
    assert not [name for name in decayed if "bias" in name or "ln_" in name]
    assert all(p.ndim >= 2 for p in decay_parameters(model))
    assert isinstance(model.transformer.h[0].ln_1.weight, torch.Tensor)
