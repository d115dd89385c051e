"""Save a run and resume it bit for bit: weights, optimizer, sampler, schedule, position in the data, random states.

A checkpoint is a folder with ``weights.safetensors`` (the parameters that can train), ``optimizer.pt`` (tensors and
plain values, read with ``weights_only=True``), ``state.json``, and the hashes of these files in ``SHA256SUMS``, which
``sha256sum --check`` reads. It is written next to its place and then renamed: at any moment, of a kill or a power cut,
the last one or the new one is there whole.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from grass_ray.config import ConfigError, check_ordinary, from_json, part_folder, read_text, sync, to_json
from grass_ray.optim.sharded import assign, reshard, whole
from grass_ray.reading import reason
from grass_ray.training.loop import TrainState

FORMAT = 2
_FILES = {"weights.safetensors", "optimizer.pt", "state.json"}
_SUMS = "SHA256SUMS"
# what a file that is no checkpoint's can make its readers raise
_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError),
    *(OverflowError, SafetensorError, UnpicklingError),
)


def save_checkpoint(state: TrainState, folder: Path | None) -> None:
    """Write ``state`` to ``folder``. A previous checkpoint is replaced once the new one is complete.

    The checkpoint does not depend on the number of workers or on sharding. Collective if the model is sharded: call it
    on every rank, with a folder on rank 0 and None on the others. Without sharding, None does nothing.
    """
    optimizer = state.optimizer
    if folder is None and not optimizer.sharded:
        return
    optimizer.synchronize()
    reshard(state.model)
    weights = {}
    for name, parameter in _trained_parameters(state).items():
        weight = whole(parameter.data)  # one tensor at a time, and kept on one worker only
        if folder is not None:
            weights[name] = weight.cpu() if optimizer.sharded else weight
    states = optimizer.full_state_dict() if optimizer.sharded else optimizer.state_dict()
    if folder is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore_previous(folder)
    with part_folder(folder) as part:
        _write(state, weights, states, part)
        try:
            if folder.exists():
                folder.rename(_previous(folder))
            part.rename(folder)
            sync(folder.parent)
        finally:
            restore_previous(folder)


def restore_previous(folder: Path) -> None:
    """Put the last checkpoint back if its replacement was cut off between taking it away and bringing the new one."""
    before = _previous(folder)
    if before.is_dir() and not folder.exists():
        before.rename(folder)
    if before.is_symlink():  # what it points to stays
        before.unlink()
    shutil.rmtree(before, ignore_errors=True)


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


def _write(state: TrainState, weights: dict[str, Any], states: dict[str, Any], temporary: Path) -> None:
    save_file(weights, temporary / "weights.safetensors")
    torch.save({"optimizer": states, "random": _random_states()}, temporary / "optimizer.pt")
    values = {
        "format": FORMAT,
        "probed": state.probed,
        "trained": state.trained,
        "train_s": state.train_s,
        "measure_s": state.measure_s,
        "timed_tokens": state.timed_tokens,
        "timed_s": state.timed_s,
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
        "engagement": state.tracer.state_dict(),
        "memory": state.memory.state_dict(),
        "series": state.series,
    }
    (temporary / "state.json").write_text(to_json(values, keep=True), encoding="utf-8")
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
    (temporary / _SUMS).write_text("".join(sums), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sums(folder: Path) -> None:
    """Raise ``ValueError`` if a file is not what was written; checkpoints of earlier versions have no sums."""
    for name in (*_FILES, _SUMS):
        check_ordinary(folder / name)
    if (folder / _SUMS).exists():
        sums = dict(line.split("  ")[::-1] for line in read_text(folder / _SUMS).splitlines())
        if sums.keys() != _FILES:
            raise ValueError(f"{_SUMS} names {', '.join(sums) or 'no files'}, not {', '.join(sorted(_FILES))}")
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                raise ValueError(f"{name} is not the file that was written; its hash in {_SUMS} is another")


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Restore ``state``, which was just prepared from the same configuration, from the checkpoint in ``folder``.

    Raises:
        ConfigError: the folder is not a readable checkpoint, or belongs to another model or method.
    """
    try:
        _check_sums(folder)
        values = from_json(read_text(folder / "state.json"))
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            names = set(file.keys())
        tensors = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        raise ConfigError(f"{folder} is not a readable checkpoint: {reason(error)}") from error
    if not isinstance(values, dict) or not isinstance(tensors, dict):
        raise ConfigError(f"{folder} is not a readable checkpoint: its files hold something else")
    if values.get("format") != FORMAT:
        raise ConfigError(f"{folder} has checkpoint format {values.get('format')}; this version reads {FORMAT}")
    reshard(state.model)
    state.optimizer.synchronize()
    expected = _trained_parameters(state)
    if names != expected.keys():
        raise ConfigError(f"{folder} belongs to another model or method: {len(names)} tensors, not {len(expected)}")
    try:
        _copy_weights(state.model, folder)
        _restore(state, values, tensors)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{folder} does not fit this run: {reason(error)}") from error


def _restore(state: TrainState, values: dict[str, Any], tensors: dict[str, Any]) -> None:
    state.optimizer.load_state_dict(tensors["optimizer"])
    state.schedule.load_state_dict(values["schedule"] | {"lr_lambdas": [None] * len(state.optimizer.param_groups)})
    state.tracer.load_state_dict(values["engagement"])
    state.memory.load_state_dict(values["memory"])
    for name in ("probed", "trained", "train_s", "measure_s", "timed_tokens", "timed_s"):
        setattr(state, name, values[name])
    state.series = {name: [(int(step), value) for step, value in points] for name, points in values["series"].items()}
    _restore_random_states(tensors["random"])


def load_weights(model: Any, folder: Path) -> None:
    """Copy the trained weights of a checkpoint into ``model``, which already has the adapters of the run.

    Raises:
        ConfigError: the folder is not a readable checkpoint, or belongs to another model or method.
    """
    try:
        _check_sums(folder)
        _copy_weights(model, folder)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{folder} is not a readable checkpoint: {reason(error)}") from error


def _copy_weights(model: Any, folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    own = dict(model.named_parameters())
    foreign = [name for name, weight in weights.items() if name not in own or own[name].shape != weight.shape]
    if foreign:
        raise ConfigError(f"{folder} belongs to another model or method: {foreign[0]} has no place in this one")
    for name, weight in weights.items():
        assign(own[name], weight)


def _trained_parameters(state: TrainState) -> dict[str, nn.Parameter]:
    """Return all parameters that the optimizer may change, by name."""
    managed = {p for group in state.optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in state.model.named_parameters() if p in managed}


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
