"""The report of ``grass-ray plan`` as a table, as Markdown or as JSON.

::

    print(render_report(make_report(request), "table"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from grass_ray.config import to_json
from grass_ray.memory.fit import TOLERANCE
from grass_ray.memory.plan import MemoryPlan
from grass_ray.memory.report import MemoryReport
from grass_ray.memory.settings import IN_BACKWARD, needed_bytes
from grass_ray.overrides import assignment
from grass_ray.training.report import GIB, RESERVE_BYTES, first_layers

HEADER: tuple[str, ...] = (
    *("method", "offload", "weights", "gradients", "states", "staging", "activations", "logits", "other"),
    *("peak", "host", "peak in", "fits"),
)


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
        "unclipped": {name: other.to_dict() for name, (_, other) in report.unclipped.items()},
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
    return lines + _clipping(report)


def _clipping(report: MemoryReport) -> list[str]:
    """What clipping costs: one line for all methods whose gradients take much."""
    if not report.unclipped:
        return []

    def needed(plan: MemoryPlan) -> str:
        return f"{needed_bytes(plan, report.request.device) / GIB:.2f}"

    costs = ", ".join(
        f"{name} {plan.offload} {needed(other)} GiB instead of {needed(plan)}"
        for name, (plan, other) in report.unclipped.items()
    )
    settings = " ".join(assignment(key, value) for key, value in IN_BACKWARD.items())
    return [f"clipping keeps the gradients of all that trains until the step. With --set {settings}: {costs}"]


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
