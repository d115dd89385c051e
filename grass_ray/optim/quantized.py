"""Moments in 8 bits, block by block: small floating-point numbers that share an exponent.

A moment is a float32 number of which the sign, the exponent and three bits after the point are kept, rounded. In a
block of 256 elements the exponent counts from the highest one, which the block keeps: first moments reach 15 powers of
two below it, second moments, which have no sign, 31. Smaller ones become zero as first moments, and the smallest number
there is as second ones, since a step divides by their root. Everything is integer arithmetic on bit patterns, so every
device and a piece of any size gives the same bits, and packing what was unpacked changes nothing.

Second moments are rounded stochastically, as in :mod:`grass_ray.optim.rounding` and for the same reason: rounded to the
nearest, a mean with ``beta2 = 0.999`` stands still. It does in libraries' block-wise 8-bit optimizers, too (Dettmers et
al., 2022, "8-bit Optimizers via Block-wise Quantization", from which blocks with a scale of their own are): with the
maps of bitsandbytes the sum of 3,000 updates was off by a fifth, with these numbers by 0.05 to 0.08
(``benchmarks/moments.py``). And those maps have a zero for second moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from grass_ray.optim.rounding import hash_bits

# elements that share an exponent
BLOCK = 256
EXPONENT = "_exponent"
# highest code of a first and of a second moment; the code of a first moment has its sign above
SPANS = {"exp_avg": 127, "exp_avg_sq": 255}
# bits of a float32 that are rounded away, and the most that three bits after the point can be
DROPPED, HIGHEST = 20, 7


def pack(values: Tensor, span: int, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round to 8 bits.

    Args:
        values: finite float32, flat; not negative if ``span`` is 255.
        span: 127 or 255, see :data:`SPANS`.
        random: int32 of the shape of ``values`` whose lowest 20 bits are random; None rounds to the nearest.

    Returns:
        The codes, uint8 of the shape of ``values``, and the exponents of the blocks, uint8 of shape (blocks,).
    """
    count = values.numel()
    rounding = 1 << (DROPPED - 1) if random is None else random.bitwise_and((1 << DROPPED) - 1)
    short = ((values.view(torch.int32) & 0x7FFFFFFF) + rounding) >> DROPPED
    short = pad(short, (0, -count % BLOCK)).view(-(-count // BLOCK), BLOCK)
    exponents = short.amax(1, keepdim=True) >> 3
    codes = (short - _lowest(exponents, span)).clamp_(0, span).flatten()[:count]
    if span == SPANS["exp_avg"]:
        codes += ((values < 0) & (codes > 0)).to(torch.int32) << 7
    return codes.to(torch.uint8), exponents.flatten().to(torch.uint8)


def unpack(codes: Tensor, exponents: Tensor, span: int) -> Tensor:
    """The float32 numbers of :func:`pack`, flat."""
    count = codes.numel()
    places = pad(codes.to(torch.int32), (0, -count % BLOCK)).view(-(-count // BLOCK), BLOCK)
    lowest = _lowest(exponents.to(torch.int32)[:, None], span)
    values = ((places & span) + lowest).clamp_(min=0).bitwise_left_shift_(DROPPED).view(torch.float32)
    if span == SPANS["exp_avg"]:
        values = torch.where(places & span == 0, 0.0, torch.where(places > span, -values, values))
    return values.flatten()[:count]


def _lowest(exponents: Tensor, span: int) -> Tensor:
    """What code 0 stands for, as the upper 12 bits of a float32."""
    return exponents * 8 + (HIGHEST - span)


def is_packed(state: Mapping[str, Tensor]) -> bool:
    """Whether the moments of a state are in 8 bits."""
    return f"exp_avg{EXPONENT}" in state


def read_moments(state: Mapping[str, Tensor]) -> list[Tensor]:
    """Both moments of a packed state in float32, flat."""
    return [unpack(state[name].view(-1), state[f"{name}{EXPONENT}"], span) for name, span in SPANS.items()]


def write_moments(state: Mapping[str, Tensor], moments: list[Tensor], step: Tensor, first: int) -> None:
    """Put both moments, flat, into a packed state.

    Args:
        state: which is changed.
        moments: float32.
        step: scalar, the number of the update.
        first: place of the first element in its flattened parameter.
    """
    random = hash_bits(moments[1].numel(), step, first, moments[1].device)
    for (name, span), values, bits in zip(SPANS.items(), moments, (None, random), strict=True):
        codes, exponents = pack(values, span, bits)
        state[name].view(-1).copy_(codes)
        state[f"{name}{EXPONENT}"].copy_(exponents)


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with moments in float32 in place of packed ones; any other as it is."""
    if not is_packed(state):
        return dict(state)
    moments = {name: m.view(state[name].shape) for name, m in zip(SPANS, read_moments(state), strict=True)}
    return {name: tensor for name, tensor in state.items() if not name.endswith(EXPONENT)} | moments


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`unpacked` has unpacked: the same bits if its blocks begin where they began."""
    codes = {}
    for name, span in SPANS.items():
        flat, codes[f"{name}{EXPONENT}"] = pack(state[name].reshape(-1), span)
        codes[name] = flat.view(state[name].shape)
    return {**state, **codes}
