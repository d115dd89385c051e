"""Keep the workers of a data-parallel group in step: gradients, measurements and the active set.

torch's DistributedDataParallel fixes the trainable parameters when it wraps a model: layers thawed later never
synchronise. Here the active gradients are averaged after backward, so frozen layers cost no traffic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Workers:
    """The workers that train copies of one model.

    Args:
        group: a ``torch.distributed`` process group; None takes the default group where torch.distributed is
            initialised, and this process alone elsewhere.
    """

    def __init__(self, group: Any | None = None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.count = 1 if group is None else dist.get_world_size(group)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the workers; a missing one counts as zeros. One call a dtype."""
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for same in by_dtype.values():
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in same]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._mean(flat)
            offset = 0
            for parameter, gradient in zip(same, gradients, strict=True):
                parameter.grad = gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()

    def average(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the workers; NaN where one of them has NaN."""
        if self.count == 1:
            return values
        mean = values.clone()
        self._mean(mean)
        return mean

    def check_agreement(self, active: tuple[int, ...]) -> None:
        """Make sure that every worker trains the same units; every worker must call it at the same steps.

        Raises:
            RuntimeError: another worker has another active set (different seeds or samplers).
        """
        if self.count == 1:
            return
        digest = int.from_bytes(hashlib.blake2b(repr(active).encode(), digest_size=7).digest(), "little")
        pair = torch.tensor([digest, -digest], device=self._device())
        dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=self._group)
        if int(pair[0]) != -int(pair[1]):
            raise RuntimeError(
                f"the {self.count} workers disagree about the active layers (here: {list(active)}); give every "
                "worker's sampler the same seed and settings"
            )

    def _mean(self, values: Tensor) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self._group)
        values.div_(self.count)

    def _device(self) -> torch.device:
        cuda = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
