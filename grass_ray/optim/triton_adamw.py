"""The CUDA kernel of an AdamW step with a 16-bit remainder: one pass over memory, float32 arithmetic in registers.

Its plain reference is ``_with_remainder`` in :mod:`grass_ray.optim.kernels`. Imported only for CUDA devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grass_ray.optim import rounding

BLOCK = 1024
# a kernel sees globals only as constants
PLACE, STEP = tl.constexpr(rounding.PLACE), tl.constexpr(rounding.STEP)
MIX_1, MIX_2 = tl.constexpr(rounding.MIX_1), tl.constexpr(rounding.MIX_2)


@triton.jit
def _adamw_kernel(
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    remainder,
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
    stochastic: tl.constexpr,
):
    """AdamW on ``count`` bfloat16 weights; ``weight`` and ``remainder`` are seen as int16 bit patterns.

    With ``stochastic``, ``exp_avg_sq`` is as well, and is rounded as in :func:`rounding.round_stochastically`.
    """
    places = tl.program_id(0) * size + tl.arange(0, size)
    inside = places < count
    upper = tl.load(weight + places, mask=inside, other=0).to(tl.int32)
    low = tl.load(remainder + places, mask=inside, other=0).to(tl.int32)
    g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + places, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + places, mask=inside, other=0)
    v = (v.to(tl.int32) << 16).to(tl.float32, bitcast=True) if stochastic else v.to(tl.float32)
    master = ((upper << 16) + low).to(tl.float32, bitcast=True)
    t = tl.load(step)
    correction1 = 1.0 - tl.exp2(t * tl.log2(beta1))
    correction2 = 1.0 - tl.exp2(t * tl.log2(beta2))
    master = master - lr * weight_decay * master
    m = m + (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    denominator = tl.sqrt(v) / tl.sqrt(correction2) + eps
    master = master - (lr / correction1) * (m / denominator)
    bits = master.to(tl.int32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    # gradients that are not finite change nothing: no place is stored to
    store = places < tl.where(tl.load(skip) == 0.0, count, 0)
    tl.store(weight + places, upper.to(tl.int16), mask=store)
    tl.store(remainder + places, (bits - (upper << 16)).to(tl.int16), mask=store)
    tl.store(exp_avg + places, m.to(exp_avg.dtype.element_ty), mask=store)
    if stochastic:
        h = (places + first).to(tl.uint32) * PLACE + t.to(tl.uint32) * STEP
        h = (h ^ (h >> 16)) * MIX_1
        h = (h ^ (h >> 15)) * MIX_2
        h = h ^ (h >> 16)
        rounded = (v.to(tl.uint32, bitcast=True) + (h & 0xFFFF)) >> 16
        tl.store(exp_avg_sq + places, rounded.to(tl.int16), mask=store)
    else:
        tl.store(exp_avg_sq + places, v, mask=store)


def adamw_with_remainder(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: Tensor,
    group: Mapping[str, Any],
    skip: Tensor | None,
    first: int,
) -> None:
    """One step on a contiguous piece of a bfloat16 weight, in place (see :func:`grass_ray.optim.kernels.adamw`)."""
    count = weight.numel()
    beta1, beta2 = group["betas"]
    stochastic = state["exp_avg_sq"].dtype == torch.bfloat16
    _adamw_kernel[(triton.cdiv(count, BLOCK),)](
        weight.view(torch.int16),
        gradient,
        state["exp_avg"],
        state["exp_avg_sq"].view(torch.int16) if stochastic else state["exp_avg_sq"],
        state["remainder"],
        step,
        torch.zeros_like(step) if skip is None else skip,
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        count,
        first,
        size=BLOCK,
        stochastic=stochastic,
    )
