"""Keep the workers of a data-parallel group in step: gradients, measurements and the active set.

torch's DistributedDataParallel fixes the trainable parameters when it wraps a model: layers thawed later never
synchronise. Here the active gradients are averaged after backward, so frozen layers cost no traffic.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grass_ray.optim.units import Unit

# what backward reaches before the layers, and so what is reduced first; all else outside the layers comes last
BEFORE_LAYERS = ("head", "norm")
Reduction = Literal["mean", "sum"]
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class PendingAllReduce:
    """Gradients in a reduction: ``flat`` is their concatenation, to be divided by ``divisor`` when ``work`` is done."""

    parameters: list[nn.Parameter]
    flat: Tensor
    work: Any
    divisor: int

    def wait(self) -> None:
        """Wait, and give every parameter its reduced gradient.

        In memory of its own, so that no gradient keeps the whole buffer alive.
        """
        self.work.wait()
        if self.divisor > 1:
            self.flat.div_(self.divisor)
        offset = 0
        for parameter in self.parameters:
            reduced = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = torch.empty_like(parameter).copy_(reduced)
            offset += parameter.numel()


class Workers:
    """The workers that train copies of one model.

    Args:
        group: a ``torch.distributed`` process group; None takes the default group where torch.distributed is
            initialised, and this process alone elsewhere.
        reduction: what the workers' gradients become: their ``"mean"``, where every worker's loss is the mean over
            its own batch, or their ``"sum"``, where the losses are already divided by what all workers hold.

    Attributes:
        reduction: what the workers' gradients become.
        count: number of workers.
        rank: this worker's place among them, from 0.
        sent_bytes: bytes that this worker has given to reductions so far.

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(self, group: Any | None = None, reduction: Reduction = "mean") -> None:
        if reduction not in get_args(Reduction):
            raise ValueError(f"gradient_reduction is {reduction!r}; available: {', '.join(get_args(Reduction))}")
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.reduction = reduction
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent_bytes = 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This worker's part of ``items``, whose length is a multiple of the number of workers."""
        each = len(items) // self.count
        return items[self.rank * each : (self.rank + 1) * each]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the workers, in float64; the same bits on every worker."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """The sum of each value over the workers, as int64, which wraps around."""
        if self.count == 1 or not values:
            return list(values)
        summed = torch.tensor(values, dtype=torch.int64, device=self._device())
        dist.all_reduce(summed, group=self._group)
        return [int(value) for value in summed.tolist()]

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the workers."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Item) -> list[Item]:
        """The values of all workers in the order of their ranks; they are sent pickled."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def start(self, parameters: Iterable[nn.Parameter]) -> list[PendingAllReduce]:
        """Start to reduce gradients, one all-reduce per dtype; the parameters have none until it is waited for."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        pending = []
        for same in by_dtype.values():
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in same]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            for parameter in same:
                parameter.grad = None
            work = dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
            self.sent_bytes += flat.nbytes
            pending.append(PendingAllReduce(same, flat, work, self.count if self.reduction == "mean" else 1))
        return pending

    def average(self, values: Tensor, *, summed: bool = False) -> Tensor:
        """The mean of ``values`` over the workers, or their sum; NaN where one of them has NaN."""
        if self.count == 1:
            return values
        total = values.clone()
        self._all_reduce(total)
        return total if summed else total.div_(self.count)

    def check_agreement(self, active: tuple[int, ...]) -> None:
        """Make sure that every worker trains the same units. Collective: call on every rank.

        Raises:
            RuntimeError: another worker has another active set (different seeds or samplers).
        """
        if self.count == 1:
            return
        digest = int.from_bytes(hashlib.blake2b(repr(active).encode(), digest_size=7).digest(), "little")
        pair = torch.tensor([digest, -digest], device=self._device())
        self._all_reduce(pair, dist.ReduceOp.MAX)
        if int(pair[0]) != -int(pair[1]):
            raise RuntimeError(
                f"the {self.count} workers disagree about the active layers (here: {list(active)}); give every "
                "worker's sampler the same seed and settings"
            )

    def _reduce(self, values: Sequence[float], op: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self._device())
        self._all_reduce(reduced, op)
        return [float(value) for value in reduced.tolist()]

    def _all_reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        dist.all_reduce(values, op=op, group=self._group)
        self.sent_bytes += values.nbytes

    def _device(self) -> torch.device:
        cuda = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


class GradientReducer:
    """Reduces the gradients of the active units over the workers, each unit's as soon as backward has completed it.

    All workers reduce in one order, that of backward; a unit that is complete waits for those before it.

    Args:
        workers: who takes part.
        units: what the sampler picks from, from the first layer up.
        constant_units: what trains at every step.
    """

    def __init__(self, workers: Workers, units: Sequence[Unit], constant_units: Sequence[Unit]) -> None:
        self._workers = workers
        early = [unit for unit in constant_units if unit.name in BEFORE_LAYERS]
        late = [unit for unit in constant_units if unit.name not in BEFORE_LAYERS]
        order = [*early, *reversed(units), *late]
        self._place = {unit.name: place for place, unit in enumerate(order)}
        self._waiting: deque[Unit] | None = None
        self._arrived: Counter[str] = Counter()
        self._pending: deque[PendingAllReduce] = deque()

    @property
    def under_way(self) -> frozenset[str]:
        """Names of units whose gradients this step's backward has brought so far."""
        return frozenset(self._arrived)

    def arrived(self, unit: Unit, active: Sequence[Unit]) -> None:
        """One more of the unit's gradients is complete: the last micro-batch's backward has reached it."""
        self._arrived[unit.name] += 1
        waiting = self._open(active)
        while waiting and self._arrived[waiting[0].name] >= len(waiting[0].parameters):
            self._pending += self._workers.start(waiting.popleft().parameters)

    def finish(self, active: Sequence[Unit]) -> None:
        """Reduce what is left, and wait for all."""
        if self._workers.count == 1:
            return
        for unit in self._open(active):
            self._pending += self._workers.start(unit.parameters)
        while self._pending:
            self._pending.popleft().wait()
        self._waiting = None
        self._arrived.clear()

    def _open(self, active: Sequence[Unit]) -> deque[Unit]:
        if self._waiting is None:
            self._waiting = deque(sorted(active, key=lambda unit: self._place[unit.name]))
        return self._waiting
