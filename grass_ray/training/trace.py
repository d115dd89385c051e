"""Report that layer-wise training was engaged: who trained when, and (:mod:`grass_ray.optim.proof`) nobody else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.training.report import LayerTrace, StepReport


class EngagementLog:
    """Writes an :class:`LayerTrace` step by step.

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
        self.engagement = LayerTrace(
            num_layers=optimizer.stack.num_layers,
            units=[unit.name for unit in optimizer.units],
            total_parameters=sum(p.numel() for p in model.parameters()),
            trainable_parameters=0,
            visits=[0] * len(optimizer.units),
            workers=optimizer.workers.count,
        )

    def begin_step(self, step: int, optimizer: LayerwiseAdamW) -> None:
        """Must be called before every step's forward; notes a new active set."""
        log = self.engagement
        if optimizer.probing or optimizer.switches == self._switches:
            return
        self._switches = optimizer.switches
        log.intervals.append((step, optimizer.active_units))
        for unit in optimizer.active_units:
            log.visits[unit] += 1
        log.trainable_parameters = max(log.trainable_parameters, sum(p.numel() for p in optimizer.active_parameters()))

    def note(self, report: StepReport, optimizer: LayerwiseAdamW) -> None:
        """Must be called after every step."""
        log = self.engagement
        if report.refreshed and report.importance is not None and report.probabilities is not None:
            log.refreshes.append((report.step, report.importance, report.probabilities))
            if report.ages is not None:
                log.ages.append((report.step, report.ages))
        log.resident_state_bytes, log.host_state_bytes = optimizer.state_bytes()
        log.workers = max(log.workers, report.workers)
        if report.phase == "train" and report.workers > 1:
            self._sent_bytes += report.sent_bytes
            self._trained_steps += 1
            log.sent_bytes_per_step = self._sent_bytes / self._trained_steps
            log.sent_share_of_full = log.sent_bytes_per_step / self.full_bytes
        if report.step == report.total_steps:
            optimizer.synchronize()
            self._proof.check(last=True)
        if self._proof.mistakes:
            log.only_active_layers_changed = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "engagement": asdict(self.engagement),
            **self._proof.state_dict(),
            "switches": self._switches,
            "sent_bytes": self._sent_bytes,
            "trained_steps": self._trained_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        values = dict(state["engagement"])
        values["intervals"] = [(step, tuple(active)) for step, active in values["intervals"]]
        values["refreshes"] = [(step, tuple(m), tuple(p)) for step, m, p in values["refreshes"]]
        values["ages"] = [(step, tuple(ages)) for step, ages in values.get("ages", ())]
        self.engagement = LayerTrace(**values)
        self._proof.load_state_dict(state)
        self._switches = state["switches"]
        self._sent_bytes, self._trained_steps = state.get("sent_bytes", 0), state.get("trained_steps", 0)
