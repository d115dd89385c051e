"""Small models, batches and places that tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grass_ray import LayerwiseAdamW, LayerwiseOptions
from grass_ray.config import ModelConfig, RunConfig
from grass_ray.layerwise.sampler import Sampler
from grass_ray.methods import METHODS
from grass_ray.overrides import parse

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


def make_optimizer(model: torch.nn.Module, sampler: Sampler, **settings: Any) -> LayerwiseAdamW:
    """A LayerwiseAdamW whose options may stand among its arguments."""
    names = {field.name for field in dataclasses.fields(LayerwiseOptions)}
    options = {name: settings.pop(name) for name in names & settings.keys()}
    return LayerwiseAdamW(model, sampler, options=LayerwiseOptions(**options), **settings)


def recompute_layers(model: Any, *, reentrant: bool = False) -> None:
    """Turn on the model's own activation checkpointing, which had another name before transformers 5.23."""
    settings = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def make_batch(step: int, *, rows: int = 4, tokens: int = 12, vocabulary: int = 64) -> torch.Tensor:
    """Random token ids that depend on ``step`` alone, shape (rows, tokens)."""
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(step))


def backward(model: LlamaForCausalLM, step: int, **sizes: int) -> float:
    """One backward pass on the batch of ``step``; the loss."""
    batch = make_batch(step, **sizes)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return float(loss.detach())


SHORT_SAMPLERS: dict[str, dict[str, object]] = {
    "all": {},
    "uniform": {"period": 2},
    "grad_norm": {"period": 2, "probing_steps": 2, "refresh_period": 3},
    "outlier": {"num_active_layers": 2, "period": 2, "calibration_steps": 1, "threshold": 4.0},
    "cyclic": {"period": 2},
    "reward": {"refresh_period": 3, "share": 0.5},
    "matrix_norm": {"period": 2, "budget": 0.2},
    "fixed": {},
    "converging": {"period": 2, "threshold": 0.3, "grace": 0.3},
    "frequency": {"period": 2, "probing_steps": 2, "refresh_period": 3},
}


def short_run(method: str, *overrides: str, steps: int = 9) -> RunConfig:
    """A method's own row on the tiny model, with periods short enough to see everything within a few steps."""
    row = METHODS[method].config
    settings = [
        f"method.sampler.{key}={value}"
        for key, value in SHORT_SAMPLERS[row.sampler.kind].items()
        if getattr(row.sampler, key) is not None
    ]
    if hasattr(row.optimizer.projection, "rank"):
        settings += ["method.optimizer.projection.rank=8", "method.optimizer.projection.refresh_period=3"]
    if method == "hift":
        settings += ["method.sampler.period=1"]
    defaults = [
        f"training.steps={steps}",
        "training.batch_size=4",
        "training.warmup_steps=0",
        "data.source.train_rows=30",
        "data.source.test_rows=4",
    ]
    config = RunConfig(method=row, model=ModelConfig(name="tiny"))
    return config.override(parse([*defaults, *settings, *overrides]))
