"""The report of ``grass-ray plan``: memory of every method part by part, and settings with which it fits.

::

    print(render_report(make_report(request), "table"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table

from grass_ray.config import ConfigError, GradientCheckpointing, ModelConfig, RunConfig, to_json
from grass_ray.memory.allocations import DeviceKind
from grass_ray.memory.fit import TOLERANCE, Fit, find_fit, needed_bytes, plan_decided, total_bytes
from grass_ray.memory.plan import CannotPlanError, MemoryPlan, Planner, applicable_modes
from grass_ray.memory.step import StepShape
from grass_ray.methods import METHODS, Method
from grass_ray.overrides import parse
from grass_ray.paths import find_model
from grass_ray.training.checks import check_recomputed
from grass_ray.training.metrics import default_device
from grass_ray.training.report import GIB, RESERVE_BYTES, first_layers

Verdict = Literal["yes", "tight", "no"]
HEADER: tuple[str, ...] = (
    *("method", "offload", "weights", "gradients", "states", "staging", "activations", "logits", "other"),
    *("peak", "host", "peak in", "fits"),
)


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
        min_bytes: by method, the memory that weights, gradients and states need at least.
        refused: by method, why it has no plan.
    """

    request: PlanRequest
    plans: tuple[MemoryPlan, ...]
    fits: dict[str, Fit | None]
    min_bytes: dict[str, int]
    refused: dict[str, str]

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
    for name, config in configs.items():
        on_method(name)
        try:
            trained = planner.apply(config.method)
            modes = applicable_modes(config.method)
            check_recomputed(request.shape.checkpointing, trained.num_layers)
            usable = request.memory_bytes - RESERVE_BYTES
            own = [plan_decided(planner, trained, request.shape, mode, usable) for mode in modes]
            smallest[name] = min(planner.min_bytes(trained, mode) for mode in modes)
            fits[name] = find_fit(planner, config.method, request.shape, usable)
        except CannotPlanError:
            raise
        except ConfigError as error:
            refused[name] = str(error)
            continue
        plans += own
    if not plans:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return MemoryReport(request=request, plans=tuple(plans), fits=fits, min_bytes=smallest, refused=refused)


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


# --------------------------------------------------------------------------------------------------------- as text


def render_report(report: MemoryReport, format: Literal["table", "json", "markdown"] = "table") -> str:
    """Render the report as a table, as Markdown, or as JSON with all sizes in bytes."""
    if format == "json":
        return to_json(_values(report), indent=1)
    header, rows = HEADER, [_cells(report, plans) for plans in _grouped(report.plans)]
    if report.request.shape.checkpointing not in ("none", "all"):
        header += ("recomputed",)
        rows = [(*row, _recomputed(plans[0])) for row, plans in zip(rows, _grouped(report.plans), strict=True)]
    if format == "markdown":
        lines = [f"**{_heading(report)}**", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *(f"- {line}" for line in _advice(report)), "", _note(report)])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in header:
        words = column in ("method", "offload", "peak in", "fits", "recomputed")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    text = "\n".join(line.rstrip() for line in capture.get().splitlines())
    return "\n".join([_heading(report), "", text, "", *_advice(report), "", _note(report)])


def _values(report: MemoryReport) -> dict[str, object]:
    request = report.request
    return {
        "model": request.model.name,
        "dtype": request.model.dtype,
        "device": request.device,
        "memory_bytes": request.memory_bytes,
        "usable_bytes": report.usable_bytes,
        "tolerance": TOLERANCE,
        "plans": [plan.to_dict() | {"fits": report.verdict(plan)} for plan in report.plans],
        "advice": {
            name: None if fit is None else {"settings": fit.settings, "plan": fit.plan.to_dict()}
            for name, fit in report.fits.items()
        },
        "refused": report.refused,
    }


def _grouped(plans: Sequence[MemoryPlan]) -> list[list[MemoryPlan]]:
    """Group the modes of a method that need the same memory, to be shown in one row."""
    groups: dict[tuple[object, ...], list[MemoryPlan]] = {}
    for plan in plans:
        groups.setdefault((plan.method, plan.peak_bytes, plan.states, plan.host_bytes), []).append(plan)
    return list(groups.values())


def _cells(report: MemoryReport, plans: Sequence[MemoryPlan]) -> tuple[str, ...]:
    plan = plans[0]
    sizes = (plan.weights, plan.gradients, plan.states, plan.staging, plan.activations, plan.logits, plan.workspace)
    return (
        plan.method,
        " ".join(plan.offload for plan in plans) + (", weights streamed" if plan.host_weights else ""),
        *(_gib(size) for size in sizes),
        _gib(plan.peak_bytes),
        _gib(plan.host_bytes),
        plan.phase,
        report.verdict(plan),
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _heading(report: MemoryReport) -> str:
    request, shape = report.request, report.request.shape
    words = [f"{request.model.name} in {request.model.dtype} on {request.device}: {shape.rows} rows x {shape.tokens}"]
    if shape.label_positions < shape.tokens:
        words.append(f"{shape.label_positions} of them labelled")
    if shape.micro_batches > 1:
        words.append(f"{shape.micro_batches} micro-batches")
    if shape.checkpointing != "none":
        words.append(f"gradient checkpointing: {shape.checkpointing}")
    words[0] += " tokens"
    return ", ".join(words) + f"; {request.memory_bytes / GIB:.4g} GiB (all sizes in GiB)"


def _advice(report: MemoryReport) -> list[str]:
    """One line per method: the first settings that fit."""
    width = max(map(len, report.fits), default=0)
    lines = [f"what fits {report.request.memory_bytes / GIB:.4g} GiB, the least change first:"]
    for name, fit in report.fits.items():
        if fit is None:
            said = f"no setting tried: weights, gradients and states take at least {_gib(report.min_bytes[name])} GiB"
        else:
            size = f"{needed_bytes(fit.plan, report.request.device) / GIB:.2f} GiB"
            said = f"{size}  " + (f"--set {' '.join(fit.settings)}" if fit.settings else "as it is")
            if "training.gradient_checkpointing" in fit.changes:
                said += f" ({_recomputed(fit.plan)})"
        lines.append(f"  {name:{width}}  {said}")
    lines += [f"  {name:{width}}  not possible: {reason}" for name, reason in report.refused.items()]
    return lines


def _recomputed(plan: MemoryPlan) -> str:
    """Which layers are recomputed, and how much of the layers' forward that is where the lowest layer is active."""
    if not plan.recomputed_layers:
        return "none"
    share = f"{plan.recomputed_layers / plan.num_layers:.0%}"
    return f"{first_layers(plan.recomputed_layers, plan.num_layers)}: at most {share} of forward again"


def _note(report: MemoryReport) -> str:
    return (
        f"tight: within {100 * TOLERANCE:.0f} % of the limit; {RESERVE_BYTES / GIB:g} GiB are left to what a process "
        "takes besides tensors. The worst case: the lowest layer active, every layer visited, every row full. "
        f"host: states and streamed weights in {'pinned ' if report.request.device == 'cuda' else ''}host memory"
    )
