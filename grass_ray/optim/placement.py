"""Where the optimizer states of sampled units live: one class per place, and bitwise the same weights from each.

``OnDevice`` keeps all that were ever active on the device. ``Resident`` moves those of a unit that leaves the active
set to the host. ``Streamed`` holds all of them on the host and updates them through a small ring
(:mod:`grass_ray.optim.streaming`). What trains at every step is always on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from grass_ray.optim.chunks import CHUNK_BYTES
from grass_ray.optim.host_store import HostStore
from grass_ray.optim.kernels import Precision, StateLayout, adamw, state_layout
from grass_ray.optim.projection import Projection
from grass_ray.optim.sharded import first_element, local
from grass_ray.optim.streaming import OffloadStats, Streamer, StreamMode
from grass_ray.optim.streams import Streams, make_streams
from grass_ray.optim.units import Unit

# the Adam step counter: part of a state, but no memory worth moving
STEP = "step"
Offload = Literal["none", "resident", "blocking", "overlap", "lazy", "auto"]


class States:
    """The states of all parameters, as torch keeps them, and what a state consists of.

    Args:
        held: ``torch.optim.Optimizer.state``.
        precision: what bfloat16 weights keep.
        projection: how the moments of ``projected`` parameters are kept small.
        projected: the matrices of the layers where there is a projection.
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
        return state_layout(parameter.dtype, self.precision)

    def unit_bytes(self, unit: Unit) -> int:
        """Bytes of a unit's states (of the rows here)."""
        return sum(local(p).numel() * self.layout(p).bytes_per_parameter for p in unit.parameters)

    def zeros(self, parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The state tensors of a parameter (of its rows here) before its first update."""
        return {
            name: torch.zeros_like(local(parameter), dtype=dtype, device=device, memory_format=torch.preserve_format)
            for name, dtype in self.layout(parameter).dtypes
        }

    def start(self, parameter: Tensor, *, counter_only: bool) -> dict[str, Tensor]:
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

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of a parameter's state that are on the device now."""
        return tensors_of(self.held.get(parameter, {}))

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


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a placement needs once every unit was active.

    Attributes:
        states: optimizer states on the device.
        staging: ring on the device through which states on the host are streamed.
        host: blocks of states on the host.
    """

    states: int
    staging: int = 0
    host: int = 0


class OnDevice:
    """All states on the device (``offload="none"``).

    Args:
        states: of all parameters.
        device: of the weights.
        stats: what moving states is counted into.
        chunk_bytes: size of a full host block.
    """

    has_blocks = False

    def __init__(
        self, states: States, device: torch.device, stats: OffloadStats, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._states = states
        self._device = device
        self._stats = stats
        self._chunk_bytes = chunk_bytes
        self.host = HostStore(device, chunk_bytes)
        # names of units whose states are on the host now
        self._offloaded: set[str] = set()

    @staticmethod
    def footprint(*, active: int, inactive: int, blocks: int, ring: int) -> Footprint:
        """Memory needed while a given set of sampled units is active.

        Args:
            active: bytes of the states of the active units.
            inactive: bytes of the states of all others; 0 if they are not kept, or if there are none.
            blocks: bytes of the host blocks of all sampled units.
            ring: bytes of the ring.
        """
        return Footprint(states=active + inactive)

    def offloaded(self, unit: Unit) -> bool:
        """Whether a unit's states are on the host."""
        return unit.name in self._offloaded

    def activate(self, units: Iterable[Unit]) -> None:
        """These units train from now on."""

    def enter(self, unit: Unit) -> None:
        """A unit enters the active set: bring its states back."""

    def leave(self, unit: Unit) -> None:
        """A unit leaves the active set, and its states are kept."""

    def forget(self, unit: Unit) -> None:
        """A unit leaves the active set, and its states begin anew."""
        for parameter in unit.parameters:
            self._states.held.pop(parameter, None)

    def update(self, units: Sequence[Unit], groups: Sequence[dict[str, Any]], skip: Tensor) -> None:
        """AdamW on ``units``, in the order in which backward reached them, unless ``skip`` is 1."""
        for unit in units:
            if not self.offloaded(unit):
                self._states.update(unit, groups, skip)

    def prefetch(self, unit: Unit) -> None:
        """Backward has reached a unit."""

    def wait_for(self, names: Sequence[str]) -> None:
        """Let the current stream wait for updates of these units that are under way."""

    def synchronize(self) -> None:
        """Let the current stream wait for every update under way."""

    def synchronize_host(self) -> None:
        """Wait until the host may read every block."""

    def on_device(self, units: Iterable[Unit]) -> Iterator[Tensor]:
        """What ``units`` keep on the device: state tensors, and a ring that others are streamed through."""
        for unit in units:
            if not self.offloaded(unit):
                for parameter in unit.parameters:
                    yield from self._states.tensors(parameter).values()

    def read(self, unit: Unit, parameter: nn.Parameter, device: torch.device) -> dict[str, Tensor]:
        """A copy on ``device`` of what an offloaded unit holds for a parameter."""
        if not self._states.projected.isdisjoint(unit.parameters):
            return self.host.take(unit.name, parameter, device)
        if not local(parameter).numel():
            return self._states.zeros(parameter, device)
        return self.host.read(unit.name, parameter, device)

    def clear(self) -> None:
        """Forget every state, here and on the host."""
        self._states.held.clear()
        self._offloaded.clear()
        self.host = HostStore(self._device, self._chunk_bytes)

    def load(
        self, unit: Unit, saved: Mapping[nn.Parameter, Mapping[str, Tensor]], *, active: bool, on_host: bool
    ) -> None:
        """Put saved states where those of a sampled unit belong; valid after the store's ``synchronize``.

        Args:
            unit: whose they are.
            saved: by parameter.
            active: whether the unit trains now.
            on_host: whether the unit had host blocks when it was saved.
        """
        to_host = bool(saved) and self._belongs_on_host(active)
        if on_host and self.has_blocks:
            self._allocate(unit)
        self.hold(saved, counters_only=to_host)
        if to_host:
            self._write(unit, {p: tensors_of(state) for p, state in saved.items()})
            self._offloaded.add(unit.name)

    def hold(self, saved: Mapping[nn.Parameter, Mapping[str, Tensor]], *, counters_only: bool = False) -> None:
        """Put saved states on the device."""
        for parameter, state in saved.items():
            place = "cpu" if parameter in self._states.projected else parameter.device
            held = {STEP: state[STEP].to(place, copy=True)}
            if not counters_only:
                held |= {name: t.to(parameter.device, copy=True) for name, t in tensors_of(state).items()}
            self._states.held[parameter] = held

    def _belongs_on_host(self, active: bool) -> bool:
        return False

    def _write(self, unit: Unit, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Copy a unit's state tensors to its host blocks; valid after the store's ``synchronize``."""
        whole = self._states.projected.isdisjoint(unit.parameters)
        if whole:
            self._allocate(unit)
        for parameter, tensors in states.items():
            if tensors:
                (self.host.write if whole else self.host.put)(unit.name, parameter, tensors)
                self._stats.bytes_out += sum(t.nbytes for t in tensors.values())

    def _allocate(self, unit: Unit) -> None:
        """Host blocks for the unit's states, its parameters in the order of backward and by dtype."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in reversed(unit.parameters):
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self.host.allocate(unit.name, [(own, self._states.layout(own[0])) for own in by_dtype.values()])


class Resident(OnDevice):
    """Active units' states on the device, all others on the host, moved at a switch."""

    has_blocks = True

    @staticmethod
    def footprint(*, active: int, inactive: int, blocks: int, ring: int) -> Footprint:
        """Memory needed while a given set of sampled units is active; see :meth:`OnDevice.footprint`."""
        return Footprint(states=active, host=blocks if inactive else 0)

    def leave(self, unit: Unit) -> None:
        """Move the unit's states to the host."""
        states = {p: self._states.tensors(p) for p in unit.parameters}
        if not any(states.values()):
            return
        self._write(unit, states)
        self.host.synchronize(self._device)
        for parameter, tensors in states.items():
            for name in tensors:
                del self._states.held[parameter][name]
        self._offloaded.add(unit.name)

    def enter(self, unit: Unit) -> None:
        """Bring the unit's states back."""
        if not self.offloaded(unit):
            return
        self._offloaded.remove(unit.name)
        for parameter in unit.parameters:
            state = self._states.held.get(parameter, {})
            if state:
                state.update(self.read(unit, parameter, self._device))
            self._stats.bytes_in += sum(t.nbytes for t in tensors_of(state).values())

    def _belongs_on_host(self, active: bool) -> bool:
        return not active


class Streamed(OnDevice):
    """States on the host, streamed through a ring at every step.

    Args:
        states: of all parameters.
        device: of the weights.
        stats: what moving states is counted into.
        mode: when updates must be done.
        chunk_bytes: size of a slot of the ring and of a full host block.
        ring_slots: slots of the ring.
        streams: where the work runs.
    """

    has_blocks = True

    def __init__(
        self,
        states: States,
        device: torch.device,
        stats: OffloadStats,
        *,
        mode: StreamMode,
        chunk_bytes: int,
        ring_slots: int,
        streams: Streams | None,
    ) -> None:
        super().__init__(states, device, stats, chunk_bytes=chunk_bytes)
        self._mode: StreamMode = mode
        self._ring_slots = ring_slots
        self.streams = streams or make_streams(device, merged=mode == "blocking")
        self.streamer = self._make_streamer()

    @staticmethod
    def footprint(*, active: int, inactive: int, blocks: int, ring: int) -> Footprint:
        """Memory needed while a given set of sampled units is active; see :meth:`OnDevice.footprint`."""
        return Footprint(states=0, staging=ring, host=blocks)

    def _make_streamer(self) -> Streamer:
        return Streamer(
            self.host,
            self.streams,
            self._device,
            self._mode,
            chunk_bytes=self._chunk_bytes,
            slots=self._ring_slots,
            stats=self._stats,
        )

    def activate(self, units: Iterable[Unit]) -> None:
        """Make host blocks for units that had none."""
        for unit in units:
            self._allocate(unit)
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
        self.streamer.update(streamed, {p: self._states.held[p][STEP] for p in trained}, groups, skip)

    def prefetch(self, unit: Unit) -> None:
        """Fetch as many of the unit's chunks as there is room for."""
        if self.offloaded(unit):
            self.streamer.prefetch(unit)

    def wait_for(self, names: Sequence[str]) -> None:
        """Let the current stream wait for these units' updates."""
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
        super().clear()
        self.streamer = self._make_streamer()

    def _belongs_on_host(self, active: bool) -> bool:
        return True


def make_placement(
    offload: Offload,
    states: States,
    device: torch.device,
    stats: OffloadStats,
    *,
    chunk_bytes: int,
    ring_slots: int,
    streams: Streams | None,
) -> OnDevice:
    """The placement called ``offload`` (``"auto"`` is resolved before)."""
    if offload == "blocking" or offload == "overlap" or offload == "lazy":
        return Streamed(
            states, device, stats, mode=offload, chunk_bytes=chunk_bytes, ring_slots=ring_slots, streams=streams
        )
    return placement_class(offload)(states, device, stats, chunk_bytes=chunk_bytes)


def placement_class(offload: Offload) -> type[OnDevice]:
    """The class of the placement called ``offload`` (``"auto"`` is resolved before)."""
    if offload in get_args(StreamMode):
        return Streamed
    return Resident if offload == "resident" else OnDevice


def tensors_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a parameter's state that cost memory."""
    return {name: tensor for name, tensor in state.items() if name != STEP}
