"""The report of ``grass-ray plan``: memory of every method part by part, and settings with which it fits.

::

    report = make_report(request)
    print(render_report(report, "table"))       # grass_ray.memory.report_text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from grass_ray.config import ConfigError, GradientCheckpointing, ModelConfig, RunConfig
from grass_ray.memory.allocations import DeviceKind
from grass_ray.memory.fit import TOLERANCE, plan_decided, total_bytes
from grass_ray.memory.plan import DEFAULT_TRAIN_STEPS, CannotPlanError, MemoryPlan, Planner, applicable_modes
from grass_ray.memory.settings import Fit, find_fit, least_bytes, needed_bytes, plan_in_backward
from grass_ray.memory.step import StepShape
from grass_ray.methods import METHODS, Method
from grass_ray.overrides import parse
from grass_ray.paths import find_model
from grass_ray.training.checks import check_recomputed
from grass_ray.training.metrics import default_device
from grass_ray.training.report import GIB, RESERVE_BYTES

Verdict = Literal["yes", "tight", "no"]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan.

    Attributes:
        model: the model.
        device: kind of device.
        memory_bytes: memory of the device.
        shape: work of a step.
        methods: the methods by name.
        settings: ``dotted.key=value``, applied to every method that has the key.
    """

    model: ModelConfig
    device: DeviceKind
    memory_bytes: int
    shape: StepShape
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The plans for a :class:`PlanRequest`.

    Attributes:
        request: the request.
        plans: one per method and offload mode.
        fits: by method, the first settings that fit; None if no setting that was tried does.
        min_bytes: by method, the memory that weights, gradients and states need at least with any setting tried.
        refused: by method, why it has no plan.
        unclipped: by method, the smallest of its plans and what that would be with updates inside backward, for methods
            that clip gradients and would need less without.
    """

    request: PlanRequest
    plans: tuple[MemoryPlan, ...]
    fits: dict[str, Fit | None]
    min_bytes: dict[str, int]
    refused: dict[str, str]
    unclipped: dict[str, tuple[MemoryPlan, MemoryPlan]]

    @property
    def usable_bytes(self) -> int:
        """Memory left for tensors."""
        return self.request.memory_bytes - RESERVE_BYTES

    def verdict(self, plan: MemoryPlan) -> Verdict:
        """Whether a plan fits. ``tight`` if the difference to the limit is within the error of predictions."""
        needed = needed_bytes(plan, self.request.device)
        if needed > self.usable_bytes:
            return "no"
        return "yes" if needed * (1 + TOLERANCE) <= self.usable_bytes else "tight"


def make_request(
    *,
    model: str,
    dtype: Literal["float32", "bfloat16", "float16"],
    memory_gib: float | None,
    device: DeviceKind | None,
    batch_size: int,
    seq_len: int,
    labelled: int | None,
    accumulation_steps: int,
    checkpointing: GradientCheckpointing,
    methods: Mapping[str, Method],
    settings: tuple[str, ...],
) -> PlanRequest:
    """Build a request from the flags of the command line.

    Args:
        model: name or folder of the model.
        dtype: of its weights.
        memory_gib: memory of the device; None takes that of this machine.
        device: kind of device; None takes CUDA if ``memory_gib`` is given, else that of this machine.
        batch_size: rows per optimizer step.
        seq_len: tokens per row.
        labelled: labelled tokens per row; None for all.
        accumulation_steps: micro-batches per optimizer step.
        checkpointing: which layers are recomputed; ``auto`` takes none on a CPU unless ``memory_gib`` is given.
        methods: the methods to plan, by name.
        settings: ``dotted.key=value``.

    Raises:
        ConfigError: numbers are out of range; the message lists all of them.
    """
    rules = [
        (memory_gib is None or memory_gib > 0, f"--gpu-memory {memory_gib}: give more than 0 GiB"),
        (batch_size >= 1, f"--batch-size {batch_size}: give 1 or more rows"),
        (seq_len >= 1, f"--seq-len {seq_len}: give 1 or more tokens"),
        (labelled is None or 1 <= labelled <= seq_len, f"--labelled {labelled}: give 1 to {seq_len} positions"),
        (
            accumulation_steps >= 1 and batch_size % max(accumulation_steps, 1) == 0,
            f"--accumulation-steps {accumulation_steps}: give a divisor of the {batch_size} rows",
        ),
    ]
    if mistakes := [message for holds, message in rules if not holds]:
        raise ConfigError("; ".join(mistakes))
    kind, memory = _device_memory(memory_gib, device)
    unlimited = kind == "cpu" and memory_gib is None
    return PlanRequest(
        model=ModelConfig(name=find_model(model), dtype=dtype),
        device=kind,
        memory_bytes=memory,
        shape=StepShape(
            rows=batch_size // accumulation_steps,
            tokens=seq_len,
            labelled=labelled,
            micro_batches=accumulation_steps,
            checkpointing="none" if unlimited and checkpointing == "auto" else checkpointing,
        ),
        methods=methods,
        settings=settings,
    )


def _device_memory(memory_gib: float | None, device: DeviceKind | None) -> tuple[DeviceKind, int]:
    """Return the kind of device and its memory in bytes, of this machine where neither is given."""
    here = default_device()
    kind: DeviceKind = device or ("cuda" if memory_gib is not None or here.type == "cuda" else "cpu")
    if memory_gib is not None:
        return kind, int(memory_gib * GIB)
    memory = total_bytes(here) if kind == here.type else None
    if memory is None:
        raise ConfigError(f"this machine does not say how much memory {kind} has; give --gpu-memory GIB")
    return kind, memory


def make_report(request: PlanRequest, on_method: Callable[[str], None] = lambda name: None) -> MemoryReport:
    """Plan every method in all of its offload modes, and find settings that fit.

    Args:
        request: what to plan.
        on_method: called with the name of each method before it is planned. A large model takes a second or two per
            method.

    Raises:
        ConfigError: an unknown model or method, a setting that no method has, too little memory for any run, or no
            method that can train this model.
    """
    if request.memory_bytes <= RESERVE_BYTES:
        raise ConfigError(
            f"memory is {request.memory_bytes / GIB:g} GiB; it must be more than the {RESERVE_BYTES / GIB:g} GiB that "
            "a process takes besides its tensors"
        )
    configs = _configure(request)
    planner = Planner(request.model, request.device)
    plans: list[MemoryPlan] = []
    fits: dict[str, Fit | None] = {}
    smallest: dict[str, int] = {}
    refused: dict[str, str] = {}
    unclipped: dict[str, tuple[MemoryPlan, MemoryPlan]] = {}
    for name, config in configs.items():
        on_method(name)
        try:
            trained = planner.apply(config.method)
            modes = applicable_modes(config.method)
            check_recomputed(request.shape.checkpointing, trained.num_layers)
            usable = request.memory_bytes - RESERVE_BYTES
            own = [plan_decided(planner, trained, request.shape, mode, usable) for mode in modes]
            fits[name] = find_fit(planner, config.method, request.shape, usable)
            smallest[name] = least_bytes(planner, config.method)
            least = min(reversed(own), key=lambda plan: needed_bytes(plan, request.device))
            if (other := plan_in_backward(planner, config.method, least, DEFAULT_TRAIN_STEPS)) is not None:
                unclipped[name] = least, other
        except CannotPlanError:
            raise
        except ConfigError as error:
            refused[name] = str(error)
            continue
        plans += own
    if not plans:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return MemoryReport(
        request=request, plans=tuple(plans), fits=fits, min_bytes=smallest, refused=refused, unclipped=unclipped
    )


def _configure(request: PlanRequest) -> dict[str, RunConfig]:
    """Configure every method that trains; a setting is applied to the methods that have its key."""
    configs: dict[str, RunConfig] = {}
    reached: set[str] = set()
    for name, row in request.methods.items():
        if not row.trains:
            continue
        config = RunConfig(method=row.config, model=request.model)
        known = config.flatten()
        own = [text for text in request.settings if text.partition("=")[0] in known]
        reached |= set(own)
        configs[name] = config.override(parse(own))
    lost = [text for text in request.settings if text not in reached]
    if lost:
        raise ConfigError(f"none of these methods has the setting {', '.join(lost)}; give dotted.key=value")
    if not configs:
        raise ConfigError(f"{', '.join(request.methods)}: nothing trains, so there is nothing to plan")
    return configs
