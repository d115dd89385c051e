"""Follow which layers train when, and check (:mod:`grass_ray.optim.proof`) that no other weights change."""

from __future__ import annotations

from typing import Any

from torch import nn

from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.training.report import LayerTrace, StepReport


class LayerTracer:
    """Keeps a :class:`~grass_ray.training.report.LayerTrace` step by step.

    Args:
        optimizer: the optimizer whose units are followed.
        model: the whole model, adapters included.
    """

    def __init__(self, optimizer: LayerwiseAdamW, model: nn.Module) -> None:
        self._proof = optimizer.prove()
        self._switches = -1
        self._sent_bytes = 0
        self._trained_steps = 0
        # what a step of full data-parallel training would reduce
        self.full_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.trace = LayerTrace(
            num_layers=optimizer.stack.num_layers,
            units=[unit.name for unit in optimizer.units],
            total_parameters=sum(p.numel() for p in model.parameters()),
            trainable_parameters=0,
            visits=[0] * len(optimizer.units),
            workers=optimizer.workers.count,
        )

    def begin_step(self, step: int, optimizer: LayerwiseAdamW) -> None:
        """Note a new active set; call it before every step's forward."""
        trace = self.trace
        if optimizer.probing or optimizer.switches == self._switches:
            return
        self._switches = optimizer.switches
        trace.intervals.append((step, optimizer.active_units))
        for unit in optimizer.active_units:
            trace.visits[unit] += 1
        active = sum(p.numel() for p in optimizer.active_parameters())
        trace.trainable_parameters = max(trace.trainable_parameters, active)
        trace.trainable_share = trace.trainable_parameters / trace.total_parameters

    def note(self, report: StepReport, optimizer: LayerwiseAdamW) -> None:
        """Note what a step measured, and check which weights it changed; call it after every step."""
        trace = self.trace
        if report.refreshed and report.importance is not None and report.probabilities is not None:
            trace.refreshes.append((report.step, report.importance, report.probabilities))
            if report.ages is not None:
                trace.ages.append((report.step, report.ages))
        trace.resident_state_bytes, trace.host_state_bytes = optimizer.state_bytes()
        trace.workers = max(trace.workers, report.workers)
        if report.phase == "train" and report.workers > 1:
            self._sent_bytes += report.sent_bytes
            self._trained_steps += 1
            trace.sent_bytes_per_step = self._sent_bytes / self._trained_steps
            trace.sent_share_of_full = trace.sent_bytes_per_step / self.full_bytes
        if report.step == report.total_steps:
            optimizer.synchronize()
            self._proof.check(last=True)
        if self._proof.mistakes:
            trace.only_active_layers_changed = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "engagement": self.trace.model_dump(),
            **self._proof.state_dict(),
            "switches": self._switches,
            "sent_bytes": self._sent_bytes,
            "trained_steps": self._trained_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.trace = LayerTrace.model_validate(state["engagement"])
        self._proof.load_state_dict(state)
        self._switches = state["switches"]
        self._sent_bytes, self._trained_steps = state.get("sent_bytes", 0), state.get("trained_steps", 0)
