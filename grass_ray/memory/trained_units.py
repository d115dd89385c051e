"""What a method trains in a model: its units, the size of their states, and the largest sets that may be active.

The units are those that :class:`~grass_ray.optim.layerwise_adamw.LayerwiseAdamW` itself makes of a model on the meta
device, so nothing is allocated. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from grass_ray.config import ConfigError, MethodConfig
from grass_ray.layerwise.all_layers import AllLayersSampler
from grass_ray.layerwise.sampler import Sampler
from grass_ray.memory.allocations import DeviceKind, storages_bytes
from grass_ray.memory.step import SteppedModel, profile_block
from grass_ray.optim.chunks import cut, total_bytes
from grass_ray.optim.host_weights import streamable_weights
from grass_ray.optim.inactive import InactiveSGD
from grass_ray.optim.kernels import StateLayout, adamw, state_layout
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.parts import Parts, take_apart
from grass_ray.optim.projection import Projection, projected_parameters
from grass_ray.optim.units import Unit
from grass_ray.optim.weights import slot_bytes
from grass_ray.training.optimizer import optimizer_options


class PlannedModel(SteppedModel):
    """A model on the meta device with the adapter of some methods, and what they have in common.

    Args:
        model: with the adapter.

    Attributes:
        nbytes: of all parameters and buffers.
        num_parameters: elements of all parameters.

    Raises:
        ConfigError: the model cannot train layer by layer.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            super().__init__(model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.nbytes = storages_bytes((*self.names, *self.buffers))
        self.num_parameters = sum(p.numel() for p in self.names)
        self._given = {p for p in self.names if p.requires_grad}
        self._parts: dict[LayerwiseOptions, Parts] = {}

    def parts(self, method: MethodConfig) -> Parts:
        """Take the model apart as the optimizer of ``method`` does, once for all methods with which it is the same.

        Raises:
            ValueError: the method cannot train this model.
        """
        given = optimizer_options(method)
        # of the options only these change the units
        options = LayerwiseOptions(
            train_embeddings=given.train_embeddings,
            train_head=given.train_head,
            train_norm=given.train_norm,
            granularity=given.granularity,
        )
        if options not in self._parts:
            for parameter in self.names:
                parameter.requires_grad_(parameter in self._given)
            self._parts[options] = take_apart(self.model, AllLayersSampler(), options)
        return self._parts[options]


@dataclass(frozen=True, kw_only=True)
class TrainedUnits:
    """A method applied to a model on the meta device.

    Attributes:
        whole: the model with the method's adapter.
        num_layers: its decoder layers.
        units: what the sampler picks from.
        constant: what trains at every step.
        sampler: started on ``units``.
        projection: updates the ``projected`` parameters in place of AdamW, if there is one.
        projected: those parameters.
        streamed: the weights of each layer that are on the host while they do not train; none if weights are resident.
        method: the method.
    """

    whole: PlannedModel
    num_layers: int
    units: Sequence[Unit]
    constant: Sequence[Unit]
    sampler: Sampler
    projection: Projection | None
    projected: frozenset[Tensor]
    streamed: Sequence[Sequence[nn.Parameter]]
    method: MethodConfig
    _known: dict[object, int] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model with the method's adapter."""
        return self.whole.model

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
        return sum(self._once("states", unit, self._states_of_unit) for unit in units)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the host blocks that hold the states of all sampled units."""
        return sum(self._once("blocks", unit, self._blocks_of) for unit in self.units)

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
        return self.whole.nbytes - storages_bytes(away)

    def update_bytes(self, units: Iterable[Unit], device: DeviceKind) -> int:
        """Temporary memory of the update: the largest that any parameter of ``units`` needs, since they take turns."""
        most = 0
        for parameter in (p for unit in units for p in unit.parameters):
            key = (*self._kind(parameter), device)
            if key not in self._known:
                self._known[key] = self._update_of(parameter, device)
            most = max(most, self._known[key])
        return most

    def _kind(self, parameter: Tensor) -> tuple[object, ...]:
        """Equal for parameters whose states and updates take the same."""
        return parameter.shape, parameter.dtype, parameter in self.projected

    def _once(self, what: str, unit: Unit, count: Callable[[Unit], int]) -> int:
        """Count what a unit takes, once for all units with the same parameters."""
        key = (what, *map(self._kind, unit.parameters))
        if key not in self._known:
            self._known[key] = count(unit)
        return self._known[key]

    def _states_of_unit(self, unit: Unit) -> int:
        return sum(self._states_of(p) for p in unit.parameters)

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


def apply_method(whole: PlannedModel, method: MethodConfig, train_steps: int) -> TrainedUnits:
    """Apply a method to a model on the meta device; changes what requires gradients in it.

    Args:
        whole: the model with the method's adapter.
        method: what to apply.
        train_steps: length of the training, which a sampler's schedules may depend on.

    Raises:
        ConfigError: the method cannot train this model.
    """
    try:
        parts = whole.parts(method)
        sampler = method.sampler.build(seed=0, train_steps=train_steps)
        sampler.start([unit.size for unit in parts.units], total=whole.num_parameters)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = method.optimizer.projection
    managed = [p for unit in (*parts.units, *parts.constant) for p in unit.parameters]
    streams = method.weights == "streamed"
    projection = None if settings is None else settings.build()
    return TrainedUnits(
        whole=whole,
        num_layers=parts.stack.num_layers,
        units=parts.units,
        constant=parts.constant,
        sampler=sampler,
        projection=projection,
        projected=frozenset(projected_parameters(projection, parts.stack.layers, managed)),
        streamed=streamable_weights(whole.model, parts.stack, managed) if streams else [],
        method=method,
    )
