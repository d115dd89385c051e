"""Stochastic rounding, of float32 to bfloat16 here, by a hash that gives the same bits on every device.

The CUDA kernel (:mod:`grass_ray.optim.triton_adamw`) computes the same hash with the same multipliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# odd multipliers of the hash: of an element's place, the step, and two rounds of mixing
PLACE, STEP, MIX_1, MIX_2 = 0x9E3779B1, 0x85EBCA77, 0x7FEB352D, 0x846CA68B


def round_stochastically(values: Tensor, step: Tensor, first: int = 0) -> Tensor:
    """Round to one of the two nearest bfloat16 values, up with the probability that makes the mean right.

    The random bits are a hash of the element's place in its parameter and the step: the same on every device, for
    pieces of any size, and after a resume. A value that bfloat16 can hold stays as it is.

    Args:
        values: float32, not negative, any shape.
        step: scalar, the number of the update.
        first: place of the first element in its flattened parameter.

    Returns:
        bfloat16 tensor of the shape of ``values``.
    """
    bits = hash_bits(values.numel(), step, first, values.device).bitwise_and_(0xFFFF)
    bits += values.contiguous().view(torch.int32).flatten()
    return (bits >> 16).to(torch.int16).view(torch.bfloat16).view(values.shape)


def hash_bits(count: int, step: Tensor, first: int, device: torch.device) -> Tensor:
    """32 random-looking bits for each of ``count`` places from ``first`` on, as int32 (which wraps around)."""
    h = torch.arange(count, dtype=torch.int32, device=device)
    h += _signed(first)
    h *= _signed(PLACE)
    h += step.to(torch.int32) * _signed(STEP)
    for shift, factor in ((16, MIX_1), (15, MIX_2)):
        # int32 shifts drag the sign along
        h ^= (h >> shift) & ((1 << (32 - shift)) - 1)
        h *= _signed(factor)
    h ^= (h >> 16) & 0xFFFF
    return h


def _signed(value: int) -> int:
    """The int32 with the lowest 32 bits of ``value``."""
    return (value + 2**31) % 2**32 - 2**31
