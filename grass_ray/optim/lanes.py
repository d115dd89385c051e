"""Where streamed work runs: four lanes that proceed on their own and wait for each other through events.

``compute`` is the training's own stream; ``fetch`` brings states from the host, ``update`` changes weights and states,
``write`` brings states back. On CUDA lanes are streams. On a CPU the same calls run one after another, so the protocol
is the same; a test's lanes record every access and every wait and prove that no two accesses can collide.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch

Lane = Literal["compute", "fetch", "update", "write"]


class Lanes(Protocol):
    """How streamed work is issued. ``reads`` and ``writes`` name the memory that a piece of work touches."""

    def on(
        self, lane: Lane, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> AbstractContextManager[Any]:
        """Issue the work of the block on ``lane``."""

    def record(self, lane: Lane) -> Any:
        """An event that happens when everything issued on ``lane`` so far is done."""

    def wait(self, lane: Lane, event: Any, reason: str) -> None:
        """What is issued on ``lane`` from now on starts after ``event``; ``reason`` names the hazard."""

    def wait_on_host(self, event: Any, reason: str) -> None:
        """The calling thread goes on after ``event``."""


class ImmediateLanes:
    """Every piece of work runs when it is issued (CPU)."""

    def on(
        self, lane: Lane, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> AbstractContextManager[Any]:
        """Nothing to switch."""
        return nullcontext()

    def record(self, lane: Lane) -> Any:
        """Work that was issued is done."""
        return True

    def wait(self, lane: Lane, event: Any, reason: str) -> None:
        """Nothing is under way."""

    def wait_on_host(self, event: Any, reason: str) -> None:
        """Nothing is under way."""


class CudaLanes:
    """CUDA streams, made once (streams made anew at every step keep their memory).

    Args:
        device: a CUDA device.
        merged: put all lanes on the compute stream: nothing overlaps (the blocking mode).
    """

    def __init__(self, device: torch.device, *, merged: bool = False) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        if not merged:
            self._streams = {lane: torch.cuda.Stream(device) for lane in ("fetch", "update", "write")}  # type: ignore[no-untyped-call]

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._streams.get(lane) or torch.cuda.current_stream(self._device)

    def on(
        self, lane: Lane, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> AbstractContextManager[Any]:
        """Make the lane's stream the current one."""
        return torch.cuda.stream(self._stream(lane))

    def record(self, lane: Lane) -> torch.cuda.Event:
        """An event on the lane's stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream(lane))
        return event

    def wait(self, lane: Lane, event: torch.cuda.Event, reason: str) -> None:
        """Let the lane's stream wait for the event; the host goes on."""
        self._stream(lane).wait_event(event)

    def wait_on_host(self, event: torch.cuda.Event, reason: str) -> None:
        """Block the host until the event happened."""
        event.synchronize()


def make_lanes(device: torch.device, *, merged: bool) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device, merged=merged) if device.type == "cuda" else ImmediateLanes()
