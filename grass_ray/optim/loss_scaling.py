"""What a loss scaler tells an optimizer: under float16 autocast gradients are those of the loss times a large number.

``torch.amp.GradScaler.step(optimizer)`` sets ``found_inf`` and ``grad_scale`` on an optimizer that declares
``_step_supports_amp_scaling``, calls its ``step`` in any case, and takes both away again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """What a loss scaler says about the gradients of this step.

    Attributes:
        found_inf: scalar, above 0 if one of them is not finite.
        inverse: scalar that they still have to be multiplied by; None if ``scaler.unscale_(optimizer)`` has done so.
    """

    found_inf: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, device: torch.device) -> LossScale | None:
        """What a scaler has set on ``optimizer``; None outside of a scaler's ``step``."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return None
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        inverse = None if scale is None else scale.double().reciprocal().float().to(device)
        return cls(torch.as_tensor(found_inf, dtype=torch.float32, device=device), inverse)

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Bring the gradients to the scale of the loss itself, unless the scaler has."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.inverse is not None and gradients:
            torch._foreach_mul_(gradients, self.inverse)
