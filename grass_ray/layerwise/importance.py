"""Measure the importance of each layer: the mean gradient norm of GRASS (arXiv 2604.07808).

The value of layer ``l`` in one micro-batch is the RMS of its gradient, ``sqrt(||g||^2 / N_l)``, taken as autograd
delivers it (before it is accumulated, before clipping). The value of a step is the mean over its micro-batches.

``meter = GradNormMeter(stack.layers)``; after backward ``norms = meter.collect()`` has one value per layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# a gradient no clipping notices, which a loss scaler may still divide by 2**80 without losing a bit
WITNESS = 2.0**-40
ABSENT = -1.0


class GradNormMeter:
    """Hooks on every layer's parameters that record gradient norms.

    Build it while every parameter still requires a gradient: the hooks survive later freezing and thawing, and
    cannot be registered on a frozen parameter.

    A micro-batch is one call of backward. What was noted is forgotten when gradients are thrown away before a step:
    by :meth:`clear`, or when a parameter whose gradients accumulate has none although one was noted. A micro-batch in
    which any layer's norm is not finite is left out.

    Args:
        layers: parameters of each layer.
        device: where the norms are collected; None takes that of the first parameter.
        sharded: the gradients do not pass through these parameters; :meth:`watch` names those that stand for them.

    Attributes:
        dropping: gradients are thrown away as they arrive, so a missing one does not tell that they were cleared.
        witness: a parameter of one element outside the model whose gradient is ``WITNESS`` after backward. A loss
            scaler that unscales the gradients of an optimizer unscales this one too, which tells the scale; while
            ``dropping`` it becomes NaN with any gradient that is not finite. None for sharded gradients.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Parameter]],
        *,
        device: torch.device | None = None,
        sharded: bool = False,
    ) -> None:
        self._layers = layers
        self._sizes = [sum(p.numel() for p in layer) for layer in layers]
        # for each layer and parameter the norm of each micro-batch, by the number autograd gives to a backward
        self._notes: list[list[dict[int, Tensor]]] = [[{} for _ in layer] for layer in layers]
        self._places = {p: (index, slot) for index, layer in enumerate(layers) for slot, p in enumerate(layer)}
        self._device = device or layers[0][0].device
        self._sharded = sharded
        self._empty = True
        self.dropping = False
        self.witness = None if sharded else nn.Parameter(torch.zeros(1, device=self._device))
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        if not sharded:
            for parameter in self._places:
                self.watch(parameter, parameter)

    def watch(self, parameter: nn.Parameter, seen: nn.Parameter) -> None:
        """Take the gradients of ``seen`` as those of ``parameter``, if that belongs to a layer."""
        if parameter in self._places:
            self.handles.append(seen.register_hook(self._noting(*self._places[parameter])))  # type: ignore[no-untyped-call]

    def _noting(self, index: int, slot: int) -> Callable[[Tensor], None]:
        me = weakref.ref(self)  # hooks outlive the meter, and nothing would empty their notes then

        def note(gradient: Tensor) -> None:
            meter = me()
            if meter is not None:
                meter._note(index, slot, gradient.detach())

        return note

    def _note(self, index: int, slot: int, gradient: Tensor) -> None:
        notes = self._notes[index][slot]
        cleared = not self.dropping and not self._sharded and self._layers[index][slot].grad is None
        if notes and cleared:
            notes.clear()
        if self.witness is not None and (self._empty or cleared):
            self.witness.grad = torch.full_like(self.witness, WITNESS)
        self._empty = False
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        notes[torch._C._current_graph_task_id()] = norm
        if self.dropping and self.witness is not None and self.witness.grad is not None:
            # 0 times an infinite or undefined norm is not a number
            self.witness.grad += norm.to(self._device) * 0

    @property
    def micro_batches(self) -> int:
        """How many calls of backward were noted since the last step."""
        return len(self._tasks())

    def _tasks(self) -> set[int]:
        return {task for notes in self._notes for seen in notes for task in seen}

    def unseen(self) -> list[int]:
        """Layers that received no gradient since the last step."""
        return [index for index, notes in enumerate(self._notes) if not any(notes)]

    def inverse_scale(self) -> Tensor | float:
        """What the gradients were multiplied by since backward: 1, or the inverse of the scale of a loss scaler."""
        if self.witness is None or self.witness.grad is None:
            return 1.0
        return self.witness.grad[0] / WITNESS

    def clear(self) -> None:
        """Forget what was noted: the gradients it belongs to are thrown away."""
        for notes in self._notes:
            for seen in notes:
                seen.clear()
        self._empty = True

    def collect(self) -> Tensor:
        """The step's RMS gradient of each layer, and forget it.

        Returns:
            float32 tensor of shape (L,) on the layers' device; NaN where a layer received no gradient in any
            micro-batch that counts. Reading it on the host is the caller's synchronisation, none happens here.
        """
        columns = {task: place for place, task in enumerate(sorted(self._tasks()))}
        if not columns:
            return torch.full((len(self._layers),), torch.nan, device=self._device)
        table = torch.stack([self._of_layer(index, columns) for index in range(len(self._layers))])
        counted = table.isfinite().all(0) & (table != ABSENT)
        mean = table.where(counted, 0.0).sum(1) / counted.sum(1)
        self.clear()
        return mean

    def _of_layer(self, index: int, columns: dict[int, int]) -> Tensor:
        """RMS gradient of a layer in each micro-batch, shape (micro-batches,); ABSENT where it received none."""
        notes = self._notes[index]
        if not any(notes):
            return torch.full((len(columns),), ABSENT, device=self._device)
        norms = torch.zeros(len(notes), len(columns), device=self._device)
        for slot, seen in enumerate(notes):
            if len(seen) == len(columns):
                norms[slot] = torch.stack([seen[task] for task in columns]).to(self._device)
            else:
                for task, norm in seen.items():
                    norms[slot, columns[task]] = norm
        values = norms.square().sum(0).div(self._sizes[index]).sqrt()
        for task, place in columns.items():
            if not any(task in seen for seen in notes):
                values[place] = ABSENT
        return values
