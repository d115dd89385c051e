"""LISA (arXiv 2403.17919): layers drawn uniformly."""

from __future__ import annotations

import torch

from grass_ray.layerwise.drawing import draw_without_replacement
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.schedules import Scheduled


class UniformSampler(PeriodicSampler):
    """LISA (arXiv 2403.17919): ``num_active_layers`` distinct layers, all equally likely, every ``period`` steps.

    Args:
        num_active_layers: gamma, number of layers that train at a time.
        period: T_s, optimizer steps between draws.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, num_active_layers: Scheduled = 2, period: Scheduled = 20, *, seed: int = 0) -> None:
        super().__init__(num_active_layers, period, seed=seed)

    def probabilities(self) -> tuple[float, ...]:
        """1 / L for every layer."""
        return (1.0 / self._num_units,) * self._num_units

    def pick(self) -> tuple[int, ...]:
        """A uniform draw without replacement."""
        log_p = torch.zeros(self._num_units, dtype=torch.float64)
        return draw_without_replacement(log_p, self.now_active, self.seed, self._draws)
