"""Cut the state of a unit into chunks: pieces of a power-of-two size that host memory and the staging ring hold.

torch's pinned allocator rounds every block up to a power of two, so one flat block a layer would waste a third of host
memory or more; chunks of exactly such sizes waste next to nothing. Within a parameter chunks are cut at multiples of
1024 elements, since the fused CPU kernel gives other last bits at odd boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grass_ray.optim.kernels import StateLayout
from grass_ray.optim.quantized import BLOCK
from grass_ray.optim.sharded import local

CHUNK_BYTES = 64 * 1024 * 1024
SMALLEST_CHUNK_BYTES = 64 * 1024
BOUNDARY = 1024


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` of a flattened parameter, at ``offset`` elements in their chunk.

    Of a sharded parameter, this worker's elements.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    offset: int

    def of(self, tensor: Tensor, share: int = 1) -> Tensor:
        """This piece, flat, of a tensor with a value for each ``share`` elements of the parameter."""
        return tensor.view(-1)[self.start // share : -(-self.stop // share)]


@dataclass(eq=False)
class Chunk:
    """A piece of a unit's state.

    ``nbytes`` is a power of two; ``capacity`` how many elements' states it holds; ``written`` is the event of its last
    write-back, None before there was one.
    """

    name: str
    layout: StateLayout
    nbytes: int
    capacity: int
    segments: list[Segment] = field(default_factory=list)
    written: Any = None

    @property
    def count(self) -> int:
        """Elements in use."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def views(self, block: Tensor) -> list[dict[str, Tensor]]:
        """For each segment its state tensors, as views of ``block`` (uint8, at least ``nbytes``)."""
        views: list[dict[str, Tensor]] = [{} for _ in self.segments]
        begin = 0
        for name, dtype, share in self.layout.tensors:
            nbytes = self.capacity // share * dtype.itemsize
            array = block[begin : begin + nbytes].view(dtype)
            begin += nbytes
            for view, s in zip(views, self.segments, strict=True):
                view[name] = array[s.offset // share : -(-(s.offset + s.stop - s.start) // share)]
        return views


def cut(
    name: str, parameters: Sequence[nn.Parameter], layout: StateLayout, chunk_bytes: int = CHUNK_BYTES
) -> list[Chunk]:
    """Chunks that hold the state of every element of ``parameters`` exactly once, in order.

    Args:
        name: of the unit, for the chunks' names.
        parameters: contiguous, in the order in which their gradients appear.
        layout: what the state of an element is.
        chunk_bytes: of a full chunk, a power of two; the tail goes into smaller powers of two.

    Raises:
        ValueError: ``chunk_bytes`` is not a power of two or holds no 1024 elements, or a parameter is not contiguous.
    """
    if chunk_bytes & (chunk_bytes - 1) or _capacity(chunk_bytes, layout) < BOUNDARY:
        raise ValueError(
            f"chunk_bytes is {chunk_bytes}; it must be a power of two that holds the state of {BOUNDARY} parameters "
            f"({layout.nbytes(BOUNDARY)} bytes)"
        )
    align = BLOCK if layout.of_blocks else 1  # each segment begins with a block
    sizes = [local(p).numel() for p in parameters]
    if not all(local(p).is_contiguous() for p in parameters):
        raise ValueError(f"a parameter of {name} is not contiguous in memory; its state cannot be streamed in pieces")
    left = sum(-(-size // align) * align for size in sizes)
    chunks: list[Chunk] = []
    room = 0
    for parameter, size in zip(parameters, sizes, strict=True):
        start = 0
        while start < size:
            wanted = size - start
            fitting = wanted if wanted <= room else room // BOUNDARY * BOUNDARY
            if not fitting:
                nbytes = _next_size(left, chunk_bytes, layout)
                chunks.append(Chunk(f"{name}.{len(chunks)}", layout, nbytes, _capacity(nbytes, layout)))
                room = chunks[-1].capacity
                continue
            chunk = chunks[-1]
            chunk.segments.append(Segment(parameter, start, start + fitting, chunk.capacity - room))
            start += fitting
            taken = -(-fitting // align) * align
            left -= taken
            room -= taken
    return chunks


def _capacity(nbytes: int, layout: StateLayout) -> int:
    return nbytes // layout.nbytes(BOUNDARY) * BOUNDARY


def _next_size(left: int, chunk_bytes: int, layout: StateLayout) -> int:
    """A full chunk while it can be filled, then the largest power of two that can, at last one that holds the rest."""
    smallest, bytes_left = SMALLEST_CHUNK_BYTES, layout.nbytes(left)
    while _capacity(smallest, layout) < BOUNDARY:
        smallest *= 2
    smallest = min(smallest, chunk_bytes)
    if bytes_left >= chunk_bytes:
        return chunk_bytes
    if bytes_left <= smallest:
        return smallest
    return max(smallest, 1 << (bytes_left.bit_length() - 1))


def total_bytes(chunks: Sequence[Chunk]) -> int:
    """Bytes of the host blocks of ``chunks``."""
    return sum(chunk.nbytes for chunk in chunks)


def allocate_block(nbytes: int, *, pinned: bool) -> Tensor:
    """A host block of zeros: the state of weights that were never updated."""
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
