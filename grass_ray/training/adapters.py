"""Put adapters into a model through peft, as the method's row says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, assert_never

from torch import nn

from grass_ray.config import AdapterConfig, ConfigError, LoraConfig, PrefixConfig, PromptConfig


def add_adapter(model: Any, adapter: AdapterConfig | None) -> Any:
    """The model with its adapter, base weights frozen; unchanged when ``adapter`` is None.

    Raises:
        ConfigError: the model has none of the target modules, or peft cannot serve it.
    """
    if adapter is None:
        return model
    import peft

    match adapter:
        case LoraConfig():
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=list(adapter.targets),
                use_dora=adapter.dora,
            )
        case PrefixConfig():
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.num_virtual_tokens)
        case PromptConfig():
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.num_virtual_tokens)
        case _:
            assert_never(adapter)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        if isinstance(adapter, LoraConfig):
            raise ConfigError(
                f"cannot put LoRA on {', '.join(adapter.targets)}: {error} Name the model's own linear layers with "
                "--set 'method.adapter.targets=[...]'."
            ) from error
        raise ConfigError(f"peft cannot put {adapter.kind} tuning on {type(model).__name__}: {error}") from error


def leading_virtual_tokens(model: Any) -> int:
    """Positions that a peft adapter puts before the text in the logits (prompt tuning); 0 for all others."""
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "PROMPT_TUNING":
        return 0
    return int(config.num_virtual_tokens)


@contextmanager
def scaled_adapters(layers: Sequence[nn.Module], factors: Sequence[float]) -> Iterator[None]:
    """Scale what the LoRA adapters inside each of ``layers`` add by its factor, for the block."""
    from peft.helpers import rescale_adapter_scale

    with ExitStack() as stack:
        for layer, factor in zip(layers, factors, strict=True):
            stack.enter_context(rescale_adapter_scale(layer, factor))
        yield
