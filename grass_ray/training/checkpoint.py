"""Save a run and resume it bit for bit: weights, optimizer, sampler, schedule, position in the data, random states.

A checkpoint is a folder with ``weights.safetensors`` (the parameters that can train), ``optimizer.pt`` (tensors and
plain values, read with ``weights_only=True``) and ``state.json``. It is written next to its place and then renamed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from grass_ray.config import ConfigError, from_json, to_json
from grass_ray.optim.sharded import assign, reshard, whole
from grass_ray.training.loop import TrainState

FORMAT = 2


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
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".part-") as name:
        temporary, before = Path(name) / "whole", Path(name) / "before"
        temporary.mkdir()
        _write(state, weights, states, temporary)
        try:
            if folder.exists():
                folder.rename(before)
            temporary.rename(folder)
        finally:
            if before.exists() and not folder.exists():  # interrupted between the two
                before.rename(folder)


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


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Restore ``state``, which was just prepared from the same configuration, from the checkpoint in ``folder``.

    Raises:
        ConfigError: the folder is not a readable checkpoint, or belongs to another model or method.
    """
    try:
        values = from_json((folder / "state.json").read_text(encoding="utf-8"))
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            names = set(file.keys())
        tensors = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} is not a readable checkpoint: {error}") from error
    if values.get("format") != FORMAT:
        raise ConfigError(f"{folder} has checkpoint format {values.get('format')}; this version reads {FORMAT}")
    reshard(state.model)
    state.optimizer.synchronize()
    expected = _trained_parameters(state)
    if names != expected.keys():
        raise ConfigError(f"{folder} belongs to another model or method: {len(names)} tensors, not {len(expected)}")
    load_weights(state.model, folder)
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
        weights = load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} is not a readable checkpoint: {error}") from error
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
