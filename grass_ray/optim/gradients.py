"""What happens to gradients from their arrival in backward until the update: measured, reduced, or dropped.

Hooks on the parameters do most of it while backward goes on. They hold weak references alone: Python's garbage
collector does not see what a tensor's hooks hold, and neither optimizer nor model would ever be freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grass_ray.layerwise.importance import GradNormMeter
from grass_ray.optim.active_set import ActiveSet
from grass_ray.optim.in_backward import BackwardUpdates
from grass_ray.optim.loss_scaling import LossScale
from grass_ray.optim.sync import GradientSync
from grass_ray.optim.units import Unit
from grass_ray.optim.watch import Watch, has_gradient


class Owner(Protocol):
    """The optimizer. ``last_micro_batch``: the next backward is the last one before its ``step``."""

    last_micro_batch: bool
    param_groups: list[dict[str, Any]]


class Gradients:
    """The gradients of an optimizer's step.

    Args:
        owner: the optimizer.
        active: which units train.
        sync: how gradients become those of all workers.
        watch: is told of units that got no gradient.
        handles: takes up the handles of all hooks.
        backward: updates units inside backward; None leaves all gradients to ``step``.
    """

    def __init__(
        self,
        owner: Owner,
        active: ActiveSet,
        sync: GradientSync,
        watch: Watch,
        handles: list[Any],
        backward: BackwardUpdates | None = None,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._units = units = active.parts.units
        self._unit_of: dict[Tensor, Unit] = {
            p: unit for unit in (*units, *active.parts.constant) for p in unit.parameters
        }
        self._index_of = {unit.name: index for index, unit in enumerate(units)}
        self._sampler = sampler = active.sampler
        self._active = active
        self._sync = sync
        self._watch = watch
        self._handles = handles
        self._backward = backward
        # whether this step's backward has moved an inactive unit
        self._corrected = False
        # norms of the gradients that are freed already, by unit
        self._norms: dict[str, list[Tensor]] = {}
        # whether backward brought a gradient that probing did not keep
        self._dropped = False
        managed = active.parts.managed
        self._never_seen = torch.full((len(units),), torch.nan, device=active.parts.device)
        self._meter: GradNormMeter | None = None
        if sampler.grad_norms == "arriving" or sampler.probing:
            self._meter = GradNormMeter(
                [unit.parameters for unit in units], sharded=sync.sharded, device=active.parts.device
            )
            self._meter.dropping = sampler.probing
            handles.extend(self._meter.handles)
        handles.extend(sync.watch(managed, weakref.WeakMethod(self._watch_seen)))
        if active.inactive_updates is not None:
            for parameter in (p for unit in units for p in unit.parameters):
                self._after(parameter, Gradients._correct)
        if sync.workers.count > 1 or backward is not None:
            for parameter in managed:
                self._after(parameter, Gradients._complete)

    @property
    def witness(self) -> nn.Parameter | None:
        """A parameter of the meter whose gradient tells the scale, if a loss scaler unscales it with the others."""
        return None if self._meter is None else self._meter.witness

    # ------------------------------------------------------------------------------------------------ during backward

    def _after(self, parameter: Tensor, react: Callable[[Gradients, Tensor], None]) -> None:
        """Call ``react`` whenever the parameter's gradient was accumulated, as long as the optimizer lives."""
        me = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            gradients = me()
            if gradients is not None:
                react(gradients, parameter)

        self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _watch_seen(self, parameter: nn.Parameter, seen: nn.Parameter) -> None:
        """Measure, and drop while probing, the gradients that autograd computes for a parameter."""
        if self._meter is not None and seen is not parameter:
            self._meter.watch(parameter, seen)
            self._handles.append(self._meter.handles[-1])
        if self._sampler.probing:
            self._after(seen, Gradients._drop_while_probing)

    def _drop_while_probing(self, parameter: Tensor) -> None:
        """Free a gradient the moment it was measured, so that probing never holds more than a few of them."""
        if self._sampler.probing:
            parameter.grad = None
            self._dropped = True

    def _correct(self, parameter: Tensor) -> None:
        """Use the gradient of a parameter that is not active, and free it."""
        unit, owner = self._unit_of[parameter], self._owner()
        if owner is None or self._index_of[unit.name] not in self._active.corrected:
            return
        self.check_whole()
        self._active.uninterrupted.begin()
        self._corrected = True
        group = next(index for index, parameters in unit.groups if any(p is parameter for p in parameters))
        assert self._active.inactive_updates is not None
        self._active.inactive_updates.update(parameter, float(owner.param_groups[group]["lr"]))
        parameter.grad = None

    def _complete(self, parameter: Tensor) -> None:
        """Give a gradient to its reduction over the workers, or to its unit's update."""
        owner = self._owner()
        last = owner is not None and owner.last_micro_batch and not self._sampler.probing
        if self._backward is None:
            self._sync.arrived(parameter, self._unit_of[parameter], self._active.units, last=last)
        elif last and parameter.grad is not None:  # not freed after a small update
            self.check_whole()
            self._backward.arrived(self._unit_of[parameter])

    # ------------------------------------------------------------------------------------------------- during a step

    @property
    def under_way(self) -> frozenset[str]:
        """Names of the units whose gradients backward has given to a reduction, or to an update."""
        return self._sync.under_way if self._backward is None else self._backward.updated

    @property
    def waiting(self) -> list[Unit]:
        """The active units whose update is left to ``step``."""
        return self._active.units if self._backward is None else []

    def check_whole(self) -> None:
        """Raise RuntimeError if an earlier step was interrupted; one that backward has begun is not."""
        if not self.begun:
            self._active.uninterrupted.check()

    @property
    def begun(self) -> bool:
        """Whether backward has updated weights since the last step."""
        return self._corrected or (self._backward is not None and bool(self._backward.updated))

    def nothing_arrived(self) -> bool:
        """Whether no backward reached the active units; several workers go through a step together."""
        if self._sync.workers.count > 1 or not self._active.units or self.under_way:
            return False
        if self._sampler.probing:
            return not self._dropped
        return not has_gradient(self._active.parameters)

    def measure(self, scale: LossScale | None) -> Tensor:
        """The step's RMS gradient of each unit over all workers, as they arrived.

        Gradients that a loss scaler has scaled are brought to the scale of the loss itself first.

        Returns:
            Shape (units,), on the device; NaN where nothing was measured.

        Raises:
            RuntimeError: a loss scaler was used with gradients that are reduced already, whose scales may differ, or
                that were used inside backward.
        """
        if scale is not None:
            self._check_scalable()
            scale.unscale(self._active.parameters)
        if self._meter is None:
            return self._never_seen
        unseen = set(self._meter.unseen())
        if self._sampler.probing:
            self._watch.without_gradient([unit for index, unit in enumerate(self._units) if index in unseen])
        # a loop divides each micro-batch's loss by their number: at the scale of the step's loss, however it is cut
        micro_batches = self._meter.micro_batches
        inverse = self._meter.inverse_scale() if scale is not None else 1.0
        norms = self._meter.collect() * micro_batches * inverse
        if scale is not None and scale.inverse is not None:
            norms = norms * scale.inverse
        return self._sync.workers.average(norms, summed=self._sync.workers.reduction == "sum")

    def _check_scalable(self) -> None:
        if self._sync.sharded or self.under_way or self._active.inactive_updates is not None:
            raise RuntimeError(
                "a loss scaler (GradScaler) works with whole gradients that wait for step(): not with a model sharded "
                "by FSDP2, with inactive_updates, or with last_micro_batch; train in bfloat16, which needs no scaler, "
                "or leave them out"
            )

    def finish(self) -> Tensor:
        """Make the active units' gradients those of all workers; their global norm, a scalar on the device.

        Where updates belong to backward, this does those that it left out.
        """
        active, under_way = self._active.units, self.under_way
        self._watch.without_gradient(
            [unit for unit in active if unit.name not in under_way and not has_gradient(unit.parameters)]
        )
        if self._corrected:
            self._corrected = False
            self._active.uninterrupted.reset()
        if self._backward is not None:
            if not under_way:
                self._watch.not_in_backward()
            self._norms = self._backward.finish()
            return self._total(norm for of_unit in self._norms.values() for norm in of_unit)
        self._sync.finish(active)
        (norm,) = self._sync.norms([self._active.parameters])
        return norm

    def accumulated_norms(self) -> Tensor:
        """RMS of each active unit's gradient as it is now, shape (units,), NaN elsewhere."""
        norms = self._never_seen.clone()
        active = [self._units[index] for index in self._active.indices]
        if self._backward is None:
            found = self._sync.norms([unit.parameters for unit in active])
        else:
            found = [self._total(self._norms.get(unit.name, ())) for unit in active]
        for index, unit, norm in zip(self._active.indices, active, found, strict=True):
            norms[index] = norm.float() / unit.size**0.5
        return norms

    def _total(self, norms: Iterable[Tensor]) -> Tensor:
        """The norm of everything whose parts have these norms; 0 of nothing."""
        parts = [norm.to(self._active.parts.device) for norm in norms]
        return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())

    def total_norm(self, norms: Tensor) -> Tensor:
        """Global gradient norm of the units from their RMS values, shape (units,); NaN if none was measured."""
        total = (norms.square() * norms.new_tensor([unit.size for unit in self._units])).nansum().sqrt()
        return total.masked_fill(norms.isnan().all(), torch.nan)

    def next_step(self) -> None:
        """The sampler has observed a step, or was loaded: it may have ended its probing, or be at it again."""
        self._corrected = False
        if self._backward is not None:
            self._backward.forget()
        if self._meter is not None:
            self._meter.dropping = self._sampler.probing

    def clear(self) -> None:
        """Gradients were thrown away: forget what was measured of them."""
        self._dropped = self._corrected = False
        if self._backward is not None:
            self._backward.forget()
        if self._meter is not None:
            self._meter.clear()
