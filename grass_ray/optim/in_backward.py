"""Update each unit inside backward, as soon as its own gradients are complete, and free them.

So no step ever holds the gradients of more than a unit or two, which is most of what full fine-tuning needs beside
weights and states on the host. What has to see all gradients first is given up for it: clipping by their global norm,
and calling off a whole step. A unit whose gradients are not finite stays as it is, and the others are updated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grass_ray.optim.active_set import ActiveSet
from grass_ray.optim.placement import OnDevice
from grass_ray.optim.units import Unit


class BackwardUpdates:
    """The updates of a step, unit by unit.

    Args:
        active: which units train.
        placement: updates them.
        groups: the optimizer's parameter groups.
    """

    def __init__(self, active: ActiveSet, placement: OnDevice, groups: Sequence[dict[str, Any]]) -> None:
        self._active = active
        self._placement = placement
        self._groups = groups
        self._arrived: Counter[str] = Counter()
        self._norms: dict[str, list[Tensor]] = {}

    @property
    def updated(self) -> frozenset[str]:
        """Names of the units that this step has updated so far."""
        return frozenset(self._norms)

    def arrived(self, unit: Unit) -> None:
        """One more of the unit's gradients is complete in the step's last backward: update it if it was the last one.

        Raises:
            RuntimeError: the unit was updated already.
        """
        if unit.name in self._norms:
            raise RuntimeError(
                f"backward brought another gradient for {unit.name}, which this step has updated already; set "
                "last_micro_batch = True before the last backward of a step only, and call step() after it"
            )
        self._arrived[unit.name] += 1
        if self._arrived[unit.name] == len(unit.parameters):
            self._update(unit)

    @torch.no_grad()
    def _update(self, unit: Unit) -> None:
        gradients = [p.grad for p in unit.parameters if p.grad is not None]
        if not gradients:
            return
        self._active.uninterrupted.begin()
        norms = self._norms[unit.name] = list(torch._foreach_norm(gradients))
        skip = ~torch.stack(norms).isfinite().all()
        self._placement.update([unit], self._groups, skip.to(torch.float32))
        for parameter in unit.parameters:
            parameter.grad = None
        if moves(self._groups):
            self._active.note_unit(unit, skip)

    def finish(self) -> dict[str, list[Tensor]]:
        """Update the units of which some parameter got no gradient.

        Returns:
            The norms of each updated unit's gradients, by its name, in the order of the active units.
        """
        for unit in self._active.units:
            if unit.name not in self._norms:
                self._update(unit)
        norms = {unit.name: self._norms[unit.name] for unit in self._active.units if unit.name in self._norms}
        self.forget()
        self._active.uninterrupted.reset()
        return norms

    def forget(self) -> None:
        """The step is over, or its gradients were thrown away: if some units were updated, it stays interrupted."""
        self._arrived.clear()
        self._norms.clear()


def moves(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an update with the settings of these parameter groups changes weights at all."""
    return any(float(group["lr"]) > 0 for group in groups)
