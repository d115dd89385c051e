"""Find settings with which a method fits into memory, the least change first.

::

    fit = find_fit(planner, METHODS["grass"].config, StepShape(rows=4, tokens=1024), memory=16 * GIB)
    print(fit.settings, fit.plan.peak_bytes)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from grass_ray.config import GradientCheckpointing, MethodConfig
from grass_ray.memory.allocations import DeviceKind
from grass_ray.memory.equal_layers import FOLLOWED
from grass_ray.memory.plan import DEFAULT_TRAIN_STEPS, MemoryPlan, Mode, Planner, applicable_modes
from grass_ray.memory.step import StepShape
from grass_ray.memory.trained_units import TrainedUnits
from grass_ray.overrides import Changes, apply, assignment

# of the peak: gradients that take less than this are not worth a word about clipping
SHARE_OF_GRADIENTS = 0.02
# what lets each layer be updated inside backward: gradients are not clipped then
IN_BACKWARD: Changes = {"method.optimizer.max_grad_norm": None, "method.update_in_backward": True}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Changes to a configuration with which a method fits, by dotted key, and the plan with them.

    No changes if it fits as it is.
    """

    changes: Changes
    plan: MemoryPlan

    @property
    def settings(self) -> list[str]:
        """The changes as ``--set`` reads them."""
        return [assignment(key, value) for key, value in self.changes.items()]


def needed_bytes(plan: MemoryPlan, device: DeviceKind) -> int:
    """Memory of the device that a plan needs. On a CPU, states on the host are in the same memory."""
    return plan.peak_bytes + (plan.host_bytes if device == "cpu" else 0)


