"""Small models, batches and places that tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent


def make_llama(
    *, layers: int = 4, hidden: int = 32, vocabulary: int = 64, tied: bool = False, seed: int = 0
) -> LlamaForCausalLM:
    """A random small Llama; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
            )
        )


def make_batch(step: int, *, rows: int = 4, tokens: int = 12, vocabulary: int = 64) -> torch.Tensor:
    """Random token ids that depend on ``step`` alone, shape (rows, tokens)."""
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(step))


def backward(model: LlamaForCausalLM, step: int, **sizes: int) -> float:
    """One backward pass on the batch of ``step``; the loss."""
    batch = make_batch(step, **sizes)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return float(loss.detach())
