"""Check the files of a model before its weights are read.

:func:`check_folder` checks which files a folder has. :func:`check_weights` compares the names and shapes in the headers
of the weight files with the configuration, by letting transformers load them on torch's meta device.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_ray.config import ConfigError, ModelConfig
from grass_ray.paths import check_model_path

LFS_POINTER = b"version https://git-lfs"
# the order in which transformers looks for weights
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def find_folder(config: ModelConfig) -> Path | None:
    """Return the folder with a model's files, or None if a model on the Hub has not been downloaded."""
    if os.path.isdir(config.name):
        return Path(config.name)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(config.name, "config.json", revision=config.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def hub_revision(config: ModelConfig) -> str | None:
    """Return the commit of a downloaded model on the Hub, or None for a folder."""
    folder = None if os.path.isdir(config.name) else find_folder(config)
    return None if folder is None else folder.name  # .../snapshots/<commit>


def check_folder(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of ``config.json``, or an empty dictionary if a model on the Hub has not been downloaded.

    Raises:
        ConfigError: the folder holds no model that transformers can load; the message says what it holds.
    """
    name = config.name
    check_model_path(name)
    folder = find_folder(config)
    if folder is None:
        return {}
    try:
        files = {path.name: path for path in folder.iterdir()}
        pointers = [path.name for path in files.values() if path.is_file() and _is_pointer(path)]
    except OSError as error:
        raise ConfigError(f"cannot read the model folder {name}: {error.strerror}") from None
    if pointers:
        raise ConfigError(
            f"{', '.join(sorted(pointers))} in {name}: a Git LFS pointer, not the file itself; run `git lfs pull` there"
        )
    refuse_adapters(config, ask_hub=False)
    if "config.json" in files:
        return _read_json(files["config.json"])
    if {"config.yaml", "checkpoint"} <= files.keys():
        raise ConfigError(
            f"{name} is a trained run, not a model; write its model: grass-ray export {name} --output MODEL"
        )
    if "delta.json" in files:
        raise ConfigError(f"{name} is a delta, not a model; write its model: grass-ray export {name} --output MODEL")
    if any(file.endswith(".gguf") for file in files):
        raise ConfigError(f"{name} holds a GGUF file, which is quantised; give a folder written by save_pretrained")
    raise ConfigError(f"{name} has no config.json; give a folder written by save_pretrained")


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}; copy or download it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object; copy or download it again")
    return values


def refuse_adapters(config: ModelConfig, *, ask_hub: bool) -> None:
    """Raise :class:`ConfigError` if a folder or a model on the Hub is, or contains, an adapter of another model.

    Args:
        config: which model.
        ask_hub: whether to look for the files on the Hub; otherwise only downloaded files are read.
    """
    from transformers.utils import find_adapter_config_file

    name = config.name
    try:
        found = find_adapter_config_file(name, revision=config.revision, local_files_only=not ask_hub)
    except (OSError, ValueError):
        return
    if found is None:
        return
    values = _read_json(Path(found))
    base = values.get("base_model_name_or_path") or "a model it does not name"
    raise ConfigError(
        f"{name} is a {values.get('peft_type', 'peft')} adapter of {base}, not a model; `eval` takes the run that "
        "trained it, and everything the merged model: grass-ray export RUN --output MODEL, or with peft "
        f"PeftModel.from_pretrained(base, {name!r}).merge_and_unload().save_pretrained(MODEL)"
    )


# ------------------------------------------------------------------------------------------------------------- weights


def check_weights(config: ModelConfig, loaded: Any, model_class: Any) -> None:
    """Raise :class:`ConfigError` if the weight files do not fit the model that ``config.json`` describes.

    Args:
        config: which model. A model on the Hub that has not been downloaded is not checked.
        loaded: its configuration in transformers.
        model_class: its class in transformers.
    """
    from transformers.modeling_utils import load_state_dict

    folder = find_folder(config)
    files = None if folder is None else _weight_files(folder, must_exist=os.path.isdir(config.name))
    if files is None:
        return
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with clear_errors(f"cannot read {file}", "copy or download it again"):
            tensors.update(load_state_dict(str(file), map_location="meta"))
    with reports(config.name):
        model, found = model_class.from_pretrained(
            None,
            config=loaded,
            state_dict=tensors,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_misfits(config.name, model, found)
    own = dict(model.named_parameters())
    coded = [f"{name} ({t.dtype})" for name, t in tensors.items() if name in own and t.dtype not in TRAINABLE]
    if coded:
        raise ConfigError(
            f"the weights of {config.name} are quantised, though its config.json does not say how: {_first(coded)}; "
            "give the model it was made from"
        )


def _weight_files(folder: Path, *, must_exist: bool) -> list[Path] | None:
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return [path]
        listed = _read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ConfigError(f"{path} lists no weights; copy or download it again")
        shards = [folder / shard for shard in sorted(set(map(str, listed.values())))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing and must_exist:
            raise ConfigError(
                f"{len(missing)} of the {len(shards)} weight files that {path} lists are not there: "
                f"{_first(missing)}; copy or download them"
            )
        return None if missing else shards
    if must_exist:
        raise ConfigError(
            f"{folder} has no weights: none of {', '.join(WEIGHTS)}; give a folder written by save_pretrained"
        )
    return None


@contextmanager
def clear_errors(problem: str, advice: str) -> Iterator[None]:
    """Turn any error of a library that cannot use a file into a :class:`ConfigError` of one sentence."""
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library raises its own, some a bare Exception
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) < 500 else f"{said[:500]} ..."
        raise ConfigError(f"{problem}: {said.rstrip('.')}; {advice}") from error


@contextmanager
def reports(name: str) -> Iterator[None]:
    """Hide transformers' report of weights that do not fit, and raise :class:`ConfigError` on a failed conversion."""
    said: list[str] = []
    log = logging.getLogger("transformers.modeling_utils")
    level, shown_from = log.level, log.getEffectiveLevel()

    def keep(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            said.append(record.getMessage())
        return not is_report and record.levelno >= shown_from

    # at higher levels there is no report; at WARNING transformers also checks a tensor-parallel plan
    log.setLevel(logging.WARNING - 1)
    log.addFilter(keep)
    try:
        yield
    except RuntimeError as error:
        failed = re.findall(r"^(\S+) +\| *CONVERSION", "\n".join(said), re.MULTILINE)
        if not failed:
            raise
        raise ConfigError(_misfits(name, [f"cannot be made of what is there: {_first(failed)}"])) from error
    finally:
        log.removeFilter(keep)
        log.setLevel(level)


def refuse_misfits(name: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if weights are missing, unexpected or have another shape.

    Tied weights and the keys that transformers ignores for the architecture are accepted, and so are buffers that the
    model computes itself and the constants of causal masks in old checkpoints.

    Args:
        name: name of the model for the message.
        model: the loaded model.
        found: the loading info of ``from_pretrained(..., output_loading_info=True)``.
    """
    computed = {buffer for buffer, _ in model.named_buffers()} - model.state_dict().keys()
    left_over = [key for key in found["unexpected_keys"] if not _is_computed(key, computed)]
    shapes = [f"{key} {tuple(have)} instead of {tuple(want)}" for key, have, want in sorted(found["mismatched_keys"])]
    mistakes = {"missing": found["missing_keys"], "left over": left_over, "of another shape": shapes}
    parts = [f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in mistakes.items() if keys]
    if parts:
        raise ConfigError(_misfits(name, parts))


def _is_computed(key: str, computed: Iterable[str]) -> bool:
    return key.endswith(".masked_bias") or any(name == key or name.endswith(f".{key}") for name in computed)


def _misfits(name: str, parts: Iterable[str]) -> str:
    return (
        f"the weights of {name} do not fit its config.json: {'; '.join(parts)}; give a folder as save_pretrained of "
        "the bare model writes it, with its own config.json"
    )


def _first(keys: Iterable[str], number: int = 3) -> str:
    """Return the first few names as text, and how many more there are."""
    keys = sorted(keys)
    return ", ".join(keys[:number]) + (f" and {len(keys) - number} more" if len(keys) > number else "")
