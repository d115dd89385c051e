"""What a method trains in a model, by shape alone: its units, their states, and the largest set that may be active.

Everything is summed over the units that :class:`~grass_ray.optim.layerwise_adamw.LayerwiseAdamW` itself makes of a
model on the meta device; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grass_ray.config import ConfigError, MethodConfig
from grass_ray.layerwise.all_layers import AllLayersSampler
from grass_ray.layerwise.sampler import Sampler
from grass_ray.memory.allocations import DeviceKind, storages_bytes
from grass_ray.memory.step import profile_block
from grass_ray.optim.chunks import cut, total_bytes
from grass_ray.optim.kernels import adamw, state_layout
from grass_ray.optim.projection import Projection
from grass_ray.optim.units import Unit
from grass_ray.training.adapters import add_adapter
from grass_ray.training.optimizer import build_optimizer


@dataclass(frozen=True, kw_only=True)
class TrainedUnits:
    """A method put on a model's skeleton: its units, and what their states are."""

    model: nn.Module
    units: Sequence[Unit]
    constant: Sequence[Unit]
    sampler: Sampler
    projection: Projection | None
    projected: frozenset[Tensor]
    method: MethodConfig

    def active_sets(self) -> list[tuple[int, ...]]:
        """The active sets among which the one with the highest peak is."""
        return self.sampler.largest_active_sets([self.state_bytes([unit]) for unit in self.units])

    def trained(self, active: Iterable[int]) -> list[Unit]:
        """The units that train while ``active`` are drawn."""
        return [*(self.units[index] for index in active), *self.constant]

    def state_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes of the states of ``units``."""
        return sum(self._parameter_states(p) for unit in units for p in unit.parameters)

    def host_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes of the host blocks of the states of ``units``."""
        total = 0
        for unit in units:
            if not self.projected.isdisjoint(unit.parameters):
                total += self.state_bytes([unit])
                continue
            by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
            for parameter in reversed(unit.parameters):
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
            for dtype, own in by_dtype.items():
                total += total_bytes(cut(unit.name, own, state_layout(dtype, self.method.optimizer.precision)))
        return total

    def update_bytes(self, units: Iterable[Unit], device: DeviceKind) -> int:
        """What the update of the most demanding parameter of ``units`` needs beside its state and gradient."""
        shapes: dict[object, nn.Parameter] = {}
        for parameter in (p for unit in units for p in unit.parameters):
            shapes.setdefault((parameter.shape, parameter.dtype, parameter in self.projected), parameter)
        return max((self._update_of(parameter, device) for parameter in shapes.values()), default=0)

    def _parameter_states(self, parameter: Tensor) -> int:
        if parameter in self.projected:
            assert self.projection is not None
            start = self.projection.start(parameter)
            return storages_bytes(tensor for name, tensor in start.items() if name != "step")
        layout = state_layout(parameter.dtype, self.method.optimizer.precision)
        return parameter.numel() * layout.bytes_per_parameter

    @torch.no_grad()
    def _update_of(self, parameter: nn.Parameter, device: DeviceKind) -> int:
        settings = self.method.optimizer
        group = {
            "lr": settings.lr,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        weight = nn.Parameter(torch.empty_like(parameter))
        weight.grad = torch.empty_like(parameter)
        if parameter in self.projected:
            projection = self.projection
            assert projection is not None
            state = projection.start(weight)
            inputs = (weight, weight.grad, *state.values())
            return profile_block(lambda: projection.update(weight, state, group, key=0), device=device, inputs=inputs)
        layout = state_layout(parameter.dtype, settings.precision)
        if device == "cuda" or len(layout.dtypes) == 2:
            return 0  # fused kernels change weights and states in place
        state = {name: torch.empty_like(weight, dtype=dtype) for name, dtype in layout.dtypes}
        step = torch.empty((), device="meta")
        gradient = weight.grad
        inputs = (weight, gradient, step, *state.values())
        return profile_block(
            lambda: adamw([weight.data], [gradient], [state], [step], group), device=device, inputs=inputs
        )


def put_on(model: nn.Module, method: MethodConfig, training_steps: int) -> TrainedUnits:
    """Put a method on a model on the meta device, adapters and all.

    Raises:
        ConfigError: the method cannot work with this model.
    """
    model = add_adapter(model, method.adapter)
    try:
        # built for its units alone: no state is moved, nothing is measured
        optimizer = build_optimizer(model, AllLayersSampler(), method.model_copy(update={"offload": "none"}))
        sampler = method.sampler.build(seed=0, train_steps=training_steps)
        sampler.start([unit.size for unit in optimizer.units], total=_count(model.parameters()))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    given = method.optimizer.projection
    projection = None if given is None else given.build()
    projected = {p for layer in optimizer.stack.layers for p in layer if projection is not None and p.ndim == 2}
    return TrainedUnits(
        model=model,
        units=optimizer.units,
        constant=optimizer.constant_units,
        sampler=sampler,
        projection=projection,
        projected=frozenset(projected),
        method=method,
    )


def _count(parameters: Iterable[Tensor]) -> int:
    """Number of elements."""
    return sum(p.numel() for p in parameters)
