"""Track the memory that operations would allocate, on torch's meta device, which allocates nothing.

::

    log = AllocationLog("cuda")
    with log, kernel_stand_ins("cuda", log):
        loss(model).backward()              # everything on the meta device
    print(log.peak().total)

Only fused attention and dropout are modelled by hand, because the dispatcher does not see what these kernels allocate.
``torch.distributed._tools.MemTracker`` does the same for whole models, but it hooks every parameter and therefore fails
as soon as one is frozen. Sizes are bytes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grass_ray.memory import known_shapes

DeviceKind = Literal["cpu", "cuda"]
Kind = Literal["gradients", "activations", "logits", "workspace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# CUDA's caching allocator rounds sizes up to multiples of this
CUDA_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes allocated at one moment, by what they hold; ``workspace`` is temporary memory inside kernels."""

    gradients: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gradients + self.activations + self.logits + self.workspace


@dataclass(frozen=True)
class Segment:
    """A part of a step.

    Attributes:
        place: what it belongs to.
        changes: bytes that were allocated (negative where freed) and what they hold, in order.
    """

    place: Hashable
    changes: tuple[tuple[int, Kind], ...]

    @cached_property
    def net(self) -> dict[Kind, int]:
        """Bytes by kind that are allocated after it and were not before."""
        return _sums(self.changes)

    @cached_property
    def rise(self) -> tuple[int, int]:
        """The most bytes that it ever has above those before it, and the number of changes up to there."""
        now = most = at = 0
        for index, (change, _) in enumerate(self.changes):
            now += change
            if now > most:
                most, at = now, index + 1
        return most, at


def highest(segments: Iterable[Segment]) -> Parts:
    """The parts at the moment with most bytes allocated, while ``segments`` run one after another."""
    now = most = 0
    before: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    parts = Parts()
    for segment in segments:
        rise, at = segment.rise
        if now + rise > most:
            most = now + rise
            within = _sums(segment.changes[:at])
            parts = Parts(**{kind: before[kind] + within[kind] for kind in KINDS})
        for kind in KINDS:
            before[kind] += segment.net[kind]
        now = sum(before.values())
    return parts


def _sums(changes: Iterable[tuple[int, Kind]]) -> dict[Kind, int]:
    sums: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for change, kind in changes:
        sums[kind] += change
    return sums


@dataclass(eq=False)
class _Storage:
    nbytes: int
    kind: Kind


