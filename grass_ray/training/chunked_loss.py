"""The cross-entropy of a model's head, a chunk of positions at a time.

The gradients of a chunk are computed as soon as its logits are there, so these are never computed twice, and never more
of them exist than those of one chunk::

    loss = chunked_cross_entropy(hidden, labels, head, divisor=len(labels))
    loss.backward()
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from grass_ray.tasks.inference.lm_head import Head

# rows of a weight whose gradient in low precision is held before it is added
ADDED_ROWS = 8192


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: Head, *, divisor: float = 1.0) -> Tensor:
    """Compute the cross-entropy of the logits of ``hidden``, summed and divided by ``divisor``.

    Args:
        hidden: hidden states, shape (positions, features).
        labels: int64, shape (positions,).
        head: what makes logits of hidden states.
        divisor: of the loss, and of the logits' gradients before any rounding.

    Returns:
        A scalar in nats, float32. Its backward can run once.
    """
    loss: Tensor = _ChunkedLoss.apply(head, labels, divisor, hidden, *head.parameters)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Computes loss and gradients in forward; backward only hands the gradients over."""

    @staticmethod
    def forward(ctx: Any, head: Head, labels: Tensor, divisor: float, hidden: Tensor, *parameters: Tensor) -> Tensor:
        wanted = hidden.requires_grad or bool(parameters)  # neither without gradients
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        sums = [_GradientSum(p, single=len(labels) <= head.chunk) for p in parameters]
        with head.stand_ins() as leaves:
            products = _SummedProducts(dict(zip(leaves, sums, strict=True))) if leaves else nullcontext()
            for start in range(0, max(len(labels), 1), head.chunk):
                here = slice(start, start + head.chunk)
                part = hidden[here].detach().requires_grad_(hidden.requires_grad)
                saved = _SavedStorages()
                with torch.set_grad_enabled(wanted), products, saved:
                    logits = head(part)
                # in the memory of the logits where backward does not need them (that of tanh would); a change of
                # their data is none that autograd must know of
                log_p = logits.detach().to(torch.float32, copy=True) if logits in saved else logits.data.float()
                torch.log_softmax(log_p, -1, out=log_p)
                own = labels[here].unsqueeze(1)
                loss -= log_p.gather(1, own).sum() / divisor
                if not wanted:
                    continue
                # of cross-entropy: the probabilities, less one at the labels
                gradient = log_p.exp_()
                del log_p
                gradient.scatter_add_(1, own, gradient.new_full((), -1.0).expand_as(own))
                gradient = gradient.div_(divisor).to(logits.dtype)
                inputs = [*leaves, part] if part.requires_grad else leaves
                found = torch.autograd.grad(logits, inputs, gradient, allow_unused=True)
                for total, of_leaf in zip(sums, found, strict=False):
                    total.add(of_leaf)
                if of_hidden is not None:
                    of_hidden[here] = found[-1]
                del logits, gradient, found
        ctx.gradients = [of_hidden, *(total.result() for total in sums)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a chunked loss are there for one backward, and it has run")
        gradients, ctx.gradients = ctx.gradients, None
        if seed.device.type != "cpu" or seed != 1:  # asking a GPU would take longer than the product
            for gradient in gradients:
                if gradient is not None:
                    gradient *= seed
        return (None, None, None, *gradients)


class _SavedStorages(saved_tensors_hooks):
    """Knows which memory the operations of the block have saved for backward."""

    def __init__(self) -> None:
        self._storages: set[int] = set()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._storages.add(tensor.untyped_storage()._cdata)  # not its address: tensors without data have none
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages


class _GradientSum:
    """The gradient of a parameter, summed over chunks, in float32 if there are several.

    Args:
        parameter: whose gradient.
        single: whether there is only one chunk.
    """

    def __init__(self, parameter: Tensor, *, single: bool) -> None:
        self._dtype = parameter.dtype
        # the first product of a weight in float32 becomes the sum, which saves a pass over all of it
        self._whole = single or parameter.dtype == torch.float32
        self._sum = None if self._whole else torch.zeros_like(parameter, dtype=torch.float32)

    def add(self, gradient: Tensor | None) -> None:
        """Add the gradient of a chunk; None if it was added by :meth:`add_product`."""
        if gradient is not None:
            self._sum = gradient if self._sum is None else self._sum.add_(gradient)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add the matrix product of ``left`` and ``right``, without a second tensor of this size."""
        if self._sum is None:
            self._sum = left @ right
        elif self._sum.dtype == left.dtype:
            self._sum.addmm_(left, right)
        else:
            for first in range(0, len(left), ADDED_ROWS):
                rows = slice(first, first + ADDED_ROWS)
                self._sum[rows] += left[rows] @ right

    def result(self) -> Tensor | None:
        """The sum in the parameter's dtype."""
        return None if self._sum is None else self._sum.to(self._dtype)


class _SummedProducts(TorchFunctionMode):
    """In the block, backward of ``linear`` adds a weight's gradient to its sum where it has one."""

    def __init__(self, sums: dict[Tensor, _GradientSum]) -> None:
        super().__init__()
        self._sums = sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and args[1] in self._sums:
            return _SummedLinear.apply(self._sums[args[1]], *args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _SummedLinear(torch.autograd.Function):
    """``linear`` whose backward adds the gradient of the weight to a sum and returns those of input and bias."""

    @staticmethod
    def forward(ctx: Any, total: _GradientSum, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(input, weight)
        return functional.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        ctx.total.add_product(rows.T, input.flatten(0, -2))
        of_input = gradient @ weight if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if len(ctx.needs_input_grad) > 3 and ctx.needs_input_grad[3] else None
        return (None, of_input, None, of_bias)[: len(ctx.needs_input_grad)]
