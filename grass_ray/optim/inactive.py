"""Small updates of layers that are not active, made while backward passes them: BREAD's landscape correction.

Block coordinate descent moves one block as if the others stood still. BREAD (NeurIPS 2025) lets the others follow by a
plain step of SGD on the gradient that backward brings, which is freed at once, so that no state and no gradient of
theirs is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InactiveSGD:
    """One step of SGD per backward for parameters of inactive units, without clipping or weight decay.

    In bfloat16 a step below the resolution of a weight is lost. A gradient that is not finite changes nothing.

    Args:
        lr_scale: the learning rate, as a multiple of that of the active units.
        sign: step along the signs of the gradient.
        layers: ``"all"`` inactive units, or those ``"above"`` the lowest active one, which backward passes anyway.

    Raises:
        ValueError: a setting is out of range.
    """

    lr_scale: float = 1.0
    sign: bool = False
    layers: Literal["all", "above"] = "all"

    def __post_init__(self) -> None:
        if not self.lr_scale > 0:
            raise ValueError(f"lr_scale is {self.lr_scale}; it must be above 0")
        if self.layers not in ("all", "above"):
            raise ValueError(f"layers is {self.layers!r}; available: all, above")

    def units(self, count: int, active: tuple[int, ...]) -> tuple[int, ...]:
        """Which of ``count`` units are corrected while the units ``active`` train; none if nothing is active."""
        if not active:
            return ()
        first = 0 if self.layers == "all" else min(active) + 1
        return tuple(index for index in range(first, count) if index not in active)

    @torch.no_grad()
    def update(self, parameter: Tensor, lr: float) -> None:
        """Move a parameter along its gradient; ``lr`` is that of the active units."""
        gradient = parameter.grad
        assert gradient is not None
        finite = torch.linalg.vector_norm(gradient, dtype=torch.float32).isfinite()
        step = gradient.sign() if self.sign else gradient
        parameter.add_(step.where(finite, 0.0), alpha=-lr * self.lr_scale)
