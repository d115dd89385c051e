"""Adapters of peft: what each one is made of, and what it can be combined with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from grass_ray.config.base import ConfigPart, Decay, PositiveFloat, PositiveInt
from grass_ray.errors import ConfigError


class AdapterConfig(ConfigPart):
    """Base class of the adapters. A subclass names its ``kind``, its keys, and how peft calls them."""

    peft_type: ClassVar[str]
    """Name of the adapter in ``peft.PeftType``."""
    mergeable: ClassVar[bool] = True
    """Whether the trained adapter can be merged into the weights of the base model."""
    shardable: ClassVar[bool] = True
    """Whether its parameters are inside the layers of the base model, where FSDP2 shards them."""

    kind: str

    @property
    def virtual_tokens(self) -> int:
        """Number of trained tokens in front of the text; 0 for adapters inside the layers."""
        return 0

    def peft_settings(self) -> dict[str, Any]:
        """Keyword arguments of the adapter's configuration in peft."""
        return self.model_dump(exclude={"kind"})

    def apply(self, model: Any) -> Any:
        """Put the adapter into a model and freeze the base weights.

        Args:
            model: a model of transformers.

        Returns:
            The ``peft.PeftModel`` around ``model``.

        Raises:
            ConfigError: peft cannot put the adapter into this model.
        """
        import peft

        settings = {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", **self.peft_settings()}
        try:
            return peft.get_peft_model(model, peft.get_peft_config(settings))
        except ValueError as error:
            raise ConfigError(self._refusal(type(model).__name__, error)) from error

    def _refusal(self, model_name: str, error: ValueError) -> str:
        return f"peft cannot put {self.kind} tuning on {model_name}: {error}"


class LoraConfig(AdapterConfig):
    """LoRA (arXiv 2106.09685): trains low-rank updates of linear layers; DoRA with ``dora``."""

    peft_type: ClassVar[str] = "LORA"

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 32
    """Rank of the updates (r)."""
    alpha: PositiveFloat = 64.0
    """Scale of the updates, which are multiplied by ``alpha / rank``."""
    dropout: Decay = 0.05
    """Dropout probability of the adapters' inputs."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""
    dora: bool = False
    """Whether to train the magnitude of each output separately (DoRA, arXiv 2402.09353)."""

    def peft_settings(self) -> dict[str, Any]:
        """Keyword arguments of ``peft.LoraConfig``."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "use_dora": self.dora,
        }

    def _refusal(self, model_name: str, error: ValueError) -> str:
        return (
            f"cannot put LoRA on {', '.join(self.targets)}: {error} Name the model's own linear layers with "
            "--set 'method.adapter.targets=[...]'."
        )


class _VirtualTokens(AdapterConfig):
    """An adapter that trains tokens in front of the text and nothing inside the layers."""

    mergeable: ClassVar[bool] = False
    shardable: ClassVar[bool] = False

    num_virtual_tokens: PositiveInt = 20
    """Number of trained virtual tokens in front of the text."""

    @property
    def virtual_tokens(self) -> int:
        """Number of trained tokens in front of the text."""
        return self.num_virtual_tokens


class PrefixConfig(_VirtualTokens):
    """Prefix tuning (arXiv 2101.00190): trains keys and values of virtual tokens in every layer."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    kind: Literal["prefix"] = "prefix"


class PromptConfig(_VirtualTokens):
    """Prompt tuning (arXiv 2104.08691): trains embeddings of virtual tokens."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    kind: Literal["prompt"] = "prompt"


AnyAdapterConfig = Annotated[LoraConfig | PrefixConfig | PromptConfig, Field(discriminator="kind")]
