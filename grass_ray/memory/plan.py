"""Predict the peak memory of a run before any weight is loaded, for every method and offload mode.

Weights, gradients and states are sums over the shapes of the units that the optimizer would train. Activations and
logits come from one step on the meta device (:mod:`grass_ray.memory.step`). Nothing is fitted to measurements, and the
same planner serves CPUs and CUDA devices::

    planner = Planner(ModelConfig(name="llama2-7b", dtype="bfloat16"), device="cuda")
    for plan in planner.plan_modes(METHODS["grass"].config, StepShape(rows=4, tokens=1024)):
        print(plan.offload, plan.peak_bytes / GIB, plan.host_bytes / GIB)

A plan is for the worst case: the active set that needs most memory (backward then runs down to the lowest layer), every
layer visited, every row as long as ``StepShape.tokens``. Evaluation is not included. Sizes are bytes, or GiB if a name
says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from grass_ray.config import PLACEMENTS, ConfigError, MethodConfig, ModelConfig, recomputed_layers
from grass_ray.memory.allocations import DeviceKind, Parts, storages_bytes
from grass_ray.memory.step import InBackward, StepProfile, StepShape, profile_step
from grass_ray.memory.trained_units import PlannedModel, TrainedUnits, apply_method
from grass_ray.optim.chunks import CHUNK_BYTES
from grass_ray.optim.placement import Footprint, placement_class
from grass_ray.training.adapters import add_adapter
from grass_ray.training.report import GIB
from grass_ray.training.shapes import build_shape

Mode = str  # a key of PLACEMENTS
Phase = Literal["probing", "backward", "exchange", "update"]
RING_BYTES = 4 * CHUNK_BYTES
# cuBLAS takes its workspace from the caching allocator and keeps it: 32 MiB on Hopper, 8 MiB on older GPUs
CUBLAS_BYTES = 32 * 1024 * 1024
# length of the training that a sampler's schedules assume if there is no run to ask
DEFAULT_TRAIN_STEPS = 1000


class CannotPlanError(ConfigError):
    """A step of this model does not run on the meta device, so its memory cannot be predicted."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted memory of a method in one offload mode, in bytes at the moment of its peak.

    Attributes:
        method: name of the method.
        offload: the mode.
        shape: work of a step.
        phase: when the peak occurs.
        weights: parameters and buffers on the device.
        gradients: gradients.
        states: optimizer states on the device.
        staging: rings through which states and weights on the host are streamed.
        activations: what backward needs, and temporary tensors of forward and backward.
        logits: logits and their gradients.
        workspace: memory that kernels and the update use internally.
        host_bytes: host memory: blocks of states once every layer was visited, and streamed weights.
        host_weights: the part of it that holds weights.
        recomputed_layers: decoder layers, from the first, that are recomputed in backward.
        num_layers: decoder layers of the model.
    """

    method: str
    offload: Mode
    shape: StepShape
    phase: Phase
    weights: int
    gradients: int
    states: int
    staging: int
    activations: int
    logits: int
    workspace: int
    host_bytes: int
    host_weights: int
    recomputed_layers: int
    num_layers: int

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts on the device."""
        parts = (self.weights, self.gradients, self.states, self.staging, self.activations, self.logits)
        return sum(parts) + self.workspace

    def to_dict(self) -> dict[str, Any]:
        """All values, with the peak, as plain JSON values."""
        return asdict(self) | {"peak_bytes": self.peak_bytes, "peak_gib": round(self.peak_bytes / GIB, 4)}


