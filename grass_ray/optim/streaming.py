"""Stream the active units' states through a small ring on the device: fetch a chunk, update, write it back.

The ring is allocated once and never lent to the caching allocator, so a fetch needs no ordering against the training's
own memory. Three modes share the protocol and give bitwise the same weights:

- ``blocking``: everything on the training's stream, one chunk after another; the baseline;
- ``overlap``: while a chunk is updated the next is fetched and the last written back; all is done when ``step`` ends;
- ``lazy``: chunks are fetched ahead during backward, and updates may go on under the next forward, which waits in front
  of each layer for that layer's own update only. No step ever uses stale weights.

What forward needs first is fetched first. Low layers are needed before a small ring could have brought all of their
states, so ``lazy`` also borrows memory: as backward frees activations, further slots take their place
(:mod:`grass_ray.optim.room`), and each is given back before the next forward reaches the layer at whose backward it was
borrowed. So the peak stays where it was. A borrowed slot serves once: filled again, it would come back late.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grass_ray.optim.chunks import CHUNK_BYTES, Chunk
from grass_ray.optim.host_store import HostStore
from grass_ray.optim.kernels import adamw
from grass_ray.optim.sharded import first_element, local
from grass_ray.optim.streams import StreamName, Streams
from grass_ray.optim.units import Unit

StreamMode = Literal["blocking", "overlap", "lazy"]


@dataclass
class OffloadStats:
    """What moving states cost so far.

    ``bytes_in`` and ``bytes_out`` are those of states that went to and came from the device, by chunks or by whole
    units at a switch; ``weight_bytes_in`` and ``weight_bytes_out`` those of weights that live on the host;
    ``ring_waits`` counts fetches that found every slot of the ring in use; ``exposed_s`` is the time in which training
    stood still for states (on a CUDA device only what the host waited for: what streams waited for shows in a profile),
    ``switch_s`` the part of it at switches.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    weight_bytes_in: int = 0
    weight_bytes_out: int = 0
    chunks: int = 0
    prefetched: int = 0
    ring_waits: int = 0
    exposed_s: float = 0.0
    switch_s: float = 0.0
    pinned: bool = False

    @property
    def hidden_share(self) -> float:
        """Share of fetched chunks that were on their way before ``step`` asked for them."""
        return self.prefetched / self.chunks if self.chunks else 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {name: float(value) for name, value in asdict(self).items()} | {"hidden_share": self.hidden_share}


@dataclass(eq=False)
class Slot:
    """A place for a chunk, in the ring or borrowed.

    ``written`` is the event after which it may be filled again; ``borrowed_at`` the layer that backward had reached
    when its memory was borrowed, None in the ring.
    """

    index: int
    memory: Tensor
    written: Any = None
    borrowed_at: int | None = None


@dataclass
class Gate:
    """What a forward must wait for before it uses a unit's weights, and the gradients kept alive until then."""

    updated: Any
    gradients: list[Tensor]


