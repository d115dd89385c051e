"""Gradients of several workers become one: whole ones by an all-reduce, rows of each by FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from grass_ray.optim.data_parallel import GradientReducer, Workers
from grass_ray.optim.sharded import Shards
from grass_ray.optim.units import Unit


class GradientSync(Protocol):
    """How the gradients of the active units become those of all workers."""

    @property
    def under_way(self) -> frozenset[str]:
        """Names of units whose gradients this step's backward has given to a reduction."""

    def arrived(self, parameter: Tensor, unit: Unit, active: Sequence[Unit]) -> None:
        """Backward has completed a gradient."""

    def finish(self, active: Sequence[Unit]) -> None:
        """Every gradient of ``active`` is that of all workers."""

    def norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """The norm of each group's gradients."""


class WholeGradients:
    """Each worker has all gradients of its own micro-batches: they are reduced unit by unit.

    Args:
        workers: who takes part.
        units: what the sampler picks from, from the first layer up.
        constant: what trains at every step.
    """

    def __init__(self, workers: Workers, units: Sequence[Unit], constant: Sequence[Unit]) -> None:
        self._reducer = GradientReducer(workers, units, constant)

    @property
    def under_way(self) -> frozenset[str]:
        """Names of units whose gradients are on their way."""
        return self._reducer.under_way

    def arrived(self, parameter: Tensor, unit: Unit, active: Sequence[Unit]) -> None:
        """Reduce the unit's gradients when all are there."""
        self._reducer.arrived(unit, active)

    def finish(self, active: Sequence[Unit]) -> None:
        """Reduce what is left, and wait for all."""
        self._reducer.finish(active)

    def norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """The norm of each group's gradients."""
        return [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]


class ShardedGradients:
    """FSDP2 has reduced and scattered gradients by the end of backward.

    Args:
        workers: who takes part.
        shards: how parameters lie over them.
        device: of the rows here.
    """

    under_way: frozenset[str] = frozenset()

    def __init__(self, workers: Workers, shards: Shards, device: torch.device) -> None:
        self._workers = workers
        self._shards = shards
        self._device = device

    def arrived(self, parameter: Tensor, unit: Unit, active: Sequence[Unit]) -> None:
        """Count what was sent."""
        if self._workers.count > 1:
            self._workers.sent_bytes += parameter.numel() * parameter.element_size()

    def finish(self, active: Sequence[Unit]) -> None:
        """Make of the mean over the workers their sum, where that is wanted."""
        parameters = [p for unit in active for p in unit.parameters]
        self._shards.finish(parameters, summed=self._workers.reduction == "sum")

    def norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """The norm of each group's gradients, by one reduction for all."""
        gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
        return list(self._shards.norms(gradients, self._device))