class Planner:
    """Predicts the memory of methods on one model. The model is built once, and equal steps are profiled once.

    Args:
        model: a hub id, a folder, a built-in model, or a built-in shape (``llama2-7b``). Its dtype matters.
        device: whose kernels and allocator to assume.
        workers: number of workers that share the micro-batches of a step, each with the whole model.

    Raises:
        ConfigError: there is no such model.
    """

    def __init__(self, model: ModelConfig, device: DeviceKind, workers: int = 1) -> None:
        self.device: DeviceKind = device
        self.workers = workers
        self._skeleton = build_shape(model)
        self._profiles: dict[object, StepProfile] = {}
        self._models: dict[str, PlannedModel] = {}
        self._applied: dict[tuple[str, int], TrainedUnits] = {}

    def plan_modes(
        self,
        method: MethodConfig,
        shape: StepShape,
        *,
        modes: Sequence[Mode] | None = None,
        train_steps: int = DEFAULT_TRAIN_STEPS,
    ) -> list[MemoryPlan]:
        """Plan a method in each of ``modes``, by default in all that are applicable to it.

        Raises:
            ConfigError: the method cannot train this model (it needs more layers, for example).
        """
        trained = self.apply(method, train_steps)
        return [self.plan(trained, shape, mode) for mode in (applicable_modes(method) if modes is None else modes)]

    def apply(self, method: MethodConfig, train_steps: int = DEFAULT_TRAIN_STEPS) -> TrainedUnits:
        """Apply a method to the model. Raises :class:`ConfigError` as :meth:`plan_modes`."""
        key = (method.model_dump_json(), train_steps)
        if key not in self._applied:
            self._applied[key] = apply_method(self._model_with(method), method, train_steps)
        return self._applied[key]

    def _model_with(self, method: MethodConfig) -> PlannedModel:
        """The model with a method's adapter, one for all methods that have it."""
        adapter = _adapter_key(method)
        if adapter not in self._models:
            with _without_values():
                model = add_adapter(copy.deepcopy(self._skeleton), method.adapter)
            self._models[adapter] = PlannedModel(model)
        return self._models[adapter]

    def min_bytes(self, trained: TrainedUnits, mode: Mode) -> int:
        """Memory that a step needs whatever its batch: weights, gradients and states. Profiles nothing."""
        shape = StepShape(rows=1, tokens=1)
        plans = []
        for active in trained.active_sets():
            each = [storages_bytes(unit.parameters) for unit in trained.trained(active)]
            gradients = max(each, default=0) if trained.method.update_in_backward else sum(each)
            plans.append(self._compose(trained, shape, mode, "update", active, Parts(gradients=gradients)))
        return max(plan.peak_bytes for plan in plans)

    def plan(self, trained: TrainedUnits, shape: StepShape, mode: Mode) -> MemoryPlan:
        """Plan the phase and the active set with the highest peak.

        Raises:
            CannotPlanError: the model's step does not run on the meta device.
        """
        return max(self.plan_phases(trained, shape, mode), key=lambda plan: plan.peak_bytes)

    def plan_phases(self, trained: TrainedUnits, shape: StepShape, mode: Mode) -> list[MemoryPlan]:
        """Plan every phase with every active set that may have the highest peak. Raises as :meth:`plan`."""
        sets = trained.active_sets(recomputed_layers(shape.checkpointing, trained.num_layers))
        plans = [plan for active in sets for plan in self._plan_active(trained, shape, mode, active)]
        if trained.sampler.probing_steps:
            profile = self._profile(trained, shape, tuple(range(len(trained.units))))
            plans.append(self._compose(trained, shape, mode, "probing", (), profile.peak))
        return plans

    def _plan_active(
        self, trained: TrainedUnits, shape: StepShape, mode: Mode, active: tuple[int, ...]
    ) -> Iterator[MemoryPlan]:
        profile = self._profile(trained, shape, active, mode=mode)
        units = trained.trained(active)
        update = Parts(gradients=profile.gradients, workspace=trained.update_bytes(units, self.device))
        yield self._compose(trained, shape, mode, "backward", active, profile.peak)
        if trained.method.update_in_backward:
            return
        yield self._compose(trained, shape, mode, "update", active, update)
        if self.workers > 1:
            # the reduced gradients are copies that replace the gradients, one unit at a time
            copied = max((storages_bytes(unit.parameters) for unit in units), default=0)
            exchange = Parts(gradients=profile.gradients, workspace=copied)
            yield self._compose(trained, shape, mode, "exchange", active, exchange)

    def _profile(
        self, trained: TrainedUnits, shape: StepShape, active: tuple[int, ...], *, mode: Mode | None = None
    ) -> StepProfile:
        """A step with updates of the offload mode; None measures only."""
        units = trained.trained(active)
        corrected = [] if mode is None else trained.corrected(active)
        dropped = frozenset(p for unit in corrected for p in unit.parameters)
        parameters = {p for unit in units for p in unit.parameters} | dropped
        updates: InBackward | None = None
        if mode is not None and trained.method.update_in_backward:
            workspace = trained.update_bytes(units, self.device)
            behind = placement_class(mode).updates_behind
            updates = InBackward(units=[unit.parameters for unit in units], behind=behind, workspace=workspace)
        names = tuple(sorted(trained.whole.names[p] for p in parameters))
        # of each worker's micro-batches, the second and all later ones are added to gradients that exist already; the
        # last one differs if it frees them
        different = 2 if updates is None else 3
        shape = replace(shape, micro_batches=min(-(-shape.micro_batches // self.workers), different))
        adapter = _adapter_key(trained.method)
        probing = mode is None
        told = None if updates is None else (updates.behind, updates.workspace, trained.method.granularity)
        corrects = None if mode is None else trained.method.inactive_updates
        key = (adapter, shape, names, probing, told, corrects and (corrects.layers, active))
        if key not in self._profiles:
            for parameter in trained.whole.names:
                parameter.requires_grad_(parameter in parameters)
            try:
                profile = profile_step(
                    trained.whole,
                    shape,
                    device=self.device,
                    probing=probing,
                    in_backward=updates,
                    dropped=dropped,
                )
            except RuntimeError as error:  # an operation that needs values, or has no kernel for the meta device
                raise CannotPlanError(
                    f"cannot predict the memory of a step of {type(trained.model).__name__}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            self._profiles[key] = profile
        return self._profiles[key]

    def _compose(
        self, trained: TrainedUnits, shape: StepShape, mode: Mode, phase: Phase, active: Sequence[int], parts: Parts
    ) -> MemoryPlan:
        footprint = _footprint(trained, mode, active)
        return MemoryPlan(
            method=trained.method.name,
            offload=mode,
            shape=shape,
            phase=phase,
            weights=trained.weight_bytes(active),
            gradients=parts.gradients,
            states=0 if phase == "probing" else footprint.states,
            staging=footprint.staging + trained.weight_ring_bytes,
            activations=parts.activations,
            logits=parts.logits,
            workspace=parts.workspace + (CUBLAS_BYTES if self.device == "cuda" else 0),
            host_bytes=footprint.host + trained.host_weight_bytes,
            host_weights=trained.host_weight_bytes,
            recomputed_layers=recomputed_layers(shape.checkpointing, trained.num_layers),
            num_layers=trained.num_layers,
        )


def applicable_modes(method: MethodConfig) -> tuple[Mode, ...]:
    """The offload modes in which a method needs different memory.

    ``resident`` is the same as ``none`` if no states of inactive layers are kept.
    """
    keeps = method.inactive_states == "keep" and not method.sampler.trains_all
    small = method.optimizer.projection is not None or method.adapter is not None
    return tuple(mode for mode in PLACEMENTS if placement_class(mode).suits(keeps=keeps, small=small))


@contextmanager
def _without_values() -> Iterator[None]:
    """In the block, an adapter's first values are not drawn: none matters on the meta device.

    FourierFT has its places from a permutation of all weights of each matrix, which takes minutes for a model of 7B
    parameters, and peft starts matrices on the CPU.
    """
    permutation, uniform = torch.randperm, torch.nn.init.kaiming_uniform_
    torch.randperm = lambda n, **_: torch.zeros(1, dtype=torch.long).expand(n)
    torch.nn.init.kaiming_uniform_ = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        torch.randperm, torch.nn.init.kaiming_uniform_ = permutation, uniform


def _adapter_key(method: MethodConfig) -> str:
    return "" if method.adapter is None else method.adapter.model_dump_json()


def _footprint(trained: TrainedUnits, mode: Mode, active: Sequence[int]) -> Footprint:
    """Memory of the states while the units with the indices ``active`` are active and all were visited."""
    others = [unit for index, unit in enumerate(trained.units) if index not in active]
    footprint = placement_class(mode).footprint(
        active=trained.state_bytes(trained.units[index] for index in active),
        inactive=trained.state_bytes(others) if trained.method.inactive_states == "keep" else 0,
        blocks=trained.block_bytes,
        ring=RING_BYTES,
    )
    return replace(footprint, states=footprint.states + trained.state_bytes(trained.constant))
