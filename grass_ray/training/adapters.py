"""Put a method's adapter into a model, and work with it during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from grass_ray.config import AdapterConfig


def add_adapter(model: Any, adapter: AdapterConfig | None) -> Any:
    """Return the model with its adapter and frozen base weights, or the model itself if ``adapter`` is None.

    Raises:
        ConfigError: as :meth:`grass_ray.config.AdapterConfig.apply`.
    """
    return model if adapter is None else adapter.apply(model)


def leading_virtual_tokens(model: Any) -> int:
    """Number of positions that a peft adapter adds before the text in the logits (prompt tuning), else 0."""
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "PROMPT_TUNING":
        return 0
    return int(config.num_virtual_tokens)


@contextmanager
def scaled_adapters(layers: Sequence[nn.Module], factors: Sequence[float]) -> Iterator[None]:
    """Multiply the output of the LoRA adapters in each of ``layers`` by its factor inside the block."""
    from peft.helpers import rescale_adapter_scale

    with ExitStack() as stack:
        for layer, factor in zip(layers, factors, strict=True):
            stack.enter_context(rescale_adapter_scale(layer, factor))
        yield
