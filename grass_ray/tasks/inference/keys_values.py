"""Keys and values that a model keeps of the tokens it has read: whether, and under which name, it goes on from them."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache


def base_model(model: Any) -> Any:
    """The transformers model under peft adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_virtual_tokens(model: Any) -> bool:
    """Whether trained tokens of prompt or prefix tuning stand before a row's own."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward pass takes the argument."""
    return argument in inspect.signature(base_model(model).forward).parameters


def new_cache(model: Any, *, sliding: bool = True) -> dict[str, DynamicCache]:
    """An empty store as the argument of a forward pass; empty where rows of it could not be copied and dropped.

    Args:
        model: a causal language model, possibly with adapters.
        sliding: whether layers that keep a sliding window will do.
    """
    base = base_model(model)
    name = next((name for name in ("cache", "past_key_values") if accepts(model, name)), None)
    if name is None or has_virtual_tokens(model) or not base._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    recurrent = any(getattr(cache, "is_linear", ()))
    return {} if recurrent or (any(cache.is_sliding) and not sliding) else {name: cache}
