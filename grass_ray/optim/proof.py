"""Prove that exactly the active units train: fingerprints of all weights, compared at switches.

``optimizer.prove()`` starts it in any training loop. A unit that changed without being active, or was active and did
not change, is a mistake that no loss curve shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grass_ray.optim.data_parallel import Workers
from grass_ray.optim.sharded import local
from grass_ray.optim.units import Unit

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
# a fingerprint reads every unit once; methods that switch at every step share one over a few of their intervals
STEPS_BETWEEN_CHECKS = 4


class Proof:
    """What changed and what should have.

    Args:
        units: what is trained by turns.
        frozen: what must never change.
        workers: those that have some rows of each parameter; None where parameters are whole.

    Attributes:
        mistakes: one sentence per mistake, empty while exactly the active units changed.
    """

    def __init__(self, units: Sequence[Unit], frozen: Sequence[nn.Parameter], workers: Workers | None = None) -> None:
        self._units = units
        self._frozen = frozen
        self._workers = workers
        self._fingerprints = [self._fingerprint(unit.parameters) for unit in units]
        self._frozen_fingerprint = self._fingerprint(frozen)
        self._trained: dict[int, list[Tensor]] = {}
        self._excused: set[int] = set()
        self._steps_since_check = 0
        self.mistakes: list[str] = []

    @property
    def due(self) -> bool:
        """Whether enough steps were taken for another check at a switch."""
        return self._steps_since_check >= STEPS_BETWEEN_CHECKS

    def note(self, trained: Iterable[int], skipped: Tensor | None = None, *, steps: int = 1) -> None:
        """One step was taken.

        Args:
            trained: units that were updated.
            skipped: above 0 where the update was called off on the device.
            steps: 0 for a part of a step.
        """
        self._steps_since_check += steps
        for unit in trained:
            if self._units[unit].parameters:
                self._trained.setdefault(unit, []).extend(() if skipped is None else (skipped,))

    def excuse(self, units: Iterable[int]) -> None:
        """These units may have changed without being active: they got small updates."""
        self._excused.update(units)

    def check(self, *, last: bool = False) -> None:
        """Compare the weights with those of the last check; updates must have ended (``optimizer.synchronize()``).

        Args:
            last: compare what must never change as well.
        """
        now = [self._fingerprint(unit.parameters) for unit in self._units]
        changed = {unit for unit, (old, new) in enumerate(zip(self._fingerprints, now, strict=True)) if old != new}
        expected = {unit for unit, skipped in self._trained.items() if not skipped or not all(bool(s) for s in skipped)}
        strange = changed - expected - self._excused
        for units, what in ((strange, "changed while frozen"), (expected - changed, "trained unchanged")):
            self.mistakes += [f"{self._units[unit].name} {what}" for unit in sorted(units)]
        if last and self._fingerprint(self._frozen) != self._frozen_fingerprint:
            self.mistakes.append("parameters outside the optimizer changed")
        self._fingerprints = now
        self._trained = {}
        self._excused = set()
        self._steps_since_check = 0

    def _fingerprint(self, parameters: Iterable[nn.Parameter]) -> int:
        """That of whole parameters; workers with some rows of each add theirs up."""
        sums = bit_sums(parameters)
        return fingerprint(sums if self._workers is None else self._workers.sum_integers(sums))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "expected": sorted(self._trained),
            "excused": sorted(self._excused),
            "steps_since_check": self._steps_since_check,
            "fingerprints": self._fingerprints,
            "frozen_fingerprint": self._frozen_fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._trained = {unit: [] for unit in state["expected"]}
        self._excused = set(state.get("excused", ()))
        self._steps_since_check = state["steps_since_check"]
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
