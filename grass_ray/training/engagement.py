"""Prove that layer-wise training was engaged: who trained when, and that nobody else changed.

At every switch each layer's weights are fingerprinted; an interval in which another set than the active one changed
is noted for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.training.report import Engagement, StepReport

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class EngagementLog:
    """Writes an :class:`Engagement` step by step.

    Args:
        optimizer: the optimizer whose layers are followed.
        total_parameters: of the whole model, adapters included.
    """

    def __init__(self, optimizer: LayerwiseAdamW, total_parameters: int) -> None:
        self._layers = [list(module.parameters()) for module in optimizer.stack.modules]
        self._interval_active: tuple[int, ...] = optimizer.active_layers
        self._interval_updates = 0
        self._fingerprints = [fingerprint(layer) for layer in self._layers]
        self.engagement = Engagement(
            num_layers=len(self._layers),
            total_parameters=total_parameters,
            trainable_parameters=0,
            visits=[0] * len(self._layers),
        )
        if not optimizer.probing:
            self._begin_interval(optimizer, first_step=1)

    def note(self, report: StepReport, optimizer: LayerwiseAdamW) -> None:
        """Take note of a step; must be called for every one, after the optimizer has stepped."""
        log = self.engagement
        self._interval_updates += report.phase == "train" and report.lr > 0
        if report.refreshed and report.importance is not None and report.probabilities is not None:
            log.refreshes.append((report.step, report.importance, report.probabilities))
        log.resident_state_bytes, log.host_state_bytes = optimizer.state_bytes()
        if report.switched or report.step == report.total_steps:
            self._end_interval(report.phase)
        if report.switched and report.step < report.total_steps:
            self._begin_interval(optimizer, first_step=report.step + 1)

    def _begin_interval(self, optimizer: LayerwiseAdamW, first_step: int) -> None:
        log = self.engagement
        self._interval_active = optimizer.active_layers
        self._interval_updates = 0
        log.intervals.append((first_step, optimizer.active_layers))
        for layer in optimizer.active_layers:
            log.visits[layer] += 1
        trainable = sum(p.numel() for p in optimizer.active_parameters())
        log.trainable_parameters = max(log.trainable_parameters, trainable)

    def _end_interval(self, phase: str) -> None:
        now = [fingerprint(layer) for layer in self._layers]
        changed = {layer for layer, (old, new) in enumerate(zip(self._fingerprints, now, strict=True)) if old != new}
        expected = set(self._interval_active) if phase == "train" and self._interval_updates else set()
        if changed != expected:
            self.engagement.only_active_layers_changed = False
        self._fingerprints = now

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "engagement": asdict(self.engagement),
            "interval_active": list(self._interval_active),
            "interval_updates": self._interval_updates,
            "fingerprints": self._fingerprints,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        values = dict(state["engagement"])
        values["intervals"] = [(step, tuple(active)) for step, active in values["intervals"]]
        values["refreshes"] = [(step, tuple(m), tuple(p)) for step, m, p in values["refreshes"]]
        self.engagement = Engagement(**values)
        self._interval_active = tuple(state["interval_active"])
        self._interval_updates = state["interval_updates"]
        self._fingerprints = state["fingerprints"]


def fingerprint(parameters: Sequence[nn.Parameter]) -> int:
    """A number that changes when any weight's bits do: the position-weighted sum of the bits, modulo 2**64."""
    total = 0
    for parameter in parameters:
        bits = parameter.detach().flatten().view(INTEGERS[parameter.element_size()])
        total = total * 31 + int(bits.sum(dtype=torch.int64))
    return total % 2**64
