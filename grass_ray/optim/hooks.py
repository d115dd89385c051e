"""Hooks on a model that do not hold the optimizer they belong to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class WeakHook:
    """Calls a method as long as its object lives; whatever a hook is called with is left out.

    Copies, and what a pickled model brings back, do nothing: they belong to no optimizer.

    Args:
        method: a bound method.
        given: its arguments.
    """

    def __init__(self, method: Callable[..., None] | None = None, *given: Any) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)
        self._given = given

    def __call__(self, *_: Any) -> None:
        """Call the method, if its object lives."""
        method = None if self._method is None else self._method()
        if method is not None:
            method(*self._given)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()


class BeforeBackward(WeakHook):
    """A forward hook: calls a method whenever backward is about to enter the module."""

    def __call__(self, *given: Any) -> None:
        """Follow the module's output: its gradient is complete before the module's own backward begins."""
        method = None if self._method is None else self._method()
        if method is not None and not in_backward():
            for tensor in tree_leaves(given[-1]):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(WeakHook(method, *self._given))  # type: ignore[no-untyped-call]


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread; a forward then is a layer that is recomputed."""
    return int(torch._C._current_graph_task_id()) != -1


def handles_of(owner: object) -> list[Any]:
    """An empty list for the handles of hooks on a model; they are removed when ``owner`` is gone."""
    handles: list[Any] = []
    weakref.finalize(owner, remove, handles).atexit = False
    return handles


def remove(handles: list[Any]) -> None:
    """Take hooks away from a model."""
    while handles:
        handles.pop().remove()
