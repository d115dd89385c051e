"""Ship a fine-tuned model as the tensors that changed; with its base model they give the trained model bit for bit.

A delta is a folder: ``delta.safetensors`` (the new values, under the names of the model's ``state_dict``) and
``delta.json`` (the base model, and hashes of all its tensors). To use one::

    from grass_ray.export.delta import apply_delta
    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M", dtype=torch.float32)
    apply_delta(model, "my-delta")  # a ConfigError, and an untouched model, when base or files are not the right ones

Without this package, ``model.load_state_dict(load_file("my-delta/delta.safetensors"), strict=False)`` puts the same
values in, unchecked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grass_ray.config import ConfigError, ModelConfig, check_ordinary, to_json
from grass_ray.export.manifest import FORMAT, MANIFEST, VALUES, BaseTensor, ChangedTensor, Delta, read_delta
from grass_ray.export.model import check_output, find_run, is_mergeable, load_trained_model, whole_folder
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.paths import BUILT_IN, find_model
from grass_ray.training.models import load_model

# --------------------------------------------------------------------------------------------------- write and apply


def save_delta(base: nn.Module, trained: nn.Module, folder: str | Path, *, base_model: ModelConfig) -> Delta:
    """Write the tensors of ``trained`` that differ from ``base`` in any bit, each once even if it has several names.

    Args:
        base: the model before training.
        trained: the same model after it, without adapters; on any device.
        folder: must not exist or be empty; written beside its place and moved there whole.
        base_model: where others get ``base``: its name, revision and dtype.

    Raises:
        ConfigError: ``folder`` is not empty, the models differ in architecture, or they do not differ at all.
    """
    folder = Path(folder)
    check_output(folder)
    old, new = _tensors(base), _tensors(trained)
    foreign = [
        *(old.keys() ^ new.keys()),
        *(name for name in old.keys() & new.keys() if _kind(*old[name]) != _kind(*new[name])),
    ]
    if foreign:
        raise ConfigError(
            f"the trained model is not the base model with other values: {min(foreign)} is not in both, or has another "
            "shape, dtype or tying; models with adapters must be merged first"
        )
    changed, unchanged = {}, {}
    for name, (tensor, tied) in old.items():
        entry = {**_kind(tensor, tied), "base_sha256": _sha256(tensor)}
        if _same(tensor, new[name][0]):
            unchanged[name] = BaseTensor(**entry)
        else:
            changed[name] = ChangedTensor(**entry, sha256=_sha256(new[name][0]))
    if not changed:
        raise ConfigError("the trained model is bitwise the base model; there is no delta to write")
    layers, others, num_layers = _split(trained, changed)
    delta = Delta(
        format=FORMAT,
        base_model=base_model.name,
        base_revision=base_model.revision,
        base_dtype=base_model.dtype,
        layers=layers,
        num_layers=num_layers,
        others=others,
        delta_bytes=sum(_num_bytes(new[name][0]) for name in changed),
        model_bytes=sum(_num_bytes(tensor) for tensor, _ in new.values()),
        changed=changed,
        unchanged=unchanged,
    )
    with whole_folder(folder) as part:
        values = {name: new[name][0].detach().cpu().contiguous() for name in changed}
        save_file(values, part / VALUES, metadata={"format": "pt"})
        (part / MANIFEST).write_text(to_json(delta, indent=1) + "\n", encoding="utf-8")
        _read_values(part, read_delta(part))  # what is on the disk, hashed again
    return delta


def apply_delta(model: nn.Module, folder: str | Path) -> Delta:
    """Turn the base model into the trained one, bit for bit. Everything is checked before anything is written.

    Args:
        model: the delta's base model in the delta's dtype, on any device; changed in place.
        folder: a folder written by :func:`save_delta`.

    Raises:
        ConfigError: the folder is no readable delta, or ``model`` differs from the delta's base model in any bit. The
            model is then unchanged.
    """
    folder = Path(folder)
    delta = read_delta(folder)
    own = _tensors(model)
    _check_base(delta, own, folder)
    values = _read_values(folder, delta)
    with torch.no_grad():
        for name, value in values.items():
            own[name][0].copy_(value)
    return delta


# ------------------------------------------------------------------------------------------------- runs and folders


def is_delta(folder: Path) -> bool:
    """Whether ``folder`` holds a delta, readable or not."""
    return (folder / MANIFEST).is_file()


def export_delta(run_folder: Path, output: Path) -> Delta:
    """Write the tensors of the base model that the run in ``run_folder`` changed.

    Args:
        run_folder: a run written by ``grass-ray train`` with a method without an adapter.
        output: where the delta goes; must not exist or be empty.

    Raises:
        ConfigError: as :func:`save_delta`, or ``run_folder`` is no trained run, or one with an adapter.
    """
    config = find_run(run_folder)
    check_output(output)
    if config.method.adapter is not None:
        raise ConfigError(
            f"{run_folder} is a run of {config.method.name}, which trained an adapter and no layer of the base model; "
            f"give --adapter for peft's own adapter folder{', or neither for the merged model' * is_mergeable(config)}"
        )
    base = load_model(config.model)
    source = config.model.model_copy(update={"revision": base.revision or config.model.revision})
    return save_delta(base.model, load_trained_model(run_folder).model, output, base_model=source)


def export_from_delta(folder: Path, output: Path, *, base_model: str | None = None) -> Delta:
    """Write the model that a delta and its base model make as an ordinary folder that transformers loads.

    Code from the hub is never run. If the base model has code of its own, load it yourself and use :func:`apply_delta`.

    Args:
        folder: a folder written by :func:`save_delta`.
        output: where the model goes; must not exist or be empty. Nothing is left there on an error.
        base_model: built-in name, hub id or folder of the base model. Defaults to the one that the delta names.

    Raises:
        ConfigError: as :func:`apply_delta`, the base model cannot be loaded, or what was written differs in any bit
            when loaded again.
    """
    from transformers import AutoModelForCausalLM

    delta = read_delta(folder)
    check_output(output)
    loaded = load_model(_base_config(delta, base_model, folder))
    apply_delta(loaded.model, folder)
    with whole_folder(output) as part:
        loaded.model.save_pretrained(part)
        loaded.tokenizer.save_pretrained(part)
        reloaded = AutoModelForCausalLM.from_pretrained(part, dtype=next(loaded.model.parameters()).dtype)
        expected, found = _tensors(loaded.model), _tensors(reloaded)
        wrong = [
            *(expected.keys() ^ found.keys()),
            *(name for name in expected.keys() & found.keys() if not _same(expected[name][0], found[name][0])),
        ]
        if wrong:
            raise ConfigError(f"the exported model's {min(wrong)} differs when loaded again; nothing was written")
    return delta


def _base_config(delta: Delta, name: str | None, folder: Path) -> ModelConfig:
    values: dict[str, Any] = {"name": delta.base_model if name is None else find_model(name), "dtype": delta.base_dtype}
    # a built-in's revision says which file it came from; another base's revision is not the delta's to choose
    if name is None and delta.base_model not in BUILT_IN:
        values["revision"] = delta.base_revision
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        raise ConfigError(f"{folder} is not a readable delta: dtype {delta.base_dtype!r} is unknown") from error


# -------------------------------------------------------------------------------------------------- tensors and hashes


def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """The tensors of ``model.state_dict()`` by their first name, each with its other names."""
    found: dict[tuple[object, ...], tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())
        found.setdefault(key, (tensor, []))[1].append(name)
    return {names[0]: (tensor, tuple(names[1:])) for tensor, names in found.values()}


def _kind(tensor: Tensor, tied: tuple[str, ...]) -> dict[str, Any]:
    return {"shape": tuple(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "tied": tied}


def _bits(tensor: Tensor) -> Tensor:
    """The raw bytes on the host, shape (bytes,): NaN equals itself, and -0.0 is not 0.0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_bits(tensor).numpy().data).hexdigest()


