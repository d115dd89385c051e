"""Does a run fit into memory, and if not, what would: used before a run starts and by ``grass-ray plan``.

    config = fit_to_memory(config)      # refuses what cannot fit; an offload mode of auto becomes the one that does

A run is refused only when its prediction exceeds the memory by more than the plan's tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from grass_ray.config import ConfigError, MethodConfig, RunConfig
from grass_ray.memory.allocations import DeviceKind
from grass_ray.memory.plan import (
    CannotPlanError,
    MemoryPlan,
    Mode,
    Planner,
    applicable_modes,
)
from grass_ray.memory.step import StepShape
from grass_ray.optim.host_memory import available_bytes
from grass_ray.tasks.sources import load_train_rows
from grass_ray.training.batches import Batches
from grass_ray.training.metrics import default_device
from grass_ray.training.models import load_tokenizer
from grass_ray.training.report import GIB

# how far a prediction may be off: benchmarks/results/memory_plan.md
TOLERANCE = 0.1
# a device's memory that no allocator of ours sees: CUDA context and kernels; on a CPU the process itself
RESERVE_BYTES = GIB // 2
# longest run whose every batch is looked at before it is refused
MOST_STEPS_READ = 2000


class MemoryRefusalError(ConfigError):
    """A run that cannot fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings under which a method fits, as ``dotted.key=value``; none where it fits as it is."""

    settings: tuple[str, ...]
    plan: MemoryPlan


def needed_bytes(plan: MemoryPlan, device: DeviceKind) -> int:
    """Memory of the device that a plan takes; on a CPU the states on the host are in the same memory."""
    return plan.peak_bytes + (plan.host_bytes if device == "cpu" else 0)


def find_fit(
    planner: Planner, method: MethodConfig, shape: StepShape, memory: int, training_steps: int = 1000
) -> Fit | None:
    """The first settings with which ``method`` fits into ``memory`` bytes; those that change and cost least come first.

    Observation in this order: another offload mode, gradient checkpointing, smaller micro-batches of the same step, one
    active layer, embeddings and head frozen. Raises :class:`ConfigError` as :meth:`Planner.plan_modes`.
    """
    for changed, of_method in _changes_of_method(method):
        trains = planner.put_on(changed, training_steps)
        modes = [mode for mode in _preferred_modes(changed) if planner.least_bytes(trains, mode) <= memory]
        for smaller, of_shape in _changes_of_shape(changed, shape) if modes else ():
            for mode in modes:
                plan = planner.plan(trains, smaller, mode)
                if needed_bytes(plan, planner.device) <= memory:
                    of_mode = () if mode == _own_mode(method) else (f"method.offload={mode}",)
                    return Fit(settings=(*of_method, *of_mode, *of_shape), plan=plan)
    return None


def _preferred_modes(method: MethodConfig) -> list[Mode]:
    """Fast modes first: the method's own, states moved at a switch, states streamed."""
    possible = applicable_modes(method)
    wished: tuple[Mode, ...] = (_own_mode(method), "resident", "lazy")
    return list(dict.fromkeys(mode for mode in wished if mode in possible))


def _own_mode(method: MethodConfig) -> Mode:
    """The mode that a configuration asks for, where ``resident`` is no other than ``none`` the latter."""
    mode: Mode = "resident" if method.offload == "auto" else method.offload
    possible = applicable_modes(method)
    return mode if mode in possible else "none"


def _changes_of_method(method: MethodConfig) -> Iterator[tuple[MethodConfig, tuple[str, ...]]]:
    yield method, ()
    settings: tuple[str, ...] = ()
    if getattr(method.sampler, "num_active_layers", 1) != 1 and method.granularity == "layer":
        settings = ("method.sampler.num_active_layers=1",)
        method = method.model_copy(update={"sampler": method.sampler.model_copy(update={"num_active_layers": 1})})
        yield method, settings
    if method.sampler.kind != "all" and (method.train_embeddings or method.train_head):
        settings = (*settings, "method.train_embeddings=false", "method.train_head=false")
        yield method.model_copy(update={"train_embeddings": False, "train_head": False}), settings