def fewest_recomputed(
    planner: Planner, trained: TrainedUnits, shape: StepShape, mode: Mode, memory: float
) -> MemoryPlan | None:
    """The plan with as few recomputed layers as bring a step into ``memory`` bytes; None if all of them do not.

    Layers are taken from the first one up: backward stops at the lowest active layer, so they are the ones that seldom
    need to be recomputed, while they save as much as others where the lowest layer is active.
    """

    def plan(setting: GradientCheckpointing) -> tuple[MemoryPlan, int]:
        found = planner.plan(trained, replace(shape, checkpointing=setting), mode)
        return found, needed_bytes(found, planner.device)

    without, most = plan("none")
    if most <= memory:
        return without
    too_few, enough = 0, trained.num_layers
    nearly_all = max(enough - FOLLOWED, enough // 2)  # a step that is followed with so many tells of most others, too
    fitting, least = plan(nearly_all)
    if least <= memory:
        enough = nearly_all
    else:
        too_few, most = nearly_all, least
        fitting, least = plan("all")
        if least > memory:
            return None
    while enough - too_few > 1:
        # each layer saves about as much as any other
        guess = too_few + math.ceil((enough - too_few) * (most - memory) / (most - least))
        layers = min(max(guess, too_few + 1), enough - 1)
        found, needed = plan(layers)
        if needed <= memory:
            fitting, enough, least = found, layers, needed
        else:
            too_few, most = layers, needed
    return fitting


def find_fit(
    planner: Planner, method: MethodConfig, shape: StepShape, memory: int, train_steps: int = DEFAULT_TRAIN_STEPS
) -> Fit | None:
    """Find settings with which ``method`` fits into ``memory`` bytes.

    Tried in this order, so that what changes and costs least comes first: another offload mode, gradient checkpointing
    of as few layers as fit, smaller micro-batches of the same step, one active layer, frozen embeddings and head; then
    the same with streamed weights; then all of that with updates inside backward, which do without clipping.

    Returns:
        The first that fits; None if none does.

    Raises:
        ConfigError: the method cannot train this model.
    """
    for of_method in _method_changes(method, planner.workers):
        changed = _changed(method, of_method)
        trained = planner.apply(changed, train_steps)
        modes = [mode for mode in _preferred_modes(changed) if planner.min_bytes(trained, mode) <= memory]
        for smaller in _smaller_shapes(shape) if modes else ():
            for mode in modes:
                if smaller.checkpointing == "auto":
                    plan = fewest_recomputed(planner, trained, smaller, mode, memory)
                else:
                    plan = planner.plan(trained, smaller, mode)
                if plan is not None and needed_bytes(plan, planner.device) <= memory:
                    of_mode = {} if mode == own_mode(method) else {"method.offload": mode}
                    return Fit(changes={**of_method, **of_mode, **_shape_changes(shape, plan.shape)}, plan=plan)
    return None


def least_bytes(planner: Planner, method: MethodConfig, train_steps: int = DEFAULT_TRAIN_STEPS) -> int:
    """Memory that weights, gradients and states need at least, with any of the settings that :func:`find_fit` tries."""
    tried = [_changed(method, changes) for changes in _method_changes(method, planner.workers)]
    return min(
        planner.min_bytes(planner.apply(changed, train_steps), mode)
        for changed in tried
        for mode in _preferred_modes(changed)
    )


def own_mode(method: MethodConfig) -> Mode:
    """The mode that a method asks for, or ``none`` if that mode is not applicable."""
    mode: Mode = "resident" if method.offload == "auto" else method.offload
    return mode if mode in applicable_modes(method) else "none"


def _preferred_modes(method: MethodConfig) -> list[Mode]:
    """The method's own mode, then others, fast ones first."""
    possible = applicable_modes(method)
    preferred: tuple[Mode, ...] = (own_mode(method), "resident", "lazy")
    return list(dict.fromkeys(mode for mode in preferred if mode in possible))


def _method_changes(method: MethodConfig, workers: int) -> Iterator[Changes]:
    """The method as it is, with less that trains, both with streamed weights; then all without clipping."""
    found: list[Changes] = [{}]
    if getattr(method.sampler, "num_active_layers", 1) != 1 and method.granularity == "layer":
        found.append({"method.sampler.num_active_layers": 1})
    if not method.sampler.trains_all and (method.train_embeddings or method.train_head):
        found.append({**found[-1], "method.train_embeddings": False, "method.train_head": False})
    if method.weights == "resident" and method.can_stream_weights:
        found += [{**changes, "method.weights": "streamed"} for changes in found]
    yield from found
    if not method.update_in_backward and workers == 1:
        yield from ({**changes, **IN_BACKWARD} for changes in found)


def _changed(method: MethodConfig, changes: Changes) -> MethodConfig:
    return MethodConfig.model_validate(apply({"method": method.model_dump()}, changes)["method"])


def _smaller_shapes(shape: StepShape) -> Iterator[StepShape]:
    """The shape as it is, with as few layers recomputed as fit, and in micro-batches halved down to one row."""
    if shape.checkpointing != "auto":
        yield shape
    if shape.checkpointing != "all":
        yield replace(shape, checkpointing="auto")
        shape = replace(shape, checkpointing="all")
    while shape.rows > 1 and shape.rows % 2 == 0:
        shape = replace(shape, rows=shape.rows // 2, micro_batches=shape.micro_batches * 2)
        yield shape


def _shape_changes(shape: StepShape, changed: StepShape) -> Changes:
    """The settings of the training that make ``shape`` the ``changed`` one."""
    changes: dict[str, Any] = {}
    if changed.checkpointing != shape.checkpointing:
        changes["training.gradient_checkpointing"] = changed.checkpointing
    if changed.micro_batches != shape.micro_batches:
        changes["training.accumulation_steps"] = changed.micro_batches
    return changes


def plan_in_backward(planner: Planner, method: MethodConfig, plan: MemoryPlan, train_steps: int) -> MemoryPlan | None:
    """What ``plan`` would be with updates inside backward instead of clipping; None if that is no other."""
    if method.update_in_backward or planner.workers > 1 or plan.gradients < SHARE_OF_GRADIENTS * plan.peak_bytes:
        return None
    trained = planner.apply(_changed(method, IN_BACKWARD), train_steps)
    found = planner.plan(trained, plan.shape, plan.offload)
    saved = plan.peak_bytes - found.peak_bytes
    return found if saved >= SHARE_OF_GRADIENTS * plan.peak_bytes else None
