"""Hashes of weights, which a record keeps for the base model and the trained model.

::

    base_model_sha256(config.model)      # for one file, what ``sha256sum model.safetensors`` prints
    parameters_sha256(run.state.model)   # of all parameters as they are now

Each file is read once per process, which takes two seconds for 4 GB on one core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from grass_ray.config import ModelConfig
from grass_ray.optim.sharded import whole
from grass_ray.training.built_in import cache_folder
from grass_ray.training.model_files import find_folder
from grass_ray.training.models import load_model

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def base_model_sha256(config: ModelConfig) -> str | None:
    """Hash the weight files that ``load_model(config)`` reads.

    For one file this is its SHA-256. For several files it is that of the lines ``<sha256>  <name>``, sorted by name, as
    printed by ``sha256sum *.safetensors | sha256sum``. For the built-in ``tiny``, which has no file, it is that of its
    parameters.

    Returns:
        64 hexadecimal digits, or None if the files are not on this machine. Nothing is downloaded.
    """
    if config.name == "tiny":
        return _tiny_sha256()
    folder = model_folder(config)
    for pattern in _WEIGHTS:
        files = sorted(folder.glob(pattern)) if folder is not None else []
        if files:
            return _sha256_of(files)
    return None


def model_folder(config: ModelConfig) -> Path | None:
    """The folder with a model's files; None for the built-in ``tiny``, and if they are not on this machine."""
    if config.name == "tiny":
        return None
    folder = cache_folder() / config.name if config.name == "smollm2-135m" else find_folder(config)
    return folder if folder is not None and folder.is_dir() else None


def _sha256_of(files: Sequence[Path]) -> str:
    digests = {path.name: _file_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


@lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _tiny_sha256() -> str:
    model = load_model(ModelConfig(name="tiny", dtype="float32")).model
    return _sha256_of_tensors(parameter for _, parameter in sorted(model.named_parameters()))


def checkpoint_bytes(model: nn.Module) -> int:
    """The size in bytes of what an export holds: the adapter as peft saves it, else all weights, shared ones once."""
    adapter = getattr(model, "peft_config", None)
    if adapter:
        import peft

        tensors: Iterable[torch.Tensor] = peft.get_peft_model_state_dict(model).values()
    else:
        tensors = model.parameters()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameters_sha256(model: nn.Module) -> str:
    """Hash the bits of all parameters in the order of their names.

    The hash does not depend on the device or on sharding. Collective: call on every rank if the model is sharded.
    """
    return _sha256_of_tensors(parameter for _, parameter in sorted(model.named_parameters()))


def _sha256_of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
