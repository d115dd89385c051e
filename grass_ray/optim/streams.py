"""Where streamed work runs: streams that proceed on their own and wait for each other through events.

``compute`` is the training's own stream; ``fetch`` brings states from the host, ``update`` changes weights and states,
``write`` brings states back, ``weights`` brings weights from the host. On a GPU they are CUDA streams. On a CPU the
same calls run one after another, so the protocol is the same; those of a test record every access and every wait and
prove that no two accesses can collide.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, get_args

import torch

StreamName = Literal["compute", "fetch", "update", "write", "weights"]


class Streams(Protocol):
    """How streamed work is issued. ``reads`` and ``writes`` name the memory that a piece of work touches."""

    def on(
        self, name: StreamName, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> AbstractContextManager[Any]:
        """Issue the work of the block on the stream ``name``."""

    def record(self, name: StreamName) -> Any:
        """An event that happens when everything issued on it so far is done."""

    def wait(self, name: StreamName, event: Any, reason: str) -> None:
        """What is issued on it from now on starts after ``event``; ``reason`` names the hazard."""

    def wait_on_host(self, event: Any, reason: str) -> None:
        """The calling thread goes on after ``event``."""


class ImmediateStreams:
    """Every piece of work runs when it is issued (CPU)."""

    def on(
        self, name: StreamName, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> AbstractContextManager[Any]:
        """Nothing to switch."""
        return nullcontext()

    def record(self, name: StreamName) -> Any:
        """Work that was issued is done."""
        return True

    def wait(self, name: StreamName, event: Any, reason: str) -> None:
        """Nothing is under way."""

    def wait_on_host(self, event: Any, reason: str) -> None:
        """Nothing is under way."""


class CudaStreams:
    """CUDA streams, made once (streams made anew at every step keep their memory).

    Args:
        device: a CUDA device.
        merged: put everything on the compute stream: nothing overlaps (the blocking mode).
    """

    def __init__(self, device: torch.device, *, merged: bool = False) -> None:
        self._device = device
        self._by_name: dict[str, torch.cuda.Stream] = {}
        if not merged:
            self._by_name = {name: torch.cuda.Stream(device) for name in get_args(StreamName)[1:]}  # type: ignore[no-untyped-call]

    def _cuda(self, name: StreamName) -> torch.cuda.Stream:
        return self._by_name.get(name) or torch.cuda.current_stream(self._device)

    def on(
        self, name: StreamName, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> AbstractContextManager[Any]:
        """Make it the current stream."""
        return torch.cuda.stream(self._cuda(name))

    def record(self, name: StreamName) -> torch.cuda.Event:
        """An event on it."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._cuda(name))
        return event

    def wait(self, name: StreamName, event: torch.cuda.Event, reason: str) -> None:
        """Let it wait for the event; the host goes on."""
        self._cuda(name).wait_event(event)

    def wait_on_host(self, event: torch.cuda.Event, reason: str) -> None:
        """Block the host until the event happened."""
        event.synchronize()


def make_streams(device: torch.device, *, merged: bool) -> Streams:
    """The streams of a device."""
    return CudaStreams(device, merged=merged) if device.type == "cuda" else ImmediateStreams()