def _changes_of_shape(method: MethodConfig, shape: StepShape) -> Iterator[tuple[StepShape, tuple[str, ...]]]:
    """As it is, with checkpointing, and in smaller micro-batches, halved down to one row."""
    yield shape, ()
    settings: tuple[str, ...] = ()
    if not shape.checkpointing and method.allows_checkpointing:
        shape = replace(shape, checkpointing=True)
        settings = ("training.gradient_checkpointing=true",)
        yield shape, settings
    while shape.rows > 1 and shape.rows % 2 == 0:
        shape = replace(shape, rows=shape.rows // 2, micro_batches=shape.micro_batches * 2)
        yield shape, (*settings, f"training.accumulation_steps={shape.micro_batches}")


# ------------------------------------------------------------------------------------------------ before a run starts


def fit_to_memory(config: RunConfig, device: torch.device | None = None, workers: int = 1) -> RunConfig:
    """The configuration as it can run here: offload ``auto`` becomes resident if that fits, else lazy.

    Args:
        config: of a run, checked.
        device: where it would run; None takes the first CUDA device, else the CPU.
        workers: how many share its micro-batches, each with the whole model.

    Raises:
        MemoryRefusalError: even the best applicable mode is predicted to exceed the device's memory by more than the
            tolerance; the message says what is predicted, what there is and what to change.
    """
    device = device or default_device()
    memory = total_bytes(device)
    if memory is None or not config.training.steps:
        return config
    try:
        planner = Planner(config.model, "cuda" if device.type == "cuda" else "cpu", workers)
        return _fit_to(config, planner, memory - RESERVE_BYTES)
    except CannotPlanError as error:
        warnings.warn(f"{error}; the run starts unchecked", stacklevel=2)
        return config


def _fit_to(config: RunConfig, planner: Planner, memory: int) -> RunConfig:
    method, device = config.method, planner.device
    trains = planner.put_on(method, config.training.steps)
    own = _own_mode(method)
    automatic = method.offload == "auto" and method.optimizer.projection is None and "lazy" in applicable_modes(method)
    modes: tuple[Mode, ...] = (own, "lazy") if automatic else (own,)
    most = memory * (1 + TOLERANCE)
    # the longest rows that the cut-off allows, then, only where these are too long, the rows that there really are
    for shape_of in (longest_shape, real_shape):
        shape = shape_of(config)
        plans = [planner.plan(trains, shape, mode) for mode in modes]
        for plan in plans:
            if needed_bytes(plan, device) <= most:
                chosen = plan.offload if automatic else method.offload
                return config.model_copy(update={"method": method.model_copy(update={"offload": chosen})})
    least = min(plans, key=lambda plan: needed_bytes(plan, device))
    fit = find_fit(planner, method, shape, memory, config.training.steps)
    raise MemoryRefusalError(_refusal(config, least, device, memory, fit))


def longest_shape(config: RunConfig) -> StepShape:
    """The step of a run whose every row is as long as the cut-off, with a label everywhere."""
    training = config.training
    return StepShape(
        rows=training.batch_size // training.accumulation_steps,
        tokens=config.data.max_length_tokens,
        micro_batches=training.accumulation_steps,
        checkpointing=training.gradient_checkpointing,
    )


def real_shape(config: RunConfig) -> StepShape:
    """The longest step of a run, from its own rows; tokenises them, loads no weights."""
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
    for step in range(min(config.training.steps, MOST_STEPS_READ)):
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
        if fit is not None and fit.settings
        else "a smaller model, shorter rows (data.max_length_tokens) or another method (grass-ray plan shows all)"
    )
    return (
        f"{config.name} cannot fit: predicted to need {needed_bytes(plan, device) / GIB:.2f} GiB ({parts}) with "
        f"{plan.shape.rows} rows of up to {plan.shape.tokens} tokens and offload {plan.offload}, but {there} "
        f"{memory / GIB:.2f} GiB; {advice}. --no-memory-check starts it all the same"
    )


def total_bytes(device: torch.device) -> int | None:
    """All memory of a CUDA device, what is available on a CPU; None where nothing says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return available_bytes()
