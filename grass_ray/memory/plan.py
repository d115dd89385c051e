"""Predict a run's peak memory part by part before any weight is loaded, for every method and offload mode.

Weights, gradients and states are sums over the shapes of the very units that the optimizer would train; activations
and logits come from one step on the meta device (:mod:`grass_ray.memory.step`), so nothing is fitted and the
same predictor serves CPUs and CUDA devices::

    planner = Planner(ModelConfig(name="llama2-7b", dtype="bfloat16"), device="cuda")
    for plan in planner.plan_modes(METHODS["grass"].config, StepShape(rows=4, tokens=1024)):
        print(plan.offload, plan.peak_bytes / GIB, plan.host_bytes / GIB)

A plan is for the worst case: of the active sets that a sampler may draw the one that takes most (the lowest layer is
in it, so backward runs through the whole model), every layer visited, rows as long as ``StepShape.tokens``. Evaluation
is not part of it. Sizes are bytes, or GiB where a name says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from grass_ray.config import AdapterConfig, ConfigError, MethodConfig, ModelConfig
from grass_ray.memory.allocations import DeviceKind, Parts, storages_bytes
from grass_ray.memory.step import StepProfile, StepShape, profile_step
from grass_ray.memory.trained_units import TrainedUnits, put_on
from grass_ray.optim.chunks import CHUNK_BYTES
from grass_ray.training.models import build_shape
from grass_ray.training.report import GIB

Mode = Literal["none", "resident", "blocking", "overlap", "lazy"]
Phase = Literal["probing", "backward", "exchange", "update"]
STREAMING: tuple[Mode, ...] = ("blocking", "overlap", "lazy")
RING_BYTES = 4 * CHUNK_BYTES
# cuBLAS takes its workspace from the caching allocator and keeps it: 32 MiB on Hopper, 8 before
CUBLAS_BYTES = 32 * 1024 * 1024
# a sampler's schedules are looked at as if training were this long, unless a run says how long it is
ANY_STEPS = 1000


class CannotPlanError(ConfigError):
    """This model's step does not run on the meta device, so nothing can be said about it."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one method takes in one offload mode; bytes at the moment of its peak, which is in ``phase``.

    ``weights`` include buffers, ``states`` are those on the device, ``staging`` is the ring that others are streamed
    through, ``workspace`` is what kernels and the update use for themselves, ``host_bytes`` are the blocks of states in
    host memory once every layer was visited.
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

    @property
    def peak_bytes(self) -> int:
        """All parts on the device."""
        parts = (self.weights, self.gradients, self.states, self.staging, self.activations, self.logits)
        return sum(parts) + self.workspace

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"peak_bytes": self.peak_bytes, "peak_gib": round(self.peak_bytes / GIB, 4)}


