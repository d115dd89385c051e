"""Models by their shape alone, for planning and for measuring: no weights are downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grass_ray.config import ConfigError, ModelConfig
from grass_ray.training.models import DTYPES, build_skeleton

# published sizes of models whose weights are on the Hub
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tinyllama-1.1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "vocab_size": 256000,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def build_shape(config: ModelConfig, device: str = "meta") -> Any:
    """Build a model without its trained weights, in ``config.dtype``.

    Args:
        config: any model, or a name in ``SHAPES``, which needs no network.
        device: ``"meta"`` allocates no memory; elsewhere only names in ``SHAPES`` are built, with random weights.

    Raises:
        ConfigError: there is no such model, or ``device`` is not ``"meta"`` and the model has weights of its own.
    """
    dtype = DTYPES[config.dtype]
    if config.name not in SHAPES:
        if device != "meta":
            raise ConfigError(f"{config.name} has weights of its own; random ones: {', '.join(SHAPES)}")
        try:
            model = build_skeleton(config)
        except ConfigError as error:
            raise ConfigError(f"{error}; shapes to plan with: {', '.join(SHAPES)}") from None
        for parameter in model.parameters():  # as load_model leaves them; buffers keep their dtype
            parameter.data = parameter.data.to(dtype)
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[config.name])
    shape = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype)
