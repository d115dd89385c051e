"""Where the optimizer states of sampled units live: one class per place, and bitwise the same weights from each.

:class:`OnDevice` keeps all that were ever active on the device. :class:`Resident` moves those of a unit that leaves the
active set to the host. :class:`~grass_ray.optim.streamed.Streamed` holds all of them on the host and updates them
through a small ring. What trains at every step is always on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grass_ray.config import PLACEMENTS
from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.hooks import WeakHook
from grass_ray.optim.host_store import HostStore, Parts
from grass_ray.optim.kernels import StateLayout
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.sharded import local
from grass_ray.optim.states import STEP, States, tensors_of
from grass_ray.optim.streaming import OffloadStats
from grass_ray.optim.units import Unit

# "auto" keeps the active states resident while they take less than this fraction of the free device memory
RESIDENT_FRACTION = 0.25


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
    """All states on the device (``offload="none"``), and the base class of all placements.

    Args:
        states: of all parameters.
        device: of the weights.
        stats: counts what moving states costs.
        options: of the optimizer.

    Attributes:
        has_blocks: states of units live in host blocks, at times or always.
        streams_states: the states of active units are on the host, too.
        updates_behind: how many updates may still read their gradients while backward goes on to the next unit.
        host: the host blocks.
    """

    has_blocks: ClassVar[bool] = False
    streams_states: ClassVar[bool] = False
    updates_behind: ClassVar[int] = 0

    def __init__(self, states: States, device: torch.device, stats: OffloadStats, options: LayerwiseOptions) -> None:
        self._states = states
        self._device = device
        self._stats = stats
        self._options = options
        self.host = HostStore(device, options.chunk_bytes)
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

    @staticmethod
    def suits(*, keeps: bool, small: bool) -> bool:
        """Whether a method can use this placement, and needs other memory with it than with all states on the device.

        Args:
            keeps: units leave the active set, and their states are kept.
            small: the states are small: projected, or those of an adapter.
        """
        return True

    def hooks(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        units: Sequence[Unit],
        before_forward: Callable[[WeakHook], list[Any]],
    ) -> list[Any]:
        """Make forward passes of ``model`` wait for updates that are under way.

        Args:
            model: whose units are updated.
            layers: its decoder layers.
            units: the sampled ones.
            before_forward: calls a hook before any weight of a sharded model is gathered, and gives its handles.

        Returns:
            Handles that remove the hooks.
        """
        return []

    def offloaded(self, unit: Unit) -> bool:
        """Whether a unit's states are on the host."""
        return unit.name in self._offloaded

    def prepare(self, units: Iterable[Unit]) -> None:
        """These units may train: begin to pin the host memory of their states in the background."""
        keeps = self.streams_states or self._options.inactive_states == "keep"
        if self.has_blocks and keeps and self._states.projection is None:
            self.host.prepare({unit.name: parts_of(unit, self._states) for unit in units})

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
        """AdamW on ``units``.

        Args:
            units: in the order in which the next forward needs them.
            groups: the optimizer's parameter groups.
            skip: float32 scalar on the device; 1 leaves everything as it is.
        """
        self._states.count(units, skip, offloaded=self.offloaded)
        for unit in units:
            if not self.offloaded(unit):
                self._states.update(unit, groups, skip)

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
        self.host = HostStore(self._device, self._options.chunk_bytes, self.host.ahead)

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
        to_host = bool(saved) and (self.streams_states or (self.has_blocks and not active))
        had_blocks = on_host and self.has_blocks
        whole = not self._states.projected.isdisjoint(unit.parameters)
        if had_blocks and not whole:
            self.host.allocate(unit.name, parts_of(unit, self._states))
        self.hold(saved, counters_only=to_host)
        if to_host or (had_blocks and whole):
            self._write(unit, {p: tensors_of(state) for p, state in saved.items()})
        if to_host:
            self._offloaded.add(unit.name)

    def hold(self, saved: Mapping[nn.Parameter, Mapping[str, Tensor]], *, counters_only: bool = False) -> None:
        """Put saved states on the device."""
        for parameter, state in saved.items():
            # a streamed weight is on the host while it does not train, its states are not
            device = parameter.device if self._options.weights == "resident" else self._device
            held = {STEP: state[STEP].to("cpu" if parameter in self._states.projected else device, copy=True)}
            if not counters_only:
                held |= {name: t.to(device, copy=True) for name, t in tensors_of(state).items()}
            self._states.held[parameter] = held

    def _write(self, unit: Unit, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Copy a unit's state tensors to its host blocks; valid after the store's ``synchronize``."""
        whole = self._states.projected.isdisjoint(unit.parameters)
        if whole:
            self.host.allocate(unit.name, parts_of(unit, self._states))
        for parameter, tensors in states.items():
            if tensors:
                (self.host.write if whole else self.host.put)(unit.name, parameter, tensors)
                self._stats.bytes_out += sum(t.nbytes for t in tensors.values())


def parts_of(unit: Unit, states: States) -> Parts:
    """The unit's parameters in the order of backward, by dtype and by what their states are."""
    alike: dict[tuple[torch.dtype, StateLayout], list[nn.Parameter]] = {}
    for parameter in reversed(unit.parameters):
        alike.setdefault((parameter.dtype, states.layout(parameter)), []).append(parameter)
    return [(own, layout) for (_, layout), own in alike.items()]


class Resident(OnDevice):
    """Active units' states on the device, all others on the host, moved at a switch."""

    has_blocks: ClassVar[bool] = True

    @staticmethod
    def footprint(*, active: int, inactive: int, blocks: int, ring: int) -> Footprint:
        """Memory needed while a given set of sampled units is active; see :meth:`OnDevice.footprint`."""
        return Footprint(states=active, host=blocks if inactive else 0)

    @staticmethod
    def suits(*, keeps: bool, small: bool) -> bool:
        """If states of inactive units are kept; see :meth:`OnDevice.suits`."""
        return keeps

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


def placement_class(offload: str) -> type[OnDevice]:
    """The placement of an offload mode other than ``"auto"``."""
    module, _, name = PLACEMENTS[offload].rpartition(".")
    found: type[OnDevice] = getattr(import_module(module), name)
    return found


def check_offload(offload: str, options: LayerwiseOptions) -> None:
    """Raise ValueError for an unknown mode, or one that cannot serve projected states."""
    if offload not in (*PLACEMENTS, "auto"):
        raise ValueError(f"offload is {offload!r}; available: {', '.join((*PLACEMENTS, 'auto'))}")
    if offload != "auto" and options.projection is not None and placement_class(offload).streams_states:
        raise ValueError(
            f"offload is {offload!r}, but states of {type(options.projection).__name__} are not streamed; use resident"
        )


def resolve_offload(offload: str, sampler: Sampler, units: Sequence[Unit], states: States, device: torch.device) -> str:
    """The mode in force: ``"auto"`` becomes ``"resident"`` if the active states are small, else ``"lazy"``."""
    if offload != "auto":
        return offload
    if device.type != "cuda" or states.projection is not None:
        return "resident"
    state_bytes = [states.unit_bytes(unit) for unit in units]
    free, _ = torch.cuda.mem_get_info(device)
    return "resident" if largest_active_bytes(sampler, state_bytes) <= RESIDENT_FRACTION * free else "lazy"


def largest_active_bytes(sampler: Sampler, state_bytes: Sequence[int]) -> int:
    """Bytes of the states of the largest active set that the sampler may draw.

    Args:
        sampler: picks among the units.
        state_bytes: of each unit.
    """
    sets = sampler.largest_active_sets(state_bytes)
    return max(sum(state_bytes[unit] for unit in active) for active in sets)