class Planner:
    """Plans methods on one model; the model's skeleton and equal steps are looked at once.

    Args:
        model: a hub id, a folder, a built-in model, or a built-in shape (``llama2-7b``); its dtype counts.
        device: whose kernels and allocator to assume.
        workers: how many share a step's micro-batches, each with the whole model.

    Raises:
        ConfigError: there is no such model.
    """

    def __init__(self, model: ModelConfig, device: DeviceKind, workers: int = 1) -> None:
        self.device: DeviceKind = device
        self.workers = workers
        self._skeleton = build_shape(model)
        self._profiles: dict[object, StepProfile] = {}

    def plan_modes(
        self,
        method: MethodConfig,
        shape: StepShape,
        *,
        modes: Sequence[Mode] | None = None,
        training_steps: int = ANY_STEPS,
    ) -> list[MemoryPlan]:
        """Plan one method in each offload mode that can serve it (or in ``modes``).

        Raises:
            ConfigError: the method cannot work with this model (more active layers than layers, for example), or not
                with what was asked for.
        """
        trains = self.put_on(method, training_steps)
        chosen = applicable_modes(method) if modes is None else modes
        return [self.plan(trains, shape, mode) for mode in chosen]

    def put_on(self, method: MethodConfig, training_steps: int = ANY_STEPS) -> TrainedUnits:
        """Put a method on the model. Raises :class:`ConfigError` as :meth:`plan_modes`."""
        return put_on(copy.deepcopy(self._skeleton), method, training_steps)

    def least_bytes(self, trains: TrainedUnits, mode: Mode) -> int:
        """What a step takes whatever its batch: weights, gradients and states; nothing is profiled."""
        shape = StepShape(rows=1, tokens=1)
        plans = []
        for active in trains.active_sets():
            gradients = storages_bytes(p for unit in trains.trained(active) for p in unit.parameters)
            states = _states_on_device(trains, mode, active)
            plans.append(self._compose(trains, shape, mode, "update", states=states, parts=Parts(gradients=gradients)))
        return max(plan.peak_bytes for plan in plans)

    def plan(self, trains: TrainedUnits, shape: StepShape, mode: Mode) -> MemoryPlan:
        """The phase and the active set with the highest peak.

        Raises:
            ConfigError: the method does not work with gradient checkpointing.
            CannotPlanError: the model's step cannot be followed without values.
        """
        adapter = trains.method.adapter
        if shape.checkpointing and adapter is not None and not adapter.allows_checkpointing:
            raise ConfigError(f"{adapter.kind} tuning cannot train with gradient checkpointing; leave it off")
        plans = [plan for active in trains.active_sets() for plan in self._phases_of_step(trains, shape, mode, active)]
        if trains.sampler.probing_steps:
            profile = self._profile(trains, shape, tuple(range(len(trains.units))), drop_gradients=True)
            plans.append(self._compose(trains, shape, mode, "probing", states=0, parts=profile.peak))
        return max(plans, key=lambda plan: plan.peak_bytes)

    def _phases_of_step(
        self, trains: TrainedUnits, shape: StepShape, mode: Mode, active: tuple[int, ...]
    ) -> list[MemoryPlan]:
        profile = self._profile(trains, shape, active)
        states = _states_on_device(trains, mode, active)
        update = Parts(gradients=profile.gradients, workspace=trains.update_bytes(trains.trained(active), self.device))
        plans = [
            self._compose(trains, shape, mode, "backward", states=states, parts=profile.peak),
            self._compose(trains, shape, mode, "update", states=states, parts=update),
        ]
        if self.workers > 1:
            # gradients travel as copies that take their place; one unit's at a time is in both
            copied = max((storages_bytes(unit.parameters) for unit in trains.trained(active)), default=0)
            exchange = Parts(gradients=profile.gradients, workspace=copied)
            plans.append(self._compose(trains, shape, mode, "exchange", states=states, parts=exchange))
        return plans

    def _profile(
        self, trains: TrainedUnits, shape: StepShape, active: tuple[int, ...], *, drop_gradients: bool = False
    ) -> StepProfile:
        trained = {p for unit in trains.trained(active) for p in unit.parameters}
        names = tuple(name for name, p in trains.model.named_parameters() if p in trained)
        # the second of a worker's own meets gradients already
        shape = replace(shape, micro_batches=min(-(-shape.micro_batches // self.workers), 2))
        key = (_key(trains.method.adapter), shape, names, drop_gradients)
        if key not in self._profiles:
            for parameter in trains.model.parameters():
                parameter.requires_grad_(parameter in trained)
            try:
                profile = profile_step(trains.model, shape, device=self.device, drop_gradients=drop_gradients)
            except RuntimeError as error:  # an operation that needs values, or has no kernel for meta tensors
                raise CannotPlanError(
                    f"cannot predict the memory of a step of {type(trains.model).__name__}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            self._profiles[key] = profile
        return self._profiles[key]

    def _compose(
        self, trains: TrainedUnits, shape: StepShape, mode: Mode, phase: Phase, *, states: int, parts: Parts
    ) -> MemoryPlan:
        moves = trains.method.inactive_states == "keep" and not trains.sampler.trains_all
        on_host = mode in STREAMING or (mode == "resident" and moves)
        return MemoryPlan(
            method=trains.method.name,
            offload=mode,
            shape=shape,
            phase=phase,
            weights=storages_bytes((*trains.model.parameters(), *trains.model.buffers())),
            gradients=parts.gradients,
            states=states,
            staging=RING_BYTES if mode in STREAMING else 0,
            activations=parts.activations,
            logits=parts.logits,
            workspace=parts.workspace + (CUBLAS_BYTES if self.device == "cuda" else 0),
            host_bytes=trains.host_bytes(trains.units) if on_host else 0,
        )


def applicable_modes(method: MethodConfig) -> tuple[Mode, ...]:
    """The offload modes that make a difference for a method; where nothing is sampled ``none`` is ``resident``."""
    samples = method.sampler.kind != "all"
    keeps = samples and method.inactive_states == "keep"
    streams = method.optimizer.projection is None and method.adapter is None
    return ("none", *(("resident",) if keeps else ()), *(STREAMING if streams else ()))


def _states_on_device(trains: TrainedUnits, mode: Mode, active: Iterable[int]) -> int:
    constant = trains.state_bytes(trains.constant)
    if mode in STREAMING:
        return constant
    if mode == "none" and trains.method.inactive_states == "keep":
        return constant + trains.state_bytes(trains.units)
    return constant + trains.state_bytes(trains.units[index] for index in active)


def _key(adapter: AdapterConfig | None) -> str:
    return "" if adapter is None else adapter.model_dump_json()
