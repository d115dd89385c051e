"""The cache of keys and values of a model: whether it has one, and the name of the argument."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import DynamicCache


def base_model(model: Any) -> Any:
    """Return the transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_virtual_tokens(model: Any) -> bool:
    """Return whether the model prepends virtual tokens (prompt or prefix tuning)."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def accepts(model: Any, argument: str) -> bool:
    """Return whether the forward method of the model has the argument."""
    return argument in inspect.signature(base_model(model).forward).parameters


def new_cache(model: Any, *, sliding: bool = True) -> dict[str, DynamicCache]:
    """Return an empty cache as a keyword argument of the forward method.

    Empty if the model has no cache whose rows can be copied and dropped.

    Args:
        model: causal language model, possibly with adapters.
        sliding: whether layers with a sliding window are acceptable.
    """
    base = base_model(model)
    name = next((name for name in ("cache", "past_key_values") if accepts(model, name)), None)
    if name is None or has_virtual_tokens(model) or not base._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    recurrent = any(getattr(cache, "is_linear", ()))
    return {} if recurrent or (any(cache.is_sliding) and not sliding) else {name: cache}


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The first cache with the rows of all of them, filled up with zeros on the left to the longest.

    Args:
        caches: without layers that have a sliding window.
    """
    longest = max(cache.get_seq_length() for cache in caches)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        if layers[0].is_initialized:
            for name in ("keys", "values"):
                parts = [getattr(layer, name) for layer in layers]
                filled = [functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts]
                setattr(layers[0], name, torch.cat(filled))
    return caches[0]
