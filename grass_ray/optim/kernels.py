"""One AdamW step on flat pieces of weights: the arithmetic that every offload mode shares.

Precision says what a parameter's state is:

- ``"weights"``: two moments in the weight's own dtype, torch's fused AdamW as it is;
- ``"rem16"``: bfloat16 moments, and the low 16 bits of the weight's float32 master copy (``remainder``). The second
  moment is rounded stochastically (:mod:`grass_ray.optim.rounding`): rounded to the nearest, a mean with
  ``beta2 = 0.999`` could neither decay (a step changes it by less than half a unit in the last place) nor keep up;
- ``"exact"``: float32 moments and the remainder: bit for bit AdamW on a float32 master copy, at 10 bytes per parameter.

The bfloat16 weight on the device is the master's upper half, rounded to the nearest (exact ties away from zero, where
torch's own cast takes the even one: +32768 has no place in 16 bits); ``(upper << 16) + remainder`` gives the master
back without loss, so small updates are not lost and no master copy is held. Other weights than bfloat16 have no
remainder: for them all three are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grass_ray.optim.rounding import round_stochastically

Precision = Literal["weights", "rem16", "exact"]
REMAINDER = "remainder"


@dataclass(frozen=True)
class StateLayout:
    """Names and dtypes of a parameter's state tensors, widest first."""

    dtypes: tuple[tuple[str, torch.dtype], ...]

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes of state for one parameter."""
        return sum(dtype.itemsize for _, dtype in self.dtypes)


def state_layout(weight_dtype: torch.dtype, precision: Precision) -> StateLayout:
    """What the state of a weight of ``weight_dtype`` consists of."""
    if weight_dtype != torch.bfloat16 or precision == "weights":
        return StateLayout((("exp_avg", weight_dtype), ("exp_avg_sq", weight_dtype)))
    moment = torch.float32 if precision == "exact" else torch.bfloat16
    return StateLayout((("exp_avg", moment), ("exp_avg_sq", moment), (REMAINDER, torch.int16)))


def adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    steps: Sequence[Tensor],
    group: Mapping[str, Any],
    skip: Tensor | None = None,
    firsts: Sequence[int] | None = None,
) -> None:
    """Update pieces of weights and their states in place.

    Args:
        weights: pieces, any shapes.
        gradients: of the same shapes and dtype as the weights.
        states: of :func:`state_layout`, each tensor of its weight's shape.
        steps: how many updates each piece has had, this one included; float32 scalars on the device.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        skip: float32 scalar on the device; 1 leaves everything as it is (the gradients are not finite).
        firsts: where each piece begins in its flattened parameter, in elements; None means at its beginning. It keys
            the stochastic rounding, so that pieces of any size give the same bits.
    """
    if not weights:
        return
    if REMAINDER not in states[0]:
        _fused(
            list(weights),
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            list(steps),
            group,
            skip,
        )
        return
    firsts = firsts or [0] * len(weights)
    for weight, gradient, state, step, first in zip(weights, gradients, states, steps, firsts, strict=True):
        if weight.device.type == "cuda":
            from grass_ray.optim.triton_adamw import adamw_with_remainder

            adamw_with_remainder(weight, gradient, state, step, group, skip, first)
        else:
            _with_remainder(weight, gradient, state, step, group, skip, first)


def _with_remainder(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Tensor,
    group: Mapping[str, Any],
    skip: Tensor | None,
    first: int,
) -> None:
    """The plain reference of a step with a remainder, through a float32 master made for the moment."""
    master = join(weight, state[REMAINDER])
    moments = [state["exp_avg"].float(), state["exp_avg_sq"].float()]
    _fused([master], [gradient.float()], [moments[0]], [moments[1]], [step], group, skip)
    if state["exp_avg"].dtype != torch.float32:
        state["exp_avg"].copy_(moments[0])
        state["exp_avg_sq"].copy_(round_stochastically(moments[1], step, first))
    upper, remainder = split(master)
    weight.copy_(upper)
    state[REMAINDER].copy_(remainder)


def join(upper: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 remainder."""
    bits = (upper.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 of a float32 tensor and the int16 remainder that :func:`join` adds again."""
    bits = master.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    remainder = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def _fused(
    weights: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
    skip: Tensor | None,
) -> None:
    """Torch's fused AdamW, below its own counting of steps."""
    torch._fused_adamw_(
        weights,
        gradients,
        first,
        second,
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=skip,
    )
