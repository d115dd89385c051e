"""One AdamW step on flat pieces of weights: the arithmetic that every offload mode shares.

Precision says what a parameter's state is:

- ``"weights"``: two moments in the weight's own dtype, torch's fused AdamW as it is;
- ``"rem16"``: bfloat16 moments, and the low 16 bits of the weight's float32 master copy (``remainder``). The second
  moment is rounded stochastically (:mod:`grass_ray.optim.rounding`): rounded to the nearest, a mean with
  ``beta2 = 0.999`` could neither decay (a step changes it by less than half a unit in the last place) nor keep up;
- ``"exact"``: float32 moments and the remainder: bit for bit AdamW on a float32 master copy, at 10 bytes per parameter;
- ``"int8"``: the remainder, and moments in 8 bits (:mod:`grass_ray.optim.quantized`), at 4 bytes per parameter. Those
  of vectors (norms, biases) are float32: they are few, and a worker's part of a sharded one would be no whole blocks.

The bfloat16 weight on the device is the master's upper half, rounded to the nearest (exact ties away from zero, where
torch's own cast takes the even one: +32768 has no place in 16 bits); ``(upper << 16) + remainder`` gives the master
back without loss, so small updates are not lost and no master copy is held. Other weights than bfloat16 have no
remainder: for them the first three are the same, and the moments of float32 matrices can be in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grass_ray.optim.quantized import BLOCK, EXPONENT, SPANS, is_packed, read_moments, write_moments
from grass_ray.optim.rounding import round_stochastically

Precision = Literal["weights", "rem16", "exact", "int8"]
REMAINDER = "remainder"
# elements that go through float32 at once; a multiple of BLOCK, and of what a fused kernel takes as a whole
PIECE = 1024 * 1024


@dataclass(frozen=True)
class StateLayout:
    """Names and dtypes of a parameter's state tensors, widest first.

    Those of ``dtypes`` have a value for each element, those of ``of_blocks`` one for each BLOCK elements on end.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...]
    of_blocks: tuple[tuple[str, torch.dtype], ...] = ()

    @property
    def tensors(self) -> Iterator[tuple[str, torch.dtype, int]]:
        """Name, dtype, and for how many elements there is one value."""
        yield from ((name, dtype, 1) for name, dtype in self.dtypes)
        yield from ((name, dtype, BLOCK) for name, dtype in self.of_blocks)

    @property
    def fused(self) -> bool:
        """Whether torch's fused AdamW updates weight and state as they are."""
        return len(self.dtypes) == 2 and not self.of_blocks

    def nbytes(self, count: int) -> int:
        """Bytes of the state of ``count`` elements on end."""
        return sum(-(-count // share) * dtype.itemsize for _, dtype, share in self.tensors)

    def shapes(self, shape: torch.Size) -> dict[str, torch.Size]:
        """Shape of each state tensor of a parameter of ``shape``."""
        blocks = torch.Size([-(-shape.numel() // BLOCK)])
        return {name: shape if share == 1 else blocks for name, _, share in self.tensors}


def state_layout(weight_dtype: torch.dtype, precision: Precision, ndim: int = 2) -> StateLayout:
    """What the state of a weight of ``weight_dtype`` with ``ndim`` dimensions consists of."""
    remainder = ((REMAINDER, torch.int16),) if weight_dtype == torch.bfloat16 and precision != "weights" else ()
    if precision == "int8" and ndim > 1 and weight_dtype in (torch.bfloat16, torch.float32):
        codes = tuple((name, torch.uint8) for name in SPANS)
        exponents = tuple((f"{name}{EXPONENT}", torch.uint8) for name in SPANS)
        return StateLayout((*remainder, *codes), exponents)
    moment = weight_dtype
    if remainder:
        moment = torch.bfloat16 if precision == "rem16" else torch.float32
    return StateLayout((("exp_avg", moment), ("exp_avg_sq", moment), *remainder))


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
    firsts = firsts or [0] * len(weights)
    plain = [place for place, state in enumerate(states) if REMAINDER not in state and not is_packed(state)]
    if plain:
        _fused(
            [weights[place] for place in plain],
            [gradients[place] for place in plain],
            [states[place]["exp_avg"] for place in plain],
            [states[place]["exp_avg_sq"] for place in plain],
            [steps[place] for place in plain],
            group,
            skip,
        )
    for place in sorted(set(range(len(weights))) - set(plain)):
        weight, gradient, state = weights[place], gradients[place], states[place]
        if weight.device.type == "cuda":
            from grass_ray.optim.triton_adamw import adamw_in_one_pass

            adamw_in_one_pass(weight, gradient, state, steps[place], group, skip, firsts[place])
        else:
            _through_float32(weight, gradient, state, steps[place], group, skip, firsts[place])


def _through_float32(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Tensor,
    group: Mapping[str, Any],
    skip: Tensor | None,
    first: int,
) -> None:
    """The plain reference of a step with a remainder or 8-bit moments; a piece at a time is float32 for the moment."""
    if not (weight.is_contiguous() and gradient.is_contiguous() and all(t.is_contiguous() for t in state.values())):
        whole, states = weight.contiguous(), {name: tensor.contiguous() for name, tensor in state.items()}
        _through_float32(whole, gradient.contiguous(), states, step, group, skip, first)
        for target, source in zip((weight, *state.values()), (whole, *states.values()), strict=True):
            target.copy_(source)
        return
    for start in range(0, weight.numel(), PIECE):
        part = slice(start, start + PIECE)
        own = {name: tensor.view(-1)[part] for name, tensor in state.items() if not name.endswith(EXPONENT)}
        blocks = slice(start // BLOCK, (start + PIECE) // BLOCK)
        own |= {name: tensor[blocks] for name, tensor in state.items() if name.endswith(EXPONENT)}
        _piece(weight.view(-1)[part], gradient.view(-1)[part], own, step, group, skip, first + start)


def _piece(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Tensor,
    group: Mapping[str, Any],
    skip: Tensor | None,
    first: int,
) -> None:
    master = join(weight, state[REMAINDER]) if REMAINDER in state else weight
    moments = read_moments(state) if is_packed(state) else [state["exp_avg"].float(), state["exp_avg_sq"].float()]
    _fused([master], [gradient.float()], [moments[0]], [moments[1]], [step], group, skip)
    if is_packed(state):
        write_moments(state, moments, step, first)
    elif state["exp_avg"].dtype != torch.float32:
        state["exp_avg"].copy_(moments[0])
        state["exp_avg_sq"].copy_(round_stochastically(moments[1], step, first))
    if REMAINDER in state:
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
