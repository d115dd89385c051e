"""The gradients of several workers become one: whole gradients by an all-reduce, rows of each by FSDP2."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grass_ray.optim.data_parallel import GradientReducer, Workers
from grass_ray.optim.hooks import WeakHook
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.parts import Parts
from grass_ray.optim.sharded import Shards
from grass_ray.optim.state_dict import Saved, check_shard, gather, rows_of
from grass_ray.optim.units import Unit
from grass_ray.optim.watch import Watch

Watcher = weakref.WeakMethod[Callable[[nn.Parameter, nn.Parameter], None]]


class GradientSync:
    """Each worker has the whole gradients of its own micro-batches; they are reduced unit by unit.

    Args:
        workers: who takes part.
        parts: the model taken apart.

    Attributes:
        sharded: each worker has some rows of each parameter, and not all.
        workers: who takes part.
    """

    sharded: ClassVar[bool] = False

    def __init__(self, workers: Workers, parts: Parts) -> None:
        self.workers = workers
        self._reducer = GradientReducer(workers, parts.units, parts.constant)

    @property
    def under_way(self) -> frozenset[str]:
        """Names of the units whose gradients this step's backward has given to a reduction."""
        return self._reducer.under_way

    def watch(self, parameters: Sequence[nn.Parameter], watcher: Watcher) -> list[Any]:
        """Call ``watcher(parameter, seen)`` once per parameter; ``seen`` is the one whose gradient autograd computes.

        Returns:
            Handles that remove the hooks.
        """
        for parameter in parameters:
            if (watch := watcher()) is not None:
                watch(parameter, parameter)
        return []

    def before_forward(self, wait: WeakHook) -> list[Any]:
        """Call ``wait`` before a forward gathers any weight; the handles of the hooks."""
        return []

    def arrived(self, parameter: Tensor, unit: Unit, active: Sequence[Unit], *, last: bool) -> None:
        """Backward has completed a gradient; ``last`` if no other micro-batch of this step adds to it."""
        if last:
            self._reducer.arrived(unit, active)

    def finish(self, active: Sequence[Unit]) -> None:
        """Make every gradient of ``active`` that of all workers."""
        self._reducer.finish(active)

    def norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """The norm of each group's gradients."""
        return [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]

    def check_model(self, parameter: nn.Parameter, watch: Watch, active: Sequence[Unit]) -> None:
        """Raise RuntimeError, or warn, if the model changed after the optimizer was built.

        Args:
            parameter: one that the model has now.
            watch: compares the active units with those that the optimizer was built on.
            active: the units that train.
        """
        # sharding puts new parameters into a model; the old ones never get a gradient again
        if hasattr(parameter, "placements"):
            raise RuntimeError(
                "the model was sharded (fully_shard) after the optimizer was built, which still has the old weights; "
                "shard the model first, then build the optimizer"
            )
        watch.check_active(active)
        watch.check_strangers(active)

    # --------------------------------------------------------------------------------------------------- saved states

    def entry(self) -> dict[str, Any]:
        """What a saved state says about the rows it holds."""
        return {}

    def check_entry(self, entry: Mapping[str, int] | None) -> None:
        """Raise ValueError if a saved state holds the rows of another worker; None stands for whole parameters."""
        check_shard(entry, None)

    def gather(self, states: Mapping[int, Saved], ordered: Sequence[nn.Parameter]) -> dict[int, Any]:
        """States of whole parameters, on rank 0. Collective: call on every rank."""
        return dict(states) if self.workers.rank == 0 else {}

    def own(self, states: Mapping[int, Saved], entry: Mapping[str, int] | None) -> Mapping[int, Saved]:
        """This worker's part of saved states; ``entry`` as in :meth:`check_entry`."""
        return states


class ShardedGradients(GradientSync):
    """FSDP2 has reduced and scattered the gradients by the end of backward.

    Args:
        workers: who takes part.
        parts: the model taken apart.
        shards: how its parameters lie over the workers.
    """

    sharded: ClassVar[bool] = True

    def __init__(self, workers: Workers, parts: Parts, shards: Shards) -> None:
        super().__init__(workers, parts)
        self._shards = shards
        self._device = parts.device

    def watch(self, parameters: Sequence[nn.Parameter], watcher: Watcher) -> list[Any]:
        """Autograd computes the gradients of gathered parameters, which exist from the first forward on."""
        return self._shards.watch(parameters, watcher)

    def before_forward(self, wait: WeakHook) -> list[Any]:
        """FSDP2 gathers weights on a stream that waits for this hook alone."""
        return self._shards.before_forward(wait)

    def arrived(self, parameter: Tensor, unit: Unit, active: Sequence[Unit], *, last: bool) -> None:
        """Count the bytes that FSDP2 has sent."""
        if self.workers.count > 1:
            self.workers.sent_bytes += parameter.numel() * parameter.element_size()

    def finish(self, active: Sequence[Unit]) -> None:
        """Turn the mean over the workers into their sum, if that is wanted."""
        parameters = [p for unit in active for p in unit.parameters]
        self._shards.finish(parameters, summed=self.workers.reduction == "sum")

    def norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """The norm of each group's gradients, by one reduction for all groups."""
        gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
        return list(self._shards.norms(gradients, self._device))

    def check_model(self, parameter: nn.Parameter, watch: Watch, active: Sequence[Unit]) -> None:
        """Nothing: FSDP2 replaces parameters and flags for its forward."""

    def entry(self) -> dict[str, Any]:
        """Which worker's rows the states hold."""
        return {"shard": self._shards.saved.to_dict()}

    def check_entry(self, entry: Mapping[str, int] | None) -> None:
        """Rows must be this worker's own."""
        check_shard(entry, self._shards)

    def gather(self, states: Mapping[int, Saved], ordered: Sequence[nn.Parameter]) -> dict[int, Any]:
        """All workers' rows put together, on rank 0."""
        return gather(states, ordered, self._shards, keep=self.workers.rank == 0)

    def own(self, states: Mapping[int, Saved], entry: Mapping[str, int] | None) -> Mapping[int, Saved]:
        """This worker's rows."""
        if entry is not None:
            return states
        return {index: rows_of(saved, self._shards) for index, saved in states.items()}


def make_sync(parts: Parts, options: LayerwiseOptions) -> GradientSync:
    """The workers of a model, sharded or not.

    Raises:
        ValueError: the model is sharded over other workers than ``options.process_group``, or an unknown reduction.
    """
    if parts.shards is None:
        return GradientSync(Workers(options.process_group, options.gradient_reduction), parts)
    workers = Workers(parts.shards.of_all(options.process_group), options.gradient_reduction)
    return ShardedGradients(workers, parts, parts.shards)
