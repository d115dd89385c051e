"""The CUDA kernel of an AdamW step with a 16-bit remainder, 8-bit moments or both: one pass over memory.

The arithmetic is float32 in registers. Its plain reference is ``_through_float32`` in :mod:`grass_ray.optim.kernels`.
Imported only for CUDA devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grass_ray.optim import quantized, rounding

SIZE = 1024
# a kernel sees globals only as constants
PLACE, STEP = tl.constexpr(rounding.PLACE), tl.constexpr(rounding.STEP)
MIX_1, MIX_2 = tl.constexpr(rounding.MIX_1), tl.constexpr(rounding.MIX_2)
BLOCK, DROPPED, HIGHEST = (tl.constexpr(getattr(quantized, name)) for name in ("BLOCK", "DROPPED", "HIGHEST"))
# half of what is rounded away, and all bits of it
HALF, ALL = tl.constexpr(1 << (quantized.DROPPED - 1)), tl.constexpr((1 << quantized.DROPPED) - 1)


@triton.jit
def _random(places, first, t):
    """The bits of :func:`rounding.hash_bits`."""
    h = (places + first).to(tl.uint32) * PLACE + t.to(tl.uint32) * STEP
    h = (h ^ (h >> 16)) * MIX_1
    h = (h ^ (h >> 15)) * MIX_2
    return h ^ (h >> 16)


@triton.jit
def _of_elements(of_blocks, size: tl.constexpr):
    """A block's number for each of its elements."""
    return tl.reshape(tl.broadcast_to(of_blocks[:, None], (size // BLOCK, BLOCK)), (size,))


@triton.jit
def _unpack(codes, exponents, span: tl.constexpr, size: tl.constexpr):
    """:func:`quantized.unpack`."""
    upper = (codes & span) + _of_elements(exponents, size) * 8 + (HIGHEST - span)
    values = (tl.maximum(upper, 0) << DROPPED).to(tl.float32, bitcast=True)
    if span == 127:
        values = tl.where((codes & span) == 0, 0.0, tl.where(codes > span, -values, values))
    return values


@triton.jit
def _pack(values, random, span: tl.constexpr, size: tl.constexpr):
    """:func:`quantized.pack`: codes and exponents."""
    short = ((values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + random) >> DROPPED
    exponents = tl.max(tl.reshape(short, (size // BLOCK, BLOCK)), axis=1) >> 3
    codes = short - (_of_elements(exponents, size) * 8 + (HIGHEST - span))
    codes = tl.minimum(tl.maximum(codes, 0), span)
    if span == 127:
        codes += ((values < 0) & (codes > 0)).to(tl.int32) << 7
    return codes, exponents


@triton.jit
def _load_packed(codes, exponents, places, blocks, count, span: tl.constexpr, size: tl.constexpr):
    """A moment in float32."""
    found = tl.load(codes + places, mask=places < count, other=0).to(tl.int32)
    highest = tl.load(exponents + blocks, mask=blocks * BLOCK < count, other=0).to(tl.int32)
    return _unpack(found, highest, span, size)


@triton.jit
def _store_packed(codes, exponents, values, random, places, blocks, limit, span: tl.constexpr, size: tl.constexpr):
    """Put a moment where ``places`` and ``blocks`` are below ``limit``."""
    found, highest = _pack(values, random, span, size)
    tl.store(codes + places, found.to(tl.uint8), mask=places < limit)
    tl.store(exponents + blocks, highest.to(tl.uint8), mask=blocks * BLOCK < limit)


@triton.jit
def _load_in_two(weight, remainder, inside):
    """The float32 master."""
    bits = tl.load(weight, mask=inside, other=0).to(tl.int32) << 16
    return (bits + tl.load(remainder, mask=inside, other=0).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _store_in_two(weight, remainder, master, store):
    """The nearest bfloat16, and what is missing to the master."""
    bits = master.to(tl.int32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    tl.store(weight, upper.to(tl.int16), mask=store)
    tl.store(remainder, (bits - (upper << 16)).to(tl.int16), mask=store)


@triton.jit
def _step(master, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """AdamW in float32."""
    correction1 = 1.0 - tl.exp2(t * tl.log2(beta1))
    correction2 = 1.0 - tl.exp2(t * tl.log2(beta2))
    master = master - lr * weight_decay * master
    m = m + (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    denominator = tl.sqrt(v) / tl.sqrt(correction2) + eps
    master = master - (lr / correction1) * (m / denominator)
    return master, m, v


@triton.jit
def _adamw_kernel(
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    remainder,
    exponents,
    exponents_sq,
    step,
    skip,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    count,
    first,
    size: tl.constexpr,
    master_in_two: tl.constexpr,
    stochastic: tl.constexpr,
    packed: tl.constexpr,
):
    """AdamW on ``count`` weights.

    With ``master_in_two``, ``weight`` and ``remainder`` are seen as int16 bit patterns, else ``weight`` is float32.
    With ``stochastic``, ``exp_avg_sq`` is seen so, too. With ``packed``, both moments are codes.
    """
    places = tl.program_id(0) * size + tl.arange(0, size)
    inside = places < count
    blocks = tl.program_id(0) * (size // BLOCK) + tl.arange(0, size // BLOCK)
    g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    if packed:
        m = _load_packed(exp_avg, exponents, places, blocks, count, 127, size)
        v = _load_packed(exp_avg_sq, exponents_sq, places, blocks, count, 255, size)
    else:
        m = tl.load(exp_avg + places, mask=inside, other=0).to(tl.float32)
        v = tl.load(exp_avg_sq + places, mask=inside, other=0)
        v = (v.to(tl.int32) << 16).to(tl.float32, bitcast=True) if stochastic else v.to(tl.float32)
    kept = weight + places
    master = _load_in_two(kept, remainder + places, inside) if master_in_two else tl.load(kept, mask=inside, other=0.0)
    t = tl.load(step)
    master, m, v = _step(master, g, m, v, t, lr, beta1, beta2, eps, weight_decay)
    # gradients that are not finite change nothing: no place is stored to
    limit = tl.where(tl.load(skip) == 0.0, count, 0)
    store = places < limit
    if master_in_two:
        _store_in_two(kept, remainder + places, master, store)
    else:
        tl.store(kept, master, mask=store)
    random = _random(places, first, t)
    if packed:
        # what lies outside must not raise a block's exponent
        _store_packed(exp_avg, exponents, tl.where(inside, m, 0.0), HALF, places, blocks, limit, 127, size)
        random = tl.where(inside, (random & ALL).to(tl.int32), 0)
        _store_packed(exp_avg_sq, exponents_sq, tl.where(inside, v, 0.0), random, places, blocks, limit, 255, size)
    else:
        tl.store(exp_avg + places, m.to(exp_avg.dtype.element_ty), mask=store)
        if stochastic:
            v = ((v.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16).to(tl.int16)
        tl.store(exp_avg_sq + places, v, mask=store)


def adamw_in_one_pass(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Tensor,
    group: Mapping[str, Any],
    skip: Tensor | None,
    first: int,
) -> None:
    """One step on a contiguous piece of a weight, in place (see :func:`grass_ray.optim.kernels.adamw`)."""
    count = weight.numel()
    beta1, beta2 = group["betas"]
    packed = quantized.is_packed(state)
    remainder = state.get("remainder")
    stochastic = state["exp_avg_sq"].dtype == torch.bfloat16
    # what a kernel does not use may be any tensor
    exponents = [state[f"{name}{quantized.EXPONENT}"] if packed else step for name in quantized.SPANS]
    _adamw_kernel[(triton.cdiv(count, SIZE),)](
        weight if remainder is None else weight.view(torch.int16),
        gradient,
        state["exp_avg"],
        state["exp_avg_sq"].view(torch.int16) if stochastic else state["exp_avg_sq"],
        weight if remainder is None else remainder,
        *exponents,
        step,
        torch.zeros_like(step) if skip is None else skip,
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        count,
        first,
        size=SIZE,
        master_in_two=remainder is not None,
        stochastic=stochastic,
        packed=packed,
    )
