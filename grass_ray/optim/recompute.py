"""Compute layers again in backward instead of keeping what backward needs: activation checkpointing, layer by layer.

::

    recompute = Recompute(stack.modules)
    recompute.switch(True)      # any loop, any layer: only the inputs of these layers are kept from now on
    recompute.switch(False)     # the layers are as they were

A layer needs no support for it. Gradients, random numbers (dropout) and the precision under autocast are those of a
layer that keeps everything. A layer that the model checkpoints itself is not computed a third time, and without
gradients none is computed twice.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recompute:
    """Layers that can be switched to be computed again in backward, and back; also a handle as of a hook.

    Args:
        layers: modules whose outputs depend on their inputs, weights and random numbers alone.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._forwards: list[_Forward] = []

    def switch(self, on: bool) -> None:
        """Compute the layers again from the next forward on, or no longer."""
        if not on:
            self.remove()
        elif not self._forwards:
            self._forwards = [_Forward(layer) for layer in self._layers]

    def remove(self) -> None:
        """Leave the layers as they were."""
        while self._forwards:
            self._forwards.pop().remove()


class _Forward:
    """Stands before a layer's forward, inside its hooks and, if the layer is compiled, outside of the compiled code."""

    def __init__(self, layer: nn.Module) -> None:
        # not through the module's own __setattr__, which a compiled module redirects to the layer inside it
        held = vars(layer)
        self._name = "forward" if held.get("_compiled_call_impl") is None else "_compiled_call_impl"
        self._layer = weakref.ref(layer)
        self._given = held.get(self._name)  # None: the forward of its class
        self._on = True
        held[self._name] = self

    def remove(self) -> None:
        """Put back what was there, also from between others of this class; others keep one that does nothing."""
        self._on = False
        layer = self._layer()
        held = {} if layer is None else vars(layer)
        outer = held.get(self._name)
        if outer is self and self._given is None:
            del held[self._name]
        elif outer is self:
            held[self._name] = self._given
        while isinstance(outer, _Forward):
            if outer._given is self:
                outer._given = self._given
            outer = outer._given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer()
        assert layer is not None
        forward = self._own(layer)
        # of transformers; a reentrant one inside this one would run a third time
        checkpoints = layer.training and getattr(layer, "gradient_checkpointing", False)
        if not self._on or checkpoints or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # all by position: checkpoint looks there for the devices whose random numbers it must restore
        values = (*args, *kwargs.values())
        call = _Call(forward, values, tuple(kwargs))
        return checkpoint(call, *(None if _is_cache(value) else value for value in values), use_reentrant=False)

    def _own(self, layer: nn.Module) -> Any:
        return types.MethodType(type(layer).forward, layer) if self._given is None else self._given

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the layer, or what a pickled one brings back, has its own forward again: it belongs to no switch
        return (_same, (self._given,)) if self._given is not None else (getattr, (self._layer(), "forward"))


class _Call:
    """Calls a forward, and any later time with the caches of keys and values as they were at first.

    Args:
        forward: what to call.
        values: all arguments, those by name at the end.
        names: their names.
    """

    def __init__(self, forward: Any, values: Sequence[Any], names: Sequence[str]) -> None:
        self._forward = forward
        self._names = names
        self._given = {place: value for place, value in enumerate(values) if _is_cache(value)}
        self._before = {place: _copied(cache) for place, cache in self._given.items()}

    def __call__(self, *values: Any) -> Any:
        caches = self._given or {place: _copied(cache) for place, cache in self._before.items()}
        self._given = {}
        values = tuple(caches.get(place, value) for place, value in enumerate(values))
        first = len(values) - len(self._names)
        return self._forward(*values[:first], **dict(zip(self._names, values[first:], strict=True)))


def _is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache of transformers, to which a layer's forward adds its keys and values."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")


def _copied(cache: Any) -> Any:
    """A cache with the same tensors, to which others may be added."""
    copied = copy.copy(cache)
    for name, held in vars(cache).items():
        if isinstance(held, list):
            setattr(copied, name, [part if isinstance(part, torch.Tensor) else copy.copy(part) for part in held])
    return copied


def _same(value: Any) -> Any:
    return value
