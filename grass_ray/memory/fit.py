"""Check whether a run fits into memory before it starts.

::

    config = fit_to_memory(config)      # raises if the run cannot fit; offload "auto" becomes the mode that fits

A run is refused only if its prediction exceeds the memory by more than the tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch

from grass_ray.config import ConfigError, RunConfig
from grass_ray.memory.allocations import DeviceKind
from grass_ray.memory.plan import CannotPlanError, MemoryPlan, Mode, Planner, applicable_modes
from grass_ray.memory.settings import Fit, fewest_recomputed, find_fit, needed_bytes, own_mode
from grass_ray.memory.step import StepShape
from grass_ray.memory.trained_units import TrainedUnits
from grass_ray.optim.host_memory import available_bytes
from grass_ray.tasks.sources import load_train_rows
from grass_ray.training.batches import Batches
from grass_ray.training.metrics import default_device
from grass_ray.training.models import load_tokenizer
from grass_ray.training.report import GIB, RESERVE_BYTES

# relative error of the predictions that a refusal allows for: see benchmarks/results/memory_plan.md
TOLERANCE = 0.1
# number of steps whose batches are read to find the longest one
MAX_STEPS_READ = 2000


class MemoryRefusalError(ConfigError):
    """A run that cannot fit into memory."""


def plan_decided(planner: Planner, trained: TrainedUnits, shape: StepShape, mode: Mode, memory: float) -> MemoryPlan:
    """The plan of a step; where ``auto`` shall say which layers are recomputed, with as few as fit into ``memory``.

    ``auto`` leaves room for the error of predictions, and takes all layers if nothing fits.

    Raises:
        ConfigError: as :meth:`Planner.plan`.
    """
    if shape.checkpointing != "auto":
        return planner.plan(trained, shape, mode)
    fewest = fewest_recomputed(planner, trained, shape, mode, memory / (1 + TOLERANCE))
    return fewest or planner.plan(trained, replace(shape, checkpointing="all"), mode)


# ------------------------------------------------------------------------------------------------ before a run starts


def fit_to_memory(
    config: RunConfig, device: torch.device | None = None, workers: int = 1, memory: int | None = None
) -> RunConfig:
    """Check that a run fits into memory, and decide what is ``auto``.

    Offload becomes ``resident`` if that fits, else ``lazy``. Gradient checkpointing becomes that of as few layers as
    fit; on a CPU it becomes ``none`` unless ``memory`` is given.

    Args:
        config: configuration of the run, validated.
        device: where it would run. By default the first CUDA device, else the CPU.
        workers: number of workers that share its micro-batches, each with the whole model.
        memory: bytes that the run may take; None takes those of the device.

    Returns:
        The configuration without ``auto``. Unchanged, with a warning, if the memory cannot be predicted.

    Raises:
        MemoryRefusalError: the prediction exceeds the memory by more than the tolerance. The message says what is
            predicted, what there is and what to change.
    """
    device = device or default_device()
    training = config.training
    if training.gradient_checkpointing == "auto" and device.type == "cpu" and memory is None:
        training = training.model_copy(update={"gradient_checkpointing": "none"})
        config = config.model_copy(update={"training": training})
    available = total_bytes(device) if memory is None else memory
    if available is None or not training.steps:
        return config
    try:
        planner = Planner(config.model, "cuda" if device.type == "cuda" else "cpu", workers)
        return _fit_to(config, planner, available - RESERVE_BYTES)
    except CannotPlanError as error:
        warnings.warn(f"{error}; the run starts unchecked", stacklevel=2)
        return config


def _fit_to(config: RunConfig, planner: Planner, memory: int) -> RunConfig:
    method, training, device = config.method, config.training, planner.device
    trained = planner.apply(method, training.steps)
    own = own_mode(method)
    automatic = method.offload == "auto" and "lazy" in applicable_modes(method)
    modes: tuple[Mode, ...] = (own, "lazy") if automatic else (own,)
    # rows as long as the configuration allows; only if these do not fit, the rows are read to find the longest one
    plans: list[MemoryPlan] = []
    for shape, limit in _shapes(config, memory):
        plans = [plan_decided(planner, trained, shape, mode, memory) for mode in modes]
        for plan in plans:
            if needed_bytes(plan, device) <= limit:
                chosen = plan.offload if automatic else method.offload
                changed = {"gradient_checkpointing": plan.shape.checkpointing}
                return config.model_copy(
                    update={
                        "method": method.model_copy(update={"offload": chosen}),
                        "training": training.model_copy(update=changed),
                    }
                )
    smallest = min(plans, key=lambda plan: needed_bytes(plan, device))
    shape = replace(smallest.shape, checkpointing=training.gradient_checkpointing)
    fit = find_fit(planner, method, shape, memory, training.steps)
    raise MemoryRefusalError(_refusal(config, smallest, device, memory, fit))


def _shapes(config: RunConfig, memory: int) -> Iterator[tuple[StepShape, float]]:
    """Steps of a run, and what they may take: the longest that its configuration allows, then that of its own rows."""
    automatic = config.training.gradient_checkpointing == "auto"
    longest = longest_shape(config)
    if automatic:
        # nothing is recomputed for rows that may not exist
        yield replace(longest, checkpointing="none"), memory / (1 + TOLERANCE)
    else:
        yield longest, memory * (1 + TOLERANCE)
    real = real_shape(config)
    if automatic:
        # another offload mode costs less than recomputing
        yield replace(real, checkpointing="none"), memory / (1 + TOLERANCE)
    yield real, memory * (1 + TOLERANCE)


def longest_shape(config: RunConfig) -> StepShape:
    """The step of a run if every row had ``data.max_length_tokens`` tokens, all of them labelled."""
    training = config.training
    return StepShape(
        rows=training.batch_size // training.accumulation_steps,
        tokens=config.data.max_length_tokens,
        micro_batches=training.accumulation_steps,
        checkpointing=training.gradient_checkpointing,
    )


def real_shape(config: RunConfig) -> StepShape:
    """The longest step of a run. Reads and tokenises its rows; loads no weights."""
    shape = longest_shape(config)
    batches = Batches(
        load_train_rows(config.data).rows,
        load_tokenizer(config.model),
        config.data,
        batch_size=config.training.batch_size,
        accumulation_steps=config.training.accumulation_steps,
        seed=config.seed,
    )
    rows = tokens = labelled = 0
    for step in range(min(config.training.steps, MAX_STEPS_READ)):
        for batch in batches[step]:
            rows, tokens = max(rows, batch.input_ids.shape[0]), max(tokens, batch.input_ids.shape[1])
            labelled = max(labelled, len(batch.labelled_positions()))
    return replace(shape, rows=rows, tokens=tokens, labelled=labelled)


def _refusal(config: RunConfig, plan: MemoryPlan, device: DeviceKind, memory: int, fit: Fit | None) -> str:
    named = {
        "weights": plan.weights,
        "gradients": plan.gradients,
        "optimizer states": plan.states,
        "staging": plan.staging,
        "activations": plan.activations,
        "logits": plan.logits,
        "workspace": plan.workspace,
        "states on the host": plan.host_bytes if device == "cpu" else 0,
    }
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in named.items() if size >= GIB / 100)
    there = "this GPU leaves it" if device == "cuda" else "this machine leaves it"
    advice = (
        f"it would fit with --set {' '.join(fit.settings)} ({needed_bytes(fit.plan, device) / GIB:.2f} GiB)"
        if fit is not None and fit.changes
        else "a smaller model, shorter rows (data.max_length_tokens) or another method (grass-ray plan shows all)"
    )
    return (
        f"{config.name} cannot fit: predicted to need {needed_bytes(plan, device) / GIB:.2f} GiB ({parts}) with "
        f"{plan.shape.rows} rows of up to {plan.shape.tokens} tokens and offload {plan.offload}, but {there} "
        f"{memory / GIB:.2f} GiB; {advice}. --no-memory-check starts it all the same"
    )


def total_bytes(device: torch.device) -> int | None:
    """Total memory of a CUDA device, or available memory of a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return available_bytes()
