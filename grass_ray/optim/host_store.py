"""Host memory for the optimizer states of units that are not on the device; pinned if the device is a CUDA device.

Blocks are allocated when a unit's state first moves to the host (or, for streamed units, when the unit first becomes
active) and reused from then on, so units that are never drawn cost nothing. Machines without CUDA follow the same
protocol with ordinary memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from grass_ray.optim.chunks import CHUNK_BYTES, Chunk, allocate_block, cut, total_bytes
from grass_ray.optim.host_memory import RESERVE_BYTES, available_bytes
from grass_ray.optim.kernels import StateLayout
from grass_ray.optim.pinning import BlocksAhead
from grass_ray.optim.sharded import local

# parameters whose states have the same layout, with that layout
Parts = Sequence[tuple[Sequence[nn.Parameter], StateLayout]]


class HostStore:
    """Host blocks of units, by the unit's name.

    Args:
        device: where the states live while they are not here.
        chunk_bytes: size of a full chunk.
        ahead: blocks that are pinned already.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES, ahead: BlocksAhead | None = None) -> None:
        self._chunk_bytes = chunk_bytes
        self.ahead = ahead
        self._chunks: dict[str, list[Chunk]] = {}
        self._blocks: dict[str, Tensor] = {}
        self._whole: dict[str, dict[nn.Parameter, dict[str, Tensor]]] = {}
        self.pinned = device.type == "cuda"

    @property
    def bytes(self) -> int:
        """Bytes of all blocks, also of those pinned ahead."""
        ahead = 0 if self.ahead is None else self.ahead.bytes
        whole = (t for unit in self._whole.values() for states in unit.values() for t in states.values())
        return sum(total_bytes(chunks) for chunks in self._chunks.values()) + sum(t.nbytes for t in whole) + ahead

    @property
    def units(self) -> list[str]:
        """Names of the units that have chunks or whole tensors here, in the order of their allocation."""
        return [*self._chunks, *self._whole]

    def allocate(self, unit: str, parts: Parts) -> list[Chunk]:
        """The unit's chunks; blocks of zeros when there were none yet.

        Args:
            unit: its name.
            parts: its parameters.

        Raises:
            MemoryError: the host has less memory available than the blocks need.
        """
        if unit not in self._chunks:
            chunks = self._cut(unit, parts)
            blocks = [None if self.ahead is None else self.ahead.take(chunk.nbytes) for chunk in chunks]
            missing = [chunk for chunk, block in zip(chunks, blocks, strict=True) if block is None]
            _check_memory(unit, total_bytes(missing), self.bytes)
            for chunk, block in zip(chunks, blocks, strict=True):
                self._blocks[chunk.name] = self._allocate(chunk.nbytes) if block is None else block
            self._chunks[unit] = chunks
        return self._chunks[unit]

    def prepare(self, units: Mapping[str, Parts]) -> None:
        """Begin to pin the blocks of ``units`` in the background; does nothing where memory is not pinned."""
        if self.pinned:
            sizes = [chunk.nbytes for unit, parts in units.items() for chunk in self._cut(unit, parts)]
            self.ahead = BlocksAhead(sizes, lambda nbytes: allocate_block(nbytes, pinned=True))

    def _cut(self, unit: str, parts: Parts) -> list[Chunk]:
        return [
            chunk
            for index, (parameters, layout) in enumerate(parts)
            for chunk in cut(f"{unit}.{index}", parameters, layout, self._chunk_bytes)
        ]

    def _allocate(self, nbytes: int) -> Tensor:
        if self.pinned:
            try:
                return allocate_block(nbytes, pinned=True)
            except RuntimeError as error:
                self.pinned = False
                warnings.warn(
                    f"host memory cannot be pinned ({error}); transfers of optimizer states will be slower and will "
                    "not overlap with computation",
                    stacklevel=2,
                )
        return allocate_block(nbytes, pinned=False)

    def chunks(self, unit: str) -> list[Chunk]:
        """The chunks of a unit that has blocks."""
        return self._chunks[unit]

    def block(self, chunk: Chunk) -> Tensor:
        """The host block of a chunk."""
        return self._blocks[chunk.name]

    def clear(self, unit: str) -> None:
        """Set the unit's states to zero, if it has blocks."""
        for chunk in self._chunks.get(unit, ()):
            self.block(chunk).zero_()

    def write(self, unit: str, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        """Copy a parameter's state tensors into its unit's blocks; valid after :meth:`synchronize`."""
        for piece, name, view in self._pieces(unit, parameter):
            view.copy_(piece(states[name]), non_blocking=True)

    def read(self, unit: str, parameter: nn.Parameter, device: torch.device) -> dict[str, Tensor]:
        """A copy on ``device`` of a parameter's state tensors, in the shape of the parameter (of its rows here)."""
        found: dict[str, Tensor] = {}
        shapes = next(
            chunk.layout.shapes(local(parameter).shape)
            for chunk in self._chunks[unit]
            if any(segment.parameter is parameter for segment in chunk.segments)
        )
        for piece, name, view in self._pieces(unit, parameter):
            if name not in found:
                found[name] = torch.empty(shapes[name], dtype=view.dtype, device=device)
            piece(found[name]).copy_(view, non_blocking=True)
        return found

    def _pieces(self, unit: str, parameter: nn.Parameter) -> Iterator[tuple[Callable[[Tensor], Tensor], str, Tensor]]:
        """For each piece of each state tensor what takes it from the whole tensor, the name, and its place here."""
        for chunk in self._chunks[unit]:
            views = chunk.views(self.block(chunk))
            for segment, state in zip(chunk.segments, views, strict=True):
                if segment.parameter is parameter:
                    for name, _, share in chunk.layout.tensors:
                        yield partial(segment.of, share=share), name, state[name]

    # states that are not of their parameter's shape (projected moments) travel as whole tensors

    def put(self, unit: str, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        """Copy state tensors of any shape; valid after :meth:`synchronize`."""
        own = self._whole.setdefault(unit, {}).setdefault(parameter, {})
        for name, tensor in states.items():
            if name not in own:
                own[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.pinned)
            own[name].copy_(tensor, non_blocking=True)

    def take(self, unit: str, parameter: nn.Parameter, device: torch.device) -> dict[str, Tensor]:
        """Copies on ``device`` of what :meth:`put` has; nothing when it has nothing."""
        own = self._whole.get(unit, {}).get(parameter, {})
        return {name: torch.empty_like(tensor, device=device).copy_(tensor) for name, tensor in own.items()}

    @staticmethod
    def synchronize(device: torch.device) -> None:
        """Wait until copies of the current stream have arrived, so that memory may be used again and blocks be read."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _check_memory(unit: str, wanted: int, held: int) -> None:
    available = available_bytes()
    if available is not None and wanted + RESERVE_BYTES > available:
        raise MemoryError(
            f"the optimizer states of {unit} need {wanted / 2**20:.0f} MiB of host memory, but only "
            f"{available / 2**20:.0f} MiB are available (states hold {held / 2**20:.0f} MiB already); use fewer "
            "workers a machine, inactive_states='reset', or a method with smaller states"
        )
