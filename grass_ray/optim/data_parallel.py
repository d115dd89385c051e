"""Keep the workers of a data-parallel group in step: gradients, measurements and the active set.

torch's DistributedDataParallel fixes the trainable parameters when it wraps a model: layers thawed later never
synchronise. Here the active gradients are averaged after backward, so frozen layers cost no traffic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

Reduction = Literal["mean", "sum"]
Item = TypeVar("Item")


class Workers:
    """The workers that train copies of one model.

    Args:
        group: a ``torch.distributed`` process group; None takes the default group where torch.distributed is
            initialised, and this process alone elsewhere.
        reduction: what the workers' gradients become: their ``"mean"``, where every worker's loss is the mean over
            its own batch, or their ``"sum"``, where the losses are already divided by what all workers hold.

    Attributes:
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
        self._reduction = reduction
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent_bytes = 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This worker's part of ``items``, whose number is a multiple of the number of workers."""
        each = len(items) // self.count
        return items[self.rank * each : (self.rank + 1) * each]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the workers, in float64; what every worker gets is the same to the last bit."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the workers."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean (or sum) over the workers; a missing one counts as zeros.

        One call a dtype.
        """
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for same in by_dtype.values():
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in same]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._all_reduce(flat)
            if self._reduction == "mean":
                flat.div_(self.count)
            offset = 0
            for parameter, gradient in zip(same, gradients, strict=True):
                parameter.grad = gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()

    def average(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the workers; NaN where one of them has NaN."""
        if self.count == 1:
            return values
        mean = values.clone()
        self._all_reduce(mean)
        return mean.div_(self.count)

    def check_agreement(self, active: tuple[int, ...]) -> None:
        """Make sure that every worker trains the same units; every worker must call it at the same steps.

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
