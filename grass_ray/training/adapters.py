"""Put adapters into a model through peft, as the method's row says."""

from __future__ import annotations

from typing import Any

from grass_ray.config import ConfigError, LoraConfig


def add_adapter(model: Any, adapter: LoraConfig | None) -> Any:
    """The model with LoRA adapters in every decoder layer, base weights frozen; unchanged when ``adapter`` is None.

    Raises:
        ConfigError: the model has none of the target modules.
    """
    if adapter is None:
        return model
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"cannot put LoRA on {', '.join(adapter.targets)}: {error} Name the model's own linear layers with "
            "--set 'method.adapter.targets=[...]'."
        ) from error