class Streamer:
    """Updates units whose states live in a host store.

    Args:
        store: the host blocks.
        streams: where the work runs.
        device: of the weights.
        mode: when updates must be done.
        chunk_bytes: size of a slot.
        slots: number of slots.
        stats: what to count into.
    """

    def __init__(
        self,
        store: HostStore,
        streams: Streams,
        device: torch.device,
        mode: StreamMode,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        slots: int = 4,
        stats: OffloadStats,
    ) -> None:
        self.ring = torch.empty(slots * chunk_bytes, dtype=torch.uint8, device=device)
        self.borrowed: list[Slot] = []
        self._chunk_bytes = chunk_bytes
        self.mode = mode
        self.stats = stats
        self._store = store
        self._streams = streams
        self._free = deque(
            Slot(index, self.ring[index * chunk_bytes : (index + 1) * chunk_bytes]) for index in range(slots)
        )
        self._last_in_ring = self._free[-1]
        self._fetched: dict[str, tuple[Slot, Any]] = {}
        self._gates: dict[str, Gate] = {}

    # ------------------------------------------------------------------------------------------------- before the step

    def prefetch(self, units: Iterable[Unit], layer: int, room: Callable[[], int]) -> None:
        """Backward has reached a layer: fetch as many chunks as there is room for.

        Args:
            units: those that will be updated, in the order in which the next forward needs them.
            layer: index of the layer.
            room: how many slots can be borrowed now; asked if the ring is full.
        """
        left: int | None = None
        for chunk in (c for unit in units for c in self._store.chunks(unit.name) if c.name not in self._fetched):
            if not self._free:
                left = room() if left is None else left
                if left <= 0 or not self._borrow(layer):
                    return
                left -= 1
            self._fetch(chunk)
            self.stats.prefetched += 1

    def _borrow(self, layer: int) -> bool:
        try:
            memory = torch.empty(self._chunk_bytes, dtype=torch.uint8, device=self.ring.device)
        except torch.OutOfMemoryError:
            return False  # there is enough, but in pieces
        index = 1 + max(slot.index for slot in (*self.borrowed, self._last_in_ring))
        # what training itself did in this memory must be done when the slot is filled
        slot = Slot(index, memory, self._streams.record("compute"), layer)
        self.borrowed.append(slot)
        self._free.append(slot)
        return True

    def give_back(self, layer: int) -> None:
        """Forward is about to reach a layer: return what was borrowed when backward had reached it, or one below."""
        for slot in [slot for slot in self.borrowed if slot.borrowed_at is not None and slot.borrowed_at <= layer]:
            self._drop(name for name, (other, _) in self._fetched.items() if other is slot)
            if slot in self._free:
                self._free.remove(slot)
            self.borrowed.remove(slot)
            self._streams.wait("compute", slot.written, "borrowed memory is given back after it was written back")

    def drop_prefetched(self) -> None:
        """Other units will be updated than those whose chunks are on their way."""
        self._drop(self._fetched)

    def _drop(self, names: Iterable[str]) -> None:
        """Chunks that no update has changed: their blocks are as they were."""
        for name in list(names):
            slot, fetched = self._fetched.pop(name)
            slot.written = fetched
            self._free.append(slot)

    def end(self) -> None:
        """The ring is not used any more: its memory is training's own when all work under way is done."""
        name: StreamName
        for name in ("fetch", "update", "write"):
            self._streams.wait("compute", self._streams.record(name), "memory is given back after its last use")

    def _fetch(self, chunk: Chunk) -> None:
        slot = self._free.popleft()
        if slot.written is not None:
            self._streams.wait("fetch", slot.written, "a slot is filled again after it was written back")
        if chunk.written is not None:
            self._streams.wait("fetch", chunk.written, "a block is fetched again after it was written back")
        started = time.perf_counter()
        with self._streams.on("fetch", reads=[("block", chunk.name)], writes=[("slot", slot.index)]):
            slot.memory[: chunk.nbytes].copy_(self._store.block(chunk), non_blocking=True)
        self.stats.exposed_s += time.perf_counter() - started
        self._fetched[chunk.name] = (slot, self._streams.record("fetch"))
        self.stats.bytes_in += chunk.nbytes
        self.stats.chunks += 1

    # ---------------------------------------------------------------------------------------------------- the step

    def update(
        self,
        units: Sequence[Unit],
        steps: Mapping[Tensor, Tensor],
        groups: Sequence[Mapping[str, Any]],
        skip: Tensor | None,
        *,
        in_backward: bool = False,
    ) -> None:
        """Update every unit from its parameters' gradients, which are taken away from them.

        Args:
            units: the active ones, in the order in which the next forward needs them.
            steps: for every parameter with a gradient how many updates it has had, this one included.
            groups: the optimizer's parameter groups.
            skip: see :func:`grass_ray.optim.kernels.adamw`.
            in_backward: backward goes on: gradients that earlier updates have read are freed first, so that no more
                than those of two updates are ever held.
        """
        if in_backward and units:
            self._free_gradients()
        ready = self._streams.record("compute")
        self._streams.wait("update", ready, "gradients are complete before an update reads them")
        for unit in units:
            group_of: dict[Tensor, Mapping[str, Any]] = {
                p: groups[index] for index, parameters in unit.groups for p in parameters
            }
            gradients: dict[Tensor, Tensor] = {p: p.grad for p in unit.parameters if p.grad is not None}
            for chunk in self._store.chunks(unit.name):
                self._update_chunk(unit, chunk, gradients, steps, group_of, skip)
            self._gates[unit.name] = Gate(self._streams.record("update"), list(gradients.values()))
            for parameter in gradients:
                parameter.grad = None
        if self.mode != "lazy":
            self.synchronize()

    def _free_gradients(self) -> None:
        for name, gate in self._gates.items():
            if gate.gradients:
                self._streams.wait("compute", gate.updated, "gradients are freed after their update")
                with self._streams.on("compute", writes=[("gradients", name)]):
                    gate.gradients.clear()

    def _update_chunk(
        self,
        unit: Unit,
        chunk: Chunk,
        gradients: Mapping[Tensor, Tensor],
        steps: Mapping[Tensor, Tensor],
        group_of: Mapping[Tensor, Mapping[str, Any]],
        skip: Tensor | None,
    ) -> None:
        if chunk.name not in self._fetched:
            if not self._free:
                self._forget_a_prefetch()
            self._fetch(chunk)
        slot, fetched = self._fetched.pop(chunk.name)
        slot.written = fetched
        if slot.borrowed_at is None:
            self._free.append(slot)  # now, in case that what follows raises; filled again by none before it is written
        self._streams.wait("update", fetched, "states are on the device before an update reads them")
        pieces = [
            (segment, state)
            for segment, state in zip(chunk.segments, chunk.views(slot.memory), strict=True)
            if segment.parameter in gradients
        ]
        touched = [("weights", unit.name), ("slot", slot.index)]
        with self._streams.on("update", reads=[("gradients", unit.name)], writes=touched):
            for group in {id(group): group for group in group_of.values()}.values():
                own = [(segment, state) for segment, state in pieces if group_of[segment.parameter] is group]
                adamw(
                    [segment.of(local(segment.parameter).data) for segment, _ in own],
                    [segment.of(local(gradients[segment.parameter]).contiguous()) for segment, _ in own],
                    [state for _, state in own],
                    [steps[segment.parameter] for segment, _ in own],
                    group,
                    skip,
                    [first_element(segment.parameter) + segment.start for segment, _ in own],
                )
        updated = self._streams.record("update")
        self._streams.wait("write", updated, "states are updated before they are written back")
        started = time.perf_counter()
        with self._streams.on("write", reads=[("slot", slot.index)], writes=[("block", chunk.name)]):
            self._store.block(chunk).copy_(slot.memory[: chunk.nbytes], non_blocking=True)
        self.stats.exposed_s += time.perf_counter() - started
        slot.written = chunk.written = self._streams.record("write")
        self.stats.bytes_out += chunk.nbytes

    def _forget_a_prefetch(self) -> None:
        """Every slot holds a chunk that is not needed yet: give up the last one fetched; its block is as it was."""
        self._drop([next(reversed(self._fetched))])
        self.stats.ring_waits += 1

    # ----------------------------------------------------------------------------------------------- after the step

    def gate(self, unit: str) -> None:
        """Before a forward uses the unit's weights: wait for its update, and let its gradients go."""
        gate = self._gates.pop(unit, None)
        if gate is not None:
            self._streams.wait("compute", gate.updated, "weights are updated before a forward reads them")

    def synchronize(self) -> None:
        """Let the training's stream wait for every update under way."""
        for unit in list(self._gates):
            self.gate(unit)

    def wait_for_host(self) -> None:
        """Block until the host may read every block."""
        for unit in self._store.units:
            for chunk in self._store.chunks(unit):
                if chunk.written is not None:
                    self._streams.wait_on_host(chunk.written, "blocks are written before the host reads them")
