"""Prove that layer-wise training was engaged: who trained when, and that nobody else changed.

Units are fingerprinted at switches; one that changed without being active, or was active and did not change, is noted
for good. Everything that never trains is fingerprinted at the start and at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.optim.sharded import local
from grass_ray.training.report import Engagement, StepReport

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
# a fingerprint reads every unit once; methods that switch at every step share one over a few of their intervals
STEPS_BETWEEN_CHECKS = 4


class EngagementLog:
    """Writes an :class:`Engagement` step by step.

    Args:
        optimizer: the optimizer whose units are followed.
        model: the whole model, adapters included.
    """

    def __init__(self, optimizer: LayerwiseAdamW, model: nn.Module) -> None:
        self._units = optimizer.units
        self._workers = optimizer.workers if optimizer.sharded else None
        managed = {p for group in optimizer.param_groups for p in group["params"]}
        self._frozen = [p for p in model.parameters() if p not in managed]
        self._frozen_fingerprint = self._fingerprint(self._frozen)
        self._fingerprints = [self._fingerprint(unit.parameters) for unit in self._units]
        self._expected: set[int] = set()
        self._steps_since_check = 0
        self._switches = -1
        self._sent_bytes = 0
        self._trained_steps = 0
        # what a step of full data-parallel training would reduce
        self.full_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.engagement = Engagement(
            num_layers=optimizer.stack.num_layers,
            units=[unit.name for unit in self._units],
            total_parameters=sum(p.numel() for p in model.parameters()),
            trainable_parameters=0,
            visits=[0] * len(self._units),
            workers=optimizer.workers.count,
        )

    def begin_step(self, step: int, optimizer: LayerwiseAdamW) -> None:
        """Must be called before every step's forward; notes a new active set and proves the last interval."""
        log = self.engagement
        if optimizer.probing or optimizer.switches == self._switches:
            return
        if self._steps_since_check >= STEPS_BETWEEN_CHECKS:
            optimizer.synchronize()
            self._check()
        self._switches = optimizer.switches
        log.intervals.append((step, optimizer.active_units))
        for unit in optimizer.active_units:
            log.visits[unit] += 1
        log.trainable_parameters = max(log.trainable_parameters, sum(p.numel() for p in optimizer.active_parameters()))

    def note(self, report: StepReport, optimizer: LayerwiseAdamW, trained: tuple[int, ...]) -> None:
        """Must be called after every step with the units that were active in it."""
        log = self.engagement
        self._steps_since_check += 1
        if report.phase == "train" and report.lr > 0:
            self._expected |= {unit for unit in trained if self._units[unit].parameters}
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
            self._check()
            if self._fingerprint(self._frozen) != self._frozen_fingerprint:
                log.only_active_layers_changed = False

    def _fingerprint(self, parameters: Iterable[nn.Parameter]) -> int:
        """That of whole parameters; workers with some rows of each add theirs up."""
        sums = bit_sums(parameters)
        return fingerprint(sums if self._workers is None else self._workers.sum_integers(sums))

    def _check(self) -> None:
        now = [self._fingerprint(unit.parameters) for unit in self._units]
        changed = {unit for unit, (old, new) in enumerate(zip(self._fingerprints, now, strict=True)) if old != new}
        if changed != self._expected:
            self.engagement.only_active_layers_changed = False
        self._fingerprints = now
        self._expected = set()
        self._steps_since_check = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "engagement": asdict(self.engagement),
            "expected": sorted(self._expected),
            "steps_since_check": self._steps_since_check,
            "switches": self._switches,
            "sent_bytes": self._sent_bytes,
            "trained_steps": self._trained_steps,
            "fingerprints": self._fingerprints,
            "frozen_fingerprint": self._frozen_fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        values = dict(state["engagement"])
        values["intervals"] = [(step, tuple(active)) for step, active in values["intervals"]]
        values["refreshes"] = [(step, tuple(m), tuple(p)) for step, m, p in values["refreshes"]]
        values["ages"] = [(step, tuple(ages)) for step, ages in values.get("ages", ())]
        self.engagement = Engagement(**values)
        self._expected = set(state["expected"])
        self._steps_since_check = state["steps_since_check"]
        self._switches = state["switches"]
        self._sent_bytes, self._trained_steps = state.get("sent_bytes", 0), state.get("trained_steps", 0)
        self._fingerprints = state["fingerprints"]
        self._frozen_fingerprint = state["frozen_fingerprint"]


def fingerprint(sums: Iterable[int]) -> int:
    """A number that changes when any of :func:`bit_sums` does: their position-weighted sum, modulo 2**64."""
    total = 0
    for value in sums:
        total = total * 31 + value
    return total % 2**64


def bit_sums(parameters: Iterable[nn.Parameter]) -> list[int]:
    """For each parameter (of its rows here) the sum of its elements' bits, as int64."""
    bits = (local(p).detach().flatten().view(INTEGERS[p.element_size()]) for p in parameters)
    return [int(integers.sum(dtype=torch.int64)) for integers in bits]
