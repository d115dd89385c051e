"""States on the host, streamed through a small ring at every step: the placements of the streaming modes.

:mod:`grass_ray.optim.streaming` explains the modes and moves the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grass_ray.optim.hooks import BeforeBackward, WeakHook, in_backward
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.placement import Footprint, OnDevice, parts_of
from grass_ray.optim.room import Room
from grass_ray.optim.states import STEP, States
from grass_ray.optim.streaming import OffloadStats, Streamer, StreamMode
from grass_ray.optim.streams import make_streams
from grass_ray.optim.units import Unit, in_order_of_forward


class Streamed(OnDevice):
    """States on the host, streamed through a ring at every step; a subclass says when updates must be done."""

    has_blocks: ClassVar[bool] = True
    streams_states: ClassVar[bool] = True
    mode: ClassVar[StreamMode]

    def __init__(self, states: States, device: torch.device, stats: OffloadStats, options: LayerwiseOptions) -> None:
        super().__init__(states, device, stats, options)
        self.streams = options.streams or make_streams(device, merged=self.mode == "blocking")
        self.streamer = self._make_streamer()

    def _make_streamer(self) -> Streamer:
        return Streamer(
            self.host,
            self.streams,
            self._device,
            self.mode,
            chunk_bytes=self._options.chunk_bytes,
            slots=self._options.ring_slots,
            stats=self._stats,
        )

    @staticmethod
    def footprint(*, active: int, inactive: int, blocks: int, ring: int) -> Footprint:
        """Memory needed while a given set of sampled units is active; see :meth:`OnDevice.footprint`."""
        return Footprint(states=0, staging=ring, host=blocks)

    @staticmethod
    def suits(*, keeps: bool, small: bool) -> bool:
        """Unless the states are small; see :meth:`OnDevice.suits`."""
        return not small

    def hooks(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        units: Sequence[Unit],
        before_forward: Callable[[WeakHook], list[Any]],
    ) -> list[Any]:
        """Each layer's forward waits for its own updates, the model's for those of all units outside the layers."""
        by_layer: dict[int | None, list[str]] = {}
        for unit in units:
            by_layer.setdefault(unit.layer, []).append(unit.name)
        handles: list[Any] = []
        for layer, names in by_layer.items():
            module = model if layer is None else layers[layer]
            handles.append(module.register_forward_pre_hook(WeakHook(self.wait_for, names)))
        # the model must not hold the optimizer, which holds the ring and all states
        synchronize = WeakHook(self.synchronize)
        handles.extend(before_forward(synchronize))
        handles.append(model.register_state_dict_pre_hook(synchronize))  # type: ignore[no-untyped-call]
        return handles

    def activate(self, units: Iterable[Unit]) -> None:
        """Make host blocks for units that had none."""
        for unit in units:
            self.host.allocate(unit.name, parts_of(unit, self._states))
            self._offloaded.add(unit.name)

    def forget(self, unit: Unit) -> None:
        """Set the unit's blocks to zero."""
        super().forget(unit)
        self.streamer.wait_for_host()
        self.host.clear(unit.name)

    def update(self, units: Sequence[Unit], groups: Sequence[dict[str, Any]], skip: Tensor) -> None:
        """AdamW on what is on the device, then on the streamed units, chunk by chunk."""
        super().update(units, groups, skip)
        streamed = [unit for unit in units if self.offloaded(unit)]
        trained = [p for unit in streamed for p in unit.parameters if p.grad is not None]
        steps: dict[Tensor, Tensor] = {p: self._states.held[p][STEP] for p in trained}
        self.streamer.update(streamed, steps, groups, skip, in_backward=self._options.update_in_backward)

    def wait_for(self, names: Sequence[str]) -> None:
        """Let the current stream wait for updates of these units that are under way."""
        for name in names:
            self.streamer.gate(name)

    def synchronize(self) -> None:
        """Let the current stream wait for every update under way."""
        self.streamer.synchronize()

    def synchronize_host(self) -> None:
        """Wait until the host may read every block."""
        self.streamer.synchronize()
        self.streamer.wait_for_host()

    def on_device(self, units: Iterable[Unit]) -> Iterator[Tensor]:
        """State tensors of what is not streamed, and the ring."""
        yield from super().on_device(units)
        yield self.streamer.ring

    def clear(self) -> None:
        """Forget every state, and begin with an empty ring."""
        self.streamer.end()
        super().clear()
        self.streamer = self._make_streamer()


class Blocking(Streamed):
    """One chunk after another on the training's own stream (``offload="blocking"``)."""

    mode: ClassVar[StreamMode] = "blocking"


class Overlap(Streamed):
    """Copies and updates overlap, and all are done when ``step`` ends (``offload="overlap"``)."""

    mode: ClassVar[StreamMode] = "overlap"


class Lazy(Streamed):
    """Chunks are fetched during backward, and updates go on under the next forward (``offload="lazy"``)."""

    mode: ClassVar[StreamMode] = "lazy"
    updates_behind: ClassVar[int] = 1

    def __init__(self, states: States, device: torch.device, stats: OffloadStats, options: LayerwiseOptions) -> None:
        super().__init__(states, device, stats, options)
        self.room = Room(device)
        self._in_backward = options.update_in_backward
        self._active: list[Unit] = []
        self._coming: list[Unit] = []
        self._constant: list[Unit] = []

    def hooks(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        units: Sequence[Unit],
        before_forward: Callable[[WeakHook], list[Any]],
    ) -> list[Any]:
        """Also fetch ahead as backward goes down the layers, and give borrowed memory back as forward goes up."""
        handles = super().hooks(model, layers, units, before_forward)
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(WeakHook(self._forward_begins, index)))
            handles.append(layer.register_forward_hook(BeforeBackward(self._backward_begins, index)))
        return handles

    def activate(self, units: Iterable[Unit]) -> None:
        """Make host blocks for units that had none, and fetch those of these units from now on."""
        units = list(units)
        super().activate(units)
        self.streamer.drop_prefetched()
        self.room.forget()
        self._active = in_order_of_forward(units)
        self._expect_all()

    def update(self, units: Sequence[Unit], groups: Sequence[dict[str, Any]], skip: Tensor) -> None:
        """AdamW on all units; see :meth:`Streamed.update`. Inside backward, without any at the end of the step."""
        super().update(units, groups, skip)
        if self._in_backward and units:
            self._coming = [unit for unit in self._coming if unit not in units]
            return
        self._constant = [unit for unit in units if not self.offloaded(unit)]
        self._expect_all()
        self.room.end_step()

    def _expect_all(self) -> None:
        """The units whose states the next updates need, in their order."""
        self._coming = self._active[::-1] if self._in_backward else self._active

    def _forward_begins(self, layer: int) -> None:
        if in_backward():
            self._backward_begins(layer, again=True)
        else:
            self.room.forward()
            self.streamer.give_back(layer)

    def _backward_begins(self, layer: int, *, again: bool = False) -> None:
        self.room.backward(layer, again=again, lent=self._lent)
        self.streamer.prefetch(self._coming, layer, self._slots_to_borrow)

    @property
    def _lent(self) -> int:
        return sum(slot.memory.nbytes for slot in self.streamer.borrowed)

    def _slots_to_borrow(self) -> int:
        if self._in_backward:
            return 0  # what backward frees would be lent for chunks that are needed at once
        parameters = (p for unit in (*self._coming, *self._constant) for p in unit.parameters)
        to_come = sum(p.nbytes for p in parameters if p.grad is None)
        return self.room.bytes(to_come=to_come) // self._options.chunk_bytes
