"""Adapters of peft: what each one is made of, and what it can be combined with."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from grass_ray.config.base import ConfigPart, Decay, PositiveFloat, PositiveInt, plain
from grass_ray.errors import ConfigError

Ability = Literal["merge", "shard", "pack"]
_CHOSEN_HERE = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")
_VIRTUAL_TOKENS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
# merging moves the largest logit by a thousandth
_NOT_EXACT = ("FOURIERFT",)
# adapters of peft that need more than a model and a loss: what they do
_NEED_MORE = {
    "ADALORA": "it gives ranks to other matrices after each step, which the training loop does not do",
    "ADAPTION_PROMPT": "its prompts are inside the attention of some layers",
    "OSF": "it trains the weights of the base model in place",
    "POLY": "it takes the number of each row's task",
    "SHADOW": "it trains a second model beside the first",
    "SHIRA": "it draws a mask from the weights, and nothing of it can be checked before they are loaded",
    "TRAINABLE_TOKENS": "it trains rows of the embeddings, and nothing inside the layers",
    "XLORA": "it mixes adapters that were trained before",
}


class AdapterConfig(ConfigPart):
    """Base class of the adapters. A subclass names its ``kind``, its keys, and how peft calls them."""

    peft_type: ClassVar[str]
    """Name of the adapter in ``peft.PeftType``."""
    cannot: ClassVar[frozenset[Ability]] = frozenset()
    """What it cannot be combined with."""

    kind: str

    def can(self, ability: Ability) -> bool:
        """Whether it can be combined with something.

        Args:
            ability: ``merge``: into the weights of the base model; ``shard``: a model sharded by FSDP2; ``pack``:
                several rows in one.
        """
        return ability not in self.cannot

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
        if next(model.parameters()).is_meta and isinstance(settings.get("init_lora_weights"), str):
            del settings["init_lora_weights"]  # decomposes weights, and here are none
        try:
            return peft.get_peft_model(model, peft.get_peft_config(settings))
        except Exception as error:  # each adapter checks its settings in its own way, or fails at them
            raise ConfigError(self._refusal(type(model).__name__, error)) from error

    def _refusal(self, model_name: str, error: Exception) -> str:
        name = self.peft_type if self.kind == "peft" else self.kind
        return f"peft cannot put {name} tuning on {model_name}: {error}"


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

    def _refusal(self, model_name: str, error: Exception) -> str:
        return (
            f"cannot put LoRA on {', '.join(self.targets)}: {error} Name the model's own linear layers with "
            "--set 'method.adapter.targets=[...]'."
        )


class _VirtualTokens(AdapterConfig):
    """An adapter that trains tokens in front of the text and nothing inside the layers."""

    cannot: ClassVar[frozenset[Ability]] = frozenset({"merge", "shard", "pack"})

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


class PeftConfig(AdapterConfig):
    """Any adapter of peft inside the layers, by its name there; all further keys are those of its configuration."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["peft"] = "peft"
    peft_type: str  # type: ignore[misc]
    """Name of the adapter in ``peft.PeftType``, such as ``VERA``, in letters of either case."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that are peft's."""
        return self.model_extra or {}

    def can(self, ability: Ability) -> bool:
        """Whether it can be combined with something; shards were tried with LoRA alone."""
        if ability == "merge":
            return self.peft_type not in _NOT_EXACT
        return ability != "shard" or self.peft_type == "LORA"

    def peft_settings(self) -> dict[str, Any]:
        """The keys that are peft's, which must be known to it."""
        import peft

        known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        if self.peft_type not in known:
            names = ", ".join(sorted({name.value for name in known} - {*_NEED_MORE, *_VIRTUAL_TOKENS}))
            raise ConfigError(f"peft {peft.__version__} has no adapter {self.peft_type!r}; available: {names}")
        has = {field.name for field in dataclasses.fields(known[self.peft_type])} - set(_CHOSEN_HERE)
        if unknown := sorted(self.settings.keys() - has):
            raise ConfigError(
                f"peft's {self.peft_type} has no key {', '.join(unknown)}; available: {', '.join(sorted(has))}"
            )
        return dict(self.settings)

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        return plain(values) if isinstance(values, dict) else values

    @field_validator("peft_type")
    @classmethod
    def _is_an_adapter_of_layers(cls, name: str) -> str:
        name = name.upper()
        if name in _VIRTUAL_TOKENS:
            raise ValueError(f"{name} adds virtual tokens; use an adapter of kind prefix or prompt")
        if name in _NEED_MORE:
            raise ValueError(f"{name} cannot be trained here: {_NEED_MORE[name]}")
        return name


AnyAdapterConfig = Annotated[LoraConfig | PrefixConfig | PromptConfig | PeftConfig, Field(discriminator="kind")]