def _split(model: nn.Module, names: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    """Decoder layers with a tensor of ``names``, the names outside the layers, and the number of layers."""
    stack = find_decoder_stack(model)
    prefix = stack.path + "."
    layers = {int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)}
    others = tuple(name for name in names if not name.startswith(prefix))
    return tuple(sorted(layers)), others, stack.num_layers


def _check_base(delta: Delta, own: dict[str, tuple[Tensor, tuple[str, ...]]], folder: Path) -> None:
    """Raise :class:`ConfigError` unless ``own`` holds the base model's tensors with the same bits, and no others."""
    recorded: dict[str, BaseTensor] = {**delta.changed, **delta.unchanged}
    wanted = f"{folder} belongs on {delta.source}; this is another base model, revision or dtype"
    for name, entry in recorded.items():
        if name not in own:
            raise ConfigError(f"{wanted}: it has no {name} of its own")
        found, expected = _kind(*own[name]), entry.model_dump(include={"shape", "dtype", "tied"})
        if found != expected:
            raise ConfigError(f"{wanted}: its {name} is {_words(found)}, not {_words(expected)}")
    surplus = own.keys() - recorded.keys()
    if surplus:
        raise ConfigError(f"{wanted}: the delta's base has no {min(surplus)}")
    for name, entry in recorded.items():
        if _sha256(own[name][0]) != entry.base_sha256:
            raise ConfigError(f"{wanted}: its {name} has other values")


def _words(kind: dict[str, Any]) -> str:
    tied = f", tied to {' and '.join(kind['tied'])}" if kind["tied"] else ""
    return f"{kind['dtype']} of shape {tuple(kind['shape'])}{tied}"


def _read_values(folder: Path, delta: Delta) -> dict[str, Tensor]:
    """The new values, checked against the hashes in ``delta``."""
    try:
        check_ordinary(folder / VALUES)
        values = load_file(folder / VALUES)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} is not a readable delta: {VALUES}: {error}") from error
    if values.keys() != delta.changed.keys():
        name = min(values.keys() ^ delta.changed.keys())
        raise ConfigError(f"{folder} is damaged: {name} is not in both {VALUES} and {MANIFEST}")
    for name, value in values.items():
        entry = delta.changed[name]
        if _kind(value, entry.tied) != entry.model_dump(include={"shape", "dtype", "tied"}):
            raise ConfigError(f"{folder} is damaged: {name} in {VALUES} is not {_words(entry.model_dump())}")
        if _sha256(value) != entry.sha256:
            raise ConfigError(f"{folder} is damaged: {name} in {VALUES} has not the values that were written")
    return values
