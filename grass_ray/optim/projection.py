"""Adam's moments of a weight matrix in a small space: GaLore (arXiv 2403.03507) and APOLLO (arXiv 2412.05270).

Both follow their authors' public code: the gradient G (m, n) is projected along its shorter side to R, the moments are
kept of R, ``N = exp_avg / (sqrt(exp_avg_sq) + eps)`` without bias correction inside, the bias correction is part of the
step size, and weight decay acts on the updated weight. The projection is made anew every ``refresh_period`` updates of
the matrix itself; moments are carried over as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from grass_ray.layerwise.generators import keyed_generator

# the factor by which the norm of APOLLO's update may grow from one step to the next, and what keeps ratios finite
GROWTH = 1.01
TINY = 1e-8


class Projection(Protocol):
    """How a matrix is updated in place of AdamW, from moments in a small space for example.

    With a class attribute ``every_parameter = True`` it updates all that trains, and not only the layers' matrices.
    """

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a matrix that was never updated."""

    def update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], *, key: int) -> None:
        """One step on ``parameter`` from its ``.grad``; ``key`` is the parameter's own, for private randomness."""


def projected_parameters(
    projection: Projection | None, layers: Iterable[Iterable[nn.Parameter]], managed: Iterable[nn.Parameter]
) -> set[nn.Parameter]:
    """The parameters that a projection updates.

    Args:
        projection: None for AdamW alone.
        layers: parameters of each decoder layer.
        managed: all parameters that ever train.
    """
    if projection is None:
        return set()
    if getattr(projection, "every_parameter", False):
        return set(managed)
    return {p for layer in layers for p in layer if p.ndim == 2}


@dataclass(frozen=True, kw_only=True)
class GaLore:
    """Moments along the top singular directions of the gradient; the update is projected back and scaled.

    Args:
        rank: of the small space (at most the matrix's shorter side).
        refresh_period: updates between singular value decompositions.
        scale: of the projected-back update.

    Raises:
        ValueError: a setting is out of range.
    """

    rank: int = 128
    refresh_period: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        _check(self.rank, self.refresh_period, self.scale)

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step counter, projection and moments, all zero."""
        return _empty_state(parameter, self.rank)

    def update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], *, key: int) -> None:
        """One step of GaLore's AdamW."""
        assert parameter.grad is not None
        gradient = parameter.grad
        projector = state["projector"]
        if int(state["step"]) % self.refresh_period == 0:
            projector.copy_(self.directions(gradient, projector))
        direction, step_size = _adam(_project(gradient, projector), state, group)
        back = direction @ projector if _tall(gradient) else projector @ direction
        parameter.add_(back, alpha=-step_size * self.scale)
        _decay(parameter, group)

    @staticmethod
    def directions(gradient: Tensor, like: Tensor) -> Tensor:
        """The top singular directions of a gradient (m, n), of the projector's shape: (r, n) if m >= n, else (m, r)."""
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        rows, columns = like.shape
        directions: Tensor = right[:rows] if _tall(gradient) else left[:, :columns]
        return directions


@dataclass(frozen=True, kw_only=True)
class Apollo:
    """Raw gradients scaled, by channel or as a whole, as Adam would scale them in a random small space.

    Args:
        rank: of the small space (at most the matrix's shorter side).
        refresh_period: updates between new random projections.
        scale: its square root multiplies the update.
        scaling: one factor per ``"channel"`` or one for the whole ``"tensor"`` (APOLLO-Mini).

    Raises:
        ValueError: a setting is out of range.
    """

    rank: int = 256
    refresh_period: int = 200
    scale: float = 1.0
    scaling: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        _check(self.rank, self.refresh_period, self.scale)
        if self.scaling not in ("channel", "tensor"):
            raise ValueError(f"scaling is {self.scaling!r}; available: channel, tensor")

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step counter, projection, moments and the last update's norm, all zero."""
        return _empty_state(parameter, self.rank) | {"update_norm": torch.zeros((), device=parameter.device)}

    def update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], *, key: int) -> None:
        """One step of APOLLO's AdamW, with its limit on the growth of the update's norm."""
        assert parameter.grad is not None
        gradient = parameter.grad
        projector = state["projector"]
        step = int(state["step"])
        if step % self.refresh_period == 0:
            projector.copy_(self.directions(projector, key, step // self.refresh_period))
        small = _project(gradient, projector)
        direction, step_size = _adam(small, state, group)
        if self.scaling == "tensor":
            factors = direction.norm() / (small.norm() + TINY)
        else:
            along = 1 if _tall(gradient) else 0
            factors = direction.norm(dim=along, keepdim=True) / (small.norm(dim=along, keepdim=True) + TINY)
        update = gradient * factors
        norm = update.norm()
        if step:
            limiter = (norm / (state["update_norm"] + TINY)).clamp(min=GROWTH) / GROWTH
            update, norm = update / limiter, norm / limiter
        state["update_norm"].copy_(norm)
        parameter.add_(update, alpha=-step_size * math.sqrt(self.scale))
        _decay(parameter, group)

    @staticmethod
    def directions(like: Tensor, key: int, refresh: int) -> Tensor:
        """Random directions with variance 1 / rank, of the projector's shape; the same on every device."""
        rank = min(like.shape)
        generator = keyed_generator("projection", key, refresh)
        return torch.randn(like.shape, generator=generator).div_(math.sqrt(rank)).to(like)


def _empty_state(parameter: Tensor, rank: int) -> dict[str, Tensor]:
    rows, columns = parameter.shape
    rank = min(rank, rows, columns)
    small, projector = ((rows, rank), (rank, columns)) if _tall(parameter) else ((rank, columns), (rows, rank))
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "projector": parameter.new_zeros(projector),
        "exp_avg": parameter.new_zeros(small),
        "exp_avg_sq": parameter.new_zeros(small),
    }


def _tall(matrix: Tensor) -> bool:
    """Whether the projection acts from the right (at least as many rows as columns)."""
    return matrix.shape[0] >= matrix.shape[1]


def _project(gradient: Tensor, projector: Tensor) -> Tensor:
    return gradient @ projector.T if _tall(gradient) else projector.T @ gradient


def _adam(small: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, float]:
    """Adam's direction in the small space and the step size with the bias correction; moves moments and counter."""
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step = int(state["step"])
    state["exp_avg"].mul_(beta1).add_(small, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(small, small, value=1 - beta2)
    direction = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
    return direction, group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)


def _decay(parameter: Tensor, group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _check(rank: int, refresh_period: int, scale: float) -> None:
    rules = [
        (rank >= 1, f"rank is {rank}; it must be at least 1"),
        (refresh_period >= 1, f"refresh_period is {refresh_period}; it must be at least 1"),
        (scale > 0, f"scale is {scale}; it must be above 0"),
    ]
    mistakes = [message for holds, message in rules if not holds]
    if mistakes:
        raise ValueError("; ".join(mistakes))