class AllocationLog(TorchDispatchMode):
    """Dispatch mode that records when each storage is allocated and freed.

    Args:
        device: whose allocator to assume; that of CUDA rounds sizes up.
        logits: number of features and of tokens in the vocabulary, which tell logits from other tensors. None counts
            logits as activations.
    """

    def __init__(self, device: DeviceKind, *, logits: tuple[int, int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._granule = CUDA_BLOCK if device == "cuda" else 1
        self._logits = logits
        self._alive: dict[int, _Storage] = {}
        self._known: set[int] = set()
        self._events: list[tuple[_Storage, int]] = []
        self._marks: list[tuple[int, Hashable]] = []
        self._workspace = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and self._sums_tied(*args):
            return args[0].add_(args[1])
        result = known_shapes.call(func, args, kwargs or {})
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of ``tensors``, which existed before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """Count what is allocated in the block as workspace."""
        self._workspace = True
        try:
            yield
        finally:
            self._workspace = False

    def mark_gradient(self, parameter: Tensor) -> None:
        """Count the storage of ``parameter.grad`` as a gradient."""
        assert parameter.grad is not None
        storage = self._alive.get(parameter.grad.untyped_storage()._cdata)
        if storage is not None:
            storage.kind = "gradients"

    def size_of(self, tensor: Tensor) -> int:
        """Bytes of the tensor's storage, rounded as on the device."""
        return math.ceil(tensor.untyped_storage().nbytes() / self._granule) * self._granule

    def mark(self, place: Hashable) -> None:
        """Let what follows, up to the next mark, belong to ``place``."""
        self._marks.append((len(self._events), place))

    def segments(self) -> list[Segment]:
        """What was allocated and freed, in order, cut at the marks. The first segment has the place None."""
        starts = [(0, None), *self._marks]
        ends = [start for start, _ in starts[1:]] + [len(self._events)]
        return [
            Segment(place, tuple((sign * storage.nbytes, storage.kind) for storage, sign in self._events[start:end]))
            for (start, place), end in zip(starts, ends, strict=True)
        ]

    def peak(self) -> Parts:
        """The parts at the moment with most bytes allocated."""
        return highest(self.segments())

    def _sums_tied(self, left: Any, right: Any) -> bool:
        """Whether autograd adds the embeddings' gradient to that of a tied head.

        It does so in place, since nothing else holds the head's, but never while a dispatch mode is active.
        """
        shape = None if self._logits is None else (self._logits[1], self._logits[0])
        return all(isinstance(gradient, Tensor) and gradient.shape == shape for gradient in (left, right))

    def _note(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key in self._known or key in self._alive:
            return
        storage = _Storage(self.size_of(tensor), self._kind_of(tensor))
        self._alive[key] = storage
        self._events.append((storage, 1))
        weakref.finalize(memory, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        storage = self._alive.pop(key, None)
        if storage is not None:
            self._events.append((storage, -1))

    def _kind_of(self, tensor: Tensor) -> Kind:
        if self._workspace:
            return "workspace"
        if self._logits is None or tensor.ndim not in (2, 3) or tensor.shape[-1] != self._logits[1]:
            return "activations"
        # a matrix with as many columns may also be the gradient of a transposed head
        return "logits" if tensor.ndim == 3 or tensor.shape[0] != self._logits[0] else "activations"


def storages_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each counted once. Works on the meta device."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------------ fused kernels


@contextmanager
def kernel_stand_ins(device: DeviceKind, log: AllocationLog) -> Iterator[None]:
    """In the block, let attention and dropout on meta tensors allocate what the kernels of ``device`` allocate.

    Attention is flash attention without a mask, and with a mask a kernel that adds a bias (memory-efficient attention
    on CUDA, flash attention on a CPU). Neither allocates the matrix of scores. With a mask autograd keeps one bias of
    shape (rows, 1, tokens, tokens) per layer. If no fused kernel applies (dropout on a CPU, values of another width),
    attention runs as usual on the meta device.

    The functions are replaced in ``torch.nn.functional``, because a TorchFunctionMode is not active while checkpointing
    recomputes a layer in backward. Tensors on other devices get the original functions.
    """
    attention, dropout = functional.scaled_dot_product_attention, functional.dropout

    def planned_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *args: Any,
        **options: Any,
    ) -> Any:
        alike = query.ndim == 4 and query.shape[-1] == value.shape[-1]
        fused = alike and (device == "cuda" or dropout_p == 0)
        if query.device.type != "meta" or not fused:
            return attention(query, key, value, attn_mask, dropout_p, *args, **options)
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = query.new_empty(attn_mask.shape)
        return _Attention.apply(query, key, value, bias, device, log)  # type: ignore[no-untyped-call]

    def planned_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if input.device.type != "meta" or device == "cpu" or not training or p == 0:
            return dropout(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    functional.scaled_dot_product_attention = planned_attention
    functional.dropout = planned_dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
        functional.dropout = dropout


class _Attention(torch.autograd.Function):
    """Fused attention: saves its inputs, its output, and a float32 log-sum of shape (rows, heads, tokens)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        device: DeviceKind,
        log: AllocationLog,
    ) -> Tensor:
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        log_sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        with log.workspace():
            _scratch(query, key, device, backward=False)
        ctx.save_for_backward(query, key, value, bias, output, log_sums)
        ctx.device, ctx.log = device, log
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, _ = ctx.saved_tensors
        with ctx.log.workspace():
            scratch = _scratch(query, key, ctx.device, backward=True)
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del scratch
        return (*gradients, None, None, None)


def _scratch(query: Tensor, key: Tensor, device: DeviceKind, *, backward: bool) -> Tensor:
    """Workspace of the attention kernel."""
    rows, heads, tokens, width = query.shape
    if device == "cuda":
        # backward accumulates the gradient of the queries in float32, and needs one float32 per query and head
        elements = rows * heads * tokens * (width + 1) if backward else 0
    else:
        block = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
        columns = min(512, key.shape[2])
        per_thread = 2 * block * columns if backward else block * (columns + width + 2)
        elements = torch.get_num_threads() * per_thread
    return query.new_empty(elements, dtype=torch.float32)
