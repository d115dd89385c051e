"""What a method trains in a model: its units, the size of their states, and the largest sets that may be active.

The units are those that :class:`~grass_ray.optim.layerwise_adamw.LayerwiseAdamW` itself makes of a model on the meta
device, so nothing is allocated. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from grass_ray.config import ConfigError, MethodConfig
from grass_ray.layerwise.all_layers import AllLayersSampler
from grass_ray.layerwise.sampler import Sampler
from grass_ray.memory.allocations import DeviceKind, storages_bytes
from grass_ray.memory.step import profile_block
from grass_ray.optim.chunks import cut, total_bytes
from grass_ray.optim.host_weights import streamable_weights
from grass_ray.optim.inactive import InactiveSGD
from grass_ray.optim.kernels import StateLayout, adamw, state_layout
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.projection import Projection, projected_parameters
from grass_ray.optim.units import Unit
from grass_ray.optim.weights import slot_bytes
from grass_ray.training.optimizer import build_optimizer


@dataclass(frozen=True, kw_only=True)
class TrainedUnits:
    """A method applied to a model on the meta device.

    Attributes:
        model: the model with the method's adapter.
        num_layers: its decoder layers.
        units: what the sampler picks from.
        constant: what trains at every step.
        sampler: started on ``units``.
        projection: updates the ``projected`` parameters in place of AdamW, if there is one.
        projected: those parameters.
        streamed: the weights of each layer that are on the host while they do not train; none if weights are resident.
        method: the method.
    """

    model: nn.Module
    num_layers: int
    units: Sequence[Unit]
    constant: Sequence[Unit]
    sampler: Sampler
    projection: Projection | None
    projected: frozenset[Tensor]
    streamed: Sequence[Sequence[nn.Parameter]]
    method: MethodConfig

    def active_sets(self, recomputed: int = 0) -> list[tuple[int, ...]]:
        """The active sets one of which has the highest peak, if the first ``recomputed`` layers are recomputed."""
        weights = [self.state_bytes([unit]) for unit in self.units]
        sets = self.sampler.largest_active_sets(weights)
        if 0 < recomputed < self.num_layers:
            # an active layer keeps more than a frozen one unless it is recomputed; and where the first of those that
            # are not recomputed is active, all of them keep something
            layers = [0 if unit.layer is None else unit.layer for unit in self.units]
            kept = [size * (layer >= recomputed) for size, layer in zip(weights, layers, strict=True)]
            heavy = 1 + sum(weights)
            first = [size + heavy * (layer == recomputed) for size, layer in zip(kept, layers, strict=True)]
            sets += self.sampler.largest_active_sets(first)
        return list(dict.fromkeys(sets))

    def corrected(self, active: tuple[int, ...]) -> list[Unit]:
        """The units that get small updates in backward while the units with the indices ``active`` are active."""
        if self.method.inactive_updates is None:
            return []
        updates: InactiveSGD = self.method.inactive_updates.make()
        return [self.units[index] for index in updates.units(len(self.units), active)]

    def trained(self, active: Iterable[int]) -> list[Unit]:
        """The units that train while the units with the indices ``active`` are active."""
        return [*(self.units[index] for index in active), *self.constant]

    def state_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes of the optimizer states of ``units``."""
        return sum(self._states_of(p) for unit in units for p in unit.parameters)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the host blocks that hold the states of all sampled units."""
        return sum(self._blocks_of(unit) for unit in self.units)

    @cached_property
    def host_weight_bytes(self) -> int:
        """Bytes of the weights that have a place on the host, also while they train."""
        return storages_bytes(p for layer in self.streamed for p in layer)

    @cached_property
    def weight_ring_bytes(self) -> int:
        """Bytes of the ring on the device through which streamed weights pass."""
        return min(LayerwiseOptions().weight_slots, len(self.streamed)) * slot_bytes(self.streamed)

    def weight_bytes(self, active: Iterable[int]) -> int:
        """Bytes of parameters and buffers on the device while the units with the indices ``active`` are active."""
        trained = {p for index in active for p in self.units[index].parameters}
        away = {p for layer in self.streamed for p in layer} - trained
        return self._all_bytes - storages_bytes(away)

    @cached_property
    def names(self) -> dict[Tensor, str]:
        """Names of all parameters of the model."""
        return {p: name for name, p in self.model.named_parameters()}

    @cached_property
    def _all_bytes(self) -> int:
        return storages_bytes((*self.model.parameters(), *self.model.buffers()))

    @cached_property
    def _updates(self) -> dict[object, int]:
        return {}

    def update_bytes(self, units: Iterable[Unit], device: DeviceKind) -> int:
        """Temporary memory of the update: the largest that any parameter of ``units`` needs, since they take turns."""
        most = 0
        for parameter in (p for unit in units for p in unit.parameters):
            key = (parameter.shape, parameter.dtype, parameter in self.projected, device)
            if key not in self._updates:
                self._updates[key] = self._update_of(parameter, device)
            most = max(most, self._updates[key])
        return most

    def _states_of(self, parameter: Tensor) -> int:
        if parameter in self.projected:
            assert self.projection is not None
            start = self.projection.start(parameter)
            return storages_bytes(tensor for name, tensor in start.items() if name != "step")
        return self._layout(parameter).nbytes(parameter.numel())

    def _layout(self, parameter: Tensor) -> StateLayout:
        return state_layout(parameter.dtype, self.method.optimizer.precision, parameter.ndim)

    def _blocks_of(self, unit: Unit) -> int:
        if not self.projected.isdisjoint(unit.parameters):
            return self.state_bytes([unit])  # projected states are kept on the host as they are
        alike: dict[tuple[torch.dtype, StateLayout], list[nn.Parameter]] = {}
        for parameter in reversed(unit.parameters):
            alike.setdefault((parameter.dtype, self._layout(parameter)), []).append(parameter)
        return sum(total_bytes(cut(unit.name, own, layout)) for (_, layout), own in alike.items())

    @torch.no_grad()
    def _update_of(self, parameter: nn.Parameter, device: DeviceKind) -> int:
        settings = self.method.optimizer
        group = {key: getattr(settings, key) for key in ("lr", "betas", "eps", "weight_decay")}
        weight = nn.Parameter(torch.empty_like(parameter))
        weight.grad = gradient = torch.empty_like(parameter)
        if parameter in self.projected:
            projection = self.projection
            assert projection is not None
            state = projection.start(weight)
            inputs = (weight, gradient, *state.values())
            return profile_block(lambda: projection.update(weight, state, group, key=0), device=device, inputs=inputs)
        layout = self._layout(parameter)
        if device == "cuda" or layout.fused:
            return 0  # kernels change weights and states in place
        shapes = layout.shapes(parameter.shape)
        state = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name, dtype, _ in layout.tensors}
        step = torch.empty((), device="meta")
        inputs = (weight, gradient, step, *state.values())
        return profile_block(
            lambda: adamw([weight.data], [gradient], [state], [step], group), device=device, inputs=inputs
        )


def apply_method(model: nn.Module, method: MethodConfig, train_steps: int) -> TrainedUnits:
    """Apply a method to a model on the meta device; changes what requires gradients in ``model``.

    Args:
        model: on the meta device, with the method's adapter.
        method: what to apply.
        train_steps: length of the training, which a sampler's schedules may depend on.

    Raises:
        ConfigError: the method cannot train this model.
    """
    try:
        # built only for its units: nothing is moved and nothing is measured
        resident = method.model_copy(update={"offload": "none", "weights": "resident"})
        optimizer = build_optimizer(model, AllLayersSampler(), resident)
        sampler = method.sampler.build(seed=0, train_steps=train_steps)
        sampler.start([unit.size for unit in optimizer.units], total=sum(p.numel() for p in model.parameters()))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = method.optimizer.projection
    managed = [p for unit in (*optimizer.units, *optimizer.constant_units) for p in unit.parameters]
    streams = method.weights == "streamed"
    projection = None if settings is None else settings.build()
    return TrainedUnits(
        model=model,
        num_layers=optimizer.stack.num_layers,
        units=optimizer.units,
        constant=optimizer.constant_units,
        sampler=sampler,
        projection=projection,
        projected=frozenset(projected_parameters(projection, optimizer.stack.layers, managed)),
        streamed=streamable_weights(model, optimizer.stack, managed) if streams else [],
        method=method,
    )
