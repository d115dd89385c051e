"""Update rules with one moment in place of AdamW's two: SGD with momentum, and Muon.

They stand where a projection stands (:mod:`grass_ray.optim.projection`): a state is kept whole, on the device or, while
its unit is inactive, on the host. The moment has the weight's dtype. A bfloat16 weight also keeps the low 16 bits of
its float32 master, whatever ``precision`` says, since steps are smaller than what bfloat16 resolves. Moments are not: a
step changes them by a share of ``1 - momentum`` or more, and Muon makes them orthogonal in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from grass_ray.optim.kernels import REMAINDER, join, split
from grass_ray.optim.states import STEP

MOMENT = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` does it, but with decoupled weight decay.

    Args:
        momentum: weight of the old moment.
        nesterov: look ahead along the moment.

    Raises:
        ValueError: a setting is out of range.
    """

    every_parameter: ClassVar[bool] = True

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self.momentum)

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step counter and moment, zero."""
        return _empty_state(parameter)

    def update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], *, key: int) -> None:
        """One step of SGD."""

        def step(weight: Tensor, gradient: Tensor, moment: Tensor) -> None:
            moment.mul_(self.momentum).add_(gradient)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(gradient.add(moment, alpha=self.momentum) if self.nesterov else moment, alpha=-group["lr"])

        _on_master(parameter, state, step)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the layers' matrices, by ``torch.optim.Muon``: the moment is made orthogonal by Newton-Schulz steps.

    What is no matrix of a layer (norms, embeddings, head) is trained by AdamW.

    Args:
        momentum: weight of the old moment.
        nesterov: look ahead along the moment.
        newton_schulz_steps: how many steps make it orthogonal.
        adjust_lr: ``"match_rms_adamw"`` scales the update so that AdamW's learning rate and weight decay fit (arXiv
            2502.16982); ``"original"`` scales it by the root of rows over columns, if that is above 1.

    Raises:
        ValueError: a setting is out of range.
    """

    every_parameter: ClassVar[bool] = False

    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"

    def __post_init__(self) -> None:
        _check(self.momentum)
        if not 1 <= self.newton_schulz_steps < 100:
            raise ValueError(f"newton_schulz_steps is {self.newton_schulz_steps}; it must be from 1 to 99")
        if self.adjust_lr not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust_lr is {self.adjust_lr!r}; available: match_rms_adamw, original")

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step counter and moment, zero."""
        return _empty_state(parameter)

    def update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], *, key: int) -> None:
        """One step of Muon."""

        def step(weight: Tensor, gradient: Tensor, moment: Tensor) -> None:
            leaf = nn.Parameter(weight)
            leaf.grad = gradient
            muon = torch.optim.Muon(
                [leaf],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.newton_schulz_steps,
                adjust_lr_fn=self.adjust_lr,
            )
            muon.state[leaf][MOMENT] = moment
            muon.step()  # type: ignore[no-untyped-call]

        _on_master(parameter, state, step)


def _empty_state(parameter: Tensor) -> dict[str, Tensor]:
    state = {STEP: torch.zeros((), dtype=torch.float32)}
    if parameter.dtype == torch.bfloat16:
        state[REMAINDER] = torch.zeros_like(parameter, dtype=torch.int16)
    return state | {MOMENT: torch.zeros_like(parameter)}


def _on_master(parameter: Tensor, state: dict[str, Tensor], step: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Call ``step(weight, gradient, moment)``, which changes weight and moment; of a bfloat16 weight all in float32."""
    assert parameter.grad is not None
    state[STEP] += 1
    if REMAINDER not in state:
        step(parameter.detach(), parameter.grad, state[MOMENT])
        return
    master, moment = join(parameter.detach(), state[REMAINDER]), state[MOMENT].float()
    step(master, parameter.grad.float(), moment)
    state[MOMENT].copy_(moment)
    upper, remainder = split(master)
    parameter.copy_(upper)
    state[REMAINDER].copy_(remainder)


def _check(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
