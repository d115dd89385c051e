"""The optimizer states of all parameters, as torch keeps them: what they consist of, and their update on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grass_ray.optim.kernels import Precision, StateLayout, adamw, state_layout
from grass_ray.optim.projection import Projection
from grass_ray.optim.sharded import first_element, local
from grass_ray.optim.units import Unit

# the Adam step counter: part of a state, but no memory worth moving
STEP = "step"


class States:
    """The states of all parameters, as torch keeps them, and what a state consists of.

    Args:
        held: ``torch.optim.Optimizer.state``.
        precision: what bfloat16 weights keep.
        projection: updates the ``projected`` parameters in place of AdamW.
        projected: what the projection updates.
        index: place of each parameter among all, which names it in a projection.
    """

    def __init__(
        self,
        held: Any,
        precision: Precision,
        projection: Projection | None,
        projected: set[nn.Parameter],
        index: Mapping[nn.Parameter, int],
    ) -> None:
        self.held = held
        self.precision: Precision = precision
        self.projection = projection
        self.projected = projected
        self._index = index

    def layout(self, parameter: Tensor) -> StateLayout:
        """Names and dtypes of a parameter's state tensors."""
        return state_layout(parameter.dtype, self.precision, parameter.ndim)

    def unit_bytes(self, unit: Unit) -> int:
        """Bytes of a unit's states (of the rows here)."""
        return sum(self.layout(p).nbytes(local(p).numel()) for p in unit.parameters)

    def zeros(self, parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The state tensors of a parameter (of its rows here) before its first update."""
        rows, layout = local(parameter), self.layout(parameter)
        states = {
            name: torch.zeros_like(rows, dtype=dtype, device=device, memory_format=torch.preserve_format)
            for name, dtype in layout.dtypes
        }
        shapes = layout.shapes(rows.shape)
        return states | {
            name: torch.zeros(shapes[name], dtype=dtype, device=device) for name, dtype in layout.of_blocks
        }

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of a parameter's state that are on the device now."""
        return tensors_of(self.held.get(parameter, {}))

    def count(self, units: Sequence[Unit], skip: Tensor, *, offloaded: Callable[[Unit], bool]) -> None:
        """Count an update of every parameter that has a gradient; its state is made at the first one.

        Args:
            units: those that train.
            skip: float32 scalar on the device; 1 counts nothing.
            offloaded: whether a unit's state tensors are on the host, so that it has a counter alone here.
        """
        counters = []
        for unit in units:
            for parameter in unit.parameters:
                if parameter.grad is not None:
                    state = self._start(parameter, counter_only=offloaded(unit))
                    if parameter not in self.projected:
                        counters.append(state[STEP])
        if counters:
            # a list: a scalar tensor would be read by the host
            torch._foreach_add_(counters, [1.0 - skip] * len(counters))

    def _start(self, parameter: Tensor, *, counter_only: bool) -> dict[str, Tensor]:
        """The state of a parameter that trains now, made at its first update."""
        state: dict[str, Tensor] = self.held[parameter]
        if state:
            return state
        if self.projection is not None and parameter in self.projected:
            state.update(self.projection.start(parameter))
            return state
        state[STEP] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        if not counter_only:
            state.update(self.zeros(parameter, parameter.device))
        return state

    def update(self, unit: Unit, groups: Sequence[dict[str, Any]], skip: Tensor) -> None:
        """AdamW on one unit whose states are on the device; ``skip`` as in :func:`~grass_ray.optim.kernels.adamw`."""
        for index, parameters in unit.groups:
            trained = [p for p in parameters if p.grad is not None]
            for parameter in (p for p in trained if p in self.projected):
                if not bool(skip):
                    assert self.projection is not None
                    self.projection.update(parameter, self.held[parameter], groups[index], key=self._index[parameter])
            plain: list[Tensor] = [p for p in trained if p not in self.projected]
            states = [self.held[p] for p in plain]
            gradients = [local(p.grad) for p in plain if p.grad is not None]
            steps = [state[STEP] for state in states]
            firsts = [first_element(p) for p in plain]
            adamw([local(p) for p in plain], gradients, states, steps, groups[index], skip, firsts)


def tensors_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a parameter's state that cost memory."""
    return {name: tensor for name, tensor in state.items() if name != STEP}
