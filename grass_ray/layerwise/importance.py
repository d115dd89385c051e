"""Measure how much each layer's gradient says: the mean gradient norm of GRASS (arXiv 2604.07808).

A step's value for layer ``l`` is the RMS of its gradient, ``sqrt(||g||^2 / N_l)``, taken on every micro-batch's
gradient as autograd delivers it (before it is accumulated, before clipping) and averaged over micro-batches.

``meter = GradNormMeter(stack.layers)``; after backward ``norms = meter.collect()`` has one value a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class GradNormMeter:
    """Hooks on every layer's parameters that note gradient norms.

    Build it while every parameter still requires a gradient: the hooks survive later freezing and thawing, and
    cannot be registered on a frozen parameter.

    Args:
        layers: parameters of each layer.
        sharded: the gradients do not pass through these parameters; :meth:`watch` names those that stand for them.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], *, sharded: bool = False) -> None:
        self._layers = layers
        self._sizes = [sum(p.numel() for p in layer) for layer in layers]
        self._norms: list[list[list[Tensor]]] = [[[] for _ in layer] for layer in layers]
        self._places = {p: (index, slot) for index, layer in enumerate(layers) for slot, p in enumerate(layer)}
        if not sharded:
            for parameter in self._places:
                self.watch(parameter, parameter)

    def watch(self, parameter: nn.Parameter, seen: nn.Parameter) -> None:
        """Take the gradients of ``seen`` as those of ``parameter``, if that belongs to a layer."""
        if parameter in self._places:
            seen.register_hook(self._noting(*self._places[parameter]))  # type: ignore[no-untyped-call]

    def _noting(self, index: int, slot: int) -> Callable[[Tensor], None]:
        me = weakref.ref(self)  # hooks outlive the meter: nobody would empty their notes then

        def note(gradient: Tensor) -> None:
            meter = me()
            if meter is not None:
                norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
                meter._norms[index][slot].append(norm)

        return note

    def collect(self) -> Tensor:
        """The step's RMS gradient of each layer, and forget it.

        Returns:
            float32 tensor of shape (L,) on the layers' device; NaN where a layer received no gradient. Reading it
            on the host is the caller's synchronisation, none happens here.
        """
        device = self._layers[0][0].device
        values = torch.full((len(self._layers),), torch.nan, device=device)
        for index, norms in enumerate(self._norms):
            micro_batches = max(map(len, norms), default=0)
            if not micro_batches:
                continue
            # one row a parameter, one column a micro-batch; a parameter left out of a micro-batch adds nothing
            table = torch.zeros(len(norms), micro_batches, device=device)
            for slot, seen in enumerate(norms):
                if seen:
                    table[slot, : len(seen)] = torch.stack(seen).to(device)
                    seen.clear()
            values[index] = table.square().sum(0).div(self._sizes[index]).sqrt().mean()
        return values
