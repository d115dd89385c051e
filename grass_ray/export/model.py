"""Turn a trained run into an ordinary model folder that transformers loads: adapters merged, logits compared.

``export_run(run_folder, output)`` reads ``config.yaml`` and ``checkpoint/`` of a run written by ``grass-ray train``;
``export_adapter(run_folder, output)`` writes a run's adapter alone; :mod:`grass_ray.export.delta` writes the layers
that changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_ray.config import ConfigError, DatasetSource, RunConfig, part_folder, sync
from grass_ray.paths import BUILT_IN
from grass_ray.results.record import CHECKPOINT_FOLDER
from grass_ray.tasks.conversations import own_template
from grass_ray.training.adapters import add_adapter
from grass_ray.training.checkpoint import load_weights
from grass_ray.training.metrics import default_device
from grass_ray.training.models import LoadedModel, load_model

# how much merging an adapter into its base weight may change a logit, relative to the largest logit
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
PROMPTS = ("The capital of France is", "### Instruction:\nAdd 2 and 3.\n\n### Response:\n")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how closely the reloaded model agrees with the trained one."""

    folder: Path
    difference: float
    """Largest difference of two logits, relative to the largest logit."""
    tolerance: float
    """The largest difference that is allowed."""


def find_run(folder: Path) -> RunConfig:
    """Read the configuration of the trained run in ``folder``.

    Raises:
        ConfigError: the folder holds no run, or one without a checkpoint.
    """
    missing = [name for name in ("config.yaml", CHECKPOINT_FOLDER) if not (folder / name).exists()]
    if missing:
        raise ConfigError(
            f"{folder} is not a trained run: it has no {' and no '.join(missing)}; {_what_to_give(folder)}"
        )
    return RunConfig.from_yaml(folder / "config.yaml")


def _what_to_give(folder: Path) -> str:
    if not (folder / "config.yaml").exists():
        return "give the output folder of `grass-ray train`, or a trial's folder of a sweep with --keep-checkpoints"
    config = RunConfig.from_yaml(folder / "config.yaml")
    if not config.training.steps:
        return f"it measured the untrained model; give the model itself, {config.model.name}"
    return "a sweep keeps what its trials trained with --keep-checkpoints"


def load_trained_model(folder: Path) -> LoadedModel:
    """Load the trained model of the run in ``folder``, with its adapter; needs no data.

    Raises:
        ConfigError: as :func:`find_run`, or the checkpoint cannot be read.
    """
    config = find_run(folder)
    loaded = load_model(config.model)
    model = add_adapter(loaded.model, config.method.adapter).to(default_device())
    load_weights(model, folder / CHECKPOINT_FOLDER)
    source = config.data.source
    if isinstance(source, DatasetSource) and source.chat_template is not None:
        loaded.tokenizer.chat_template = own_template(source)  # what it was trained with goes where the model goes
    return LoadedModel(model=model.eval(), tokenizer=loaded.tokenizer, revision=loaded.revision)


def check_output(folder: Path) -> None:
    """Raise :class:`ConfigError` unless ``folder`` is absent or an empty folder."""
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"the output {folder} cannot be used: {error.strerror}; name another folder") from None
    if used:
        raise ConfigError(f"the output {folder} exists and is not empty; name a new folder, or empty this one")


def is_mergeable(config: RunConfig) -> bool:
    """Whether the trained model has the architecture of its base model: no adapter, or one that can be merged."""
    return config.method.adapter is None or config.method.adapter.can("merge")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``folder`` when the block succeeds and is deleted when it fails.

    Raises:
        ConfigError: ``folder`` exists and is not empty.
    """
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with part_folder(folder) as part:
        yield part
        for path in part.rglob("*"):
            sync(path)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)


def export_run(folder: Path, output: Path) -> Export:
    """Write the trained model with ``save_pretrained``, load it again, and compare the logits of both.

    Args:
        folder: a run written by ``grass-ray train``.
        output: new or empty folder for the model. Nothing is left there if the comparison fails.

    Raises:
        ConfigError: ``folder`` is no trained run or its adapter cannot be merged, ``output`` is not empty, or the
            reloaded model differs.
    """
    from transformers import AutoModelForCausalLM

    config = find_run(folder)
    check_output(output)
    if not is_mergeable(config):
        raise ConfigError(
            f"{folder} is a run of {config.method.name}, whose adapter cannot be merged into the model's weights; "
            "give --adapter for peft's own adapter folder"
        )
    loaded = load_trained_model(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    expected = _logits(model, tokenizer)
    merge = getattr(model, "merge_and_unload", None)
    plain: Any = merge() if merge is not None else model
    with whole_folder(output) as part:
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        dtype = next(plain.parameters()).dtype
        reloaded = AutoModelForCausalLM.from_pretrained(part, dtype=dtype).to(default_device()).eval()
        # without an adapter nothing was computed anew: every bit must be there
        tolerance = TOLERANCES[dtype] if merge is not None else 0.0
        difference = _compare(expected, _logits(reloaded, tokenizer), tolerance, "model")
    return Export(folder=output, difference=difference, tolerance=tolerance)


def export_adapter(folder: Path, output: Path) -> Export:
    """Write a run's adapter as peft does, put it on the base model again, and compare the logits of both.

    ``peft.PeftModel.from_pretrained(base_model, output)`` loads what is written.

    Args:
        folder: a run written by ``grass-ray train`` with a method that has an adapter.
        output: new or empty folder for the adapter. Nothing is left there if the comparison fails.

    Raises:
        ConfigError: ``folder`` is no trained run or has no adapter, ``output`` is not empty, or the reloaded model
            differs in any bit.
    """
    import peft

    config = find_run(folder)
    check_output(output)
    if config.method.adapter is None:
        raise ConfigError(
            f"{folder} is a run of {config.method.name}, which has no adapter; leave --adapter out for the whole "
            "model, or give --delta for the layers that changed"
        )
    loaded = load_trained_model(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    expected = _logits(model, tokenizer)
    # the name the user gave, not the place in this machine's cache
    model.get_base_model().config._name_or_path = config.model.name
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = config.model.name
        adapter.revision = None if config.model.name in BUILT_IN else loaded.revision or config.model.revision
    with whole_folder(output) as part:
        # "auto" would ask the hub for the base model's vocabulary
        model.save_pretrained(str(part), save_embedding_layers=False)
        base = load_model(config.model).model.to(default_device())
        reloaded = peft.PeftModel.from_pretrained(base, str(part)).eval()
        difference = _compare(expected, _logits(reloaded, tokenizer), 0.0, "adapter")
    return Export(folder=output, difference=difference, tolerance=0.0)


def _compare(expected: Tensor, found: Tensor, tolerance: float, what: str) -> float:
    """The largest difference of two models' logits, relative to the largest logit; at most ``tolerance``."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ConfigError(
            f"the exported {what}'s logits differ from the trained model's by {difference:.2e} of the largest; "
            f"at most {tolerance:.0e} is allowed; nothing was written"
        )
    return difference


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> Tensor:
    """Logits of the prompts' tokens, one after another, float32 of shape (tokens, vocabulary)."""
    parts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        parts.append(model(input_ids=ids, use_cache=False).logits[0].float())
    return torch.cat(parts)
