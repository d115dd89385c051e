"""AdaGradSelect (arXiv 2512.15764): layers drawn by how often they were drawn, at first those of large gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from grass_ray.layerwise.drawing import draw_without_replacement
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.layerwise.grad_norm import GradNormSampler
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import require
from grass_ray.layerwise.schedules import Scheduled


class FrequencySampler(GradNormSampler):
    """AdaGradSelect (arXiv 2512.15764): epsilon-greedy between the largest gradients and the most frequent layers.

    Draw number ``d`` takes the layers of the largest gradient norm with probability ``epsilon * decay**d``. Otherwise
    weights are drawn from a Dirichlet distribution with a layer's number of draws so far, plus ``prior``, as its
    parameter, and layers by these weights without replacement. What was drawn often is so drawn more often.

    There is no public code, and these defaults are this project's. The gradient norms are measured as those of
    :class:`~grass_ray.layerwise.grad_norm.GradNormSampler` are: of all layers in the probing steps, later of the layers
    that train.

    Args:
        num_active_layers: layers that train at a time.
        period: optimizer steps between draws.
        probing_steps: steps before training that only measure.
        refresh_period: optimizer steps between refreshes of the gradient norms; None never refreshes them.
        ema: weight of the new value at a refresh.
        epsilon: probability that the first draw takes the largest gradients.
        decay: factor of this probability from one draw to the next.
        prior: added to the number of draws of each layer.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    PER_UNIT: ClassVar[tuple[str, ...]] = (*GradNormSampler.PER_UNIT, "counts")

    def __init__(
        self,
        num_active_layers: Scheduled = 2,
        period: Scheduled = 20,
        *,
        probing_steps: int = 10,
        refresh_period: int | None = 100,
        ema: Scheduled = 0.5,
        epsilon: float = 1.0,
        decay: float = 0.9,
        prior: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_active_layers, period, probing_steps=probing_steps, refresh_period=refresh_period, ema=ema, seed=seed
        )
        require(probing_steps >= 1, "probing_steps", probing_steps, "at least 1")
        require(0 <= epsilon <= 1, "epsilon", epsilon, "between 0 and 1")
        require(0 <= decay <= 1, "decay", decay, "between 0 and 1")
        require(prior > 0, "prior", prior, "above 0")
        self.epsilon = epsilon
        self.decay = decay
        self.prior = prior

    def _begin(self, units: int) -> None:
        super()._begin(units)
        self._counts = [0] * units

    @property
    def _greedy(self) -> float:
        """Probability that the next draw takes the largest gradients."""
        return float(self.epsilon * self.decay**self._draws)

    @property
    def _largest(self) -> tuple[int, ...]:
        """The layers of the largest gradient norm; those that were never measured come last."""
        m = torch.tensor(self._importance, dtype=torch.float64).nan_to_num(nan=-1.0)
        return tuple(sorted(m.argsort(descending=True, stable=True)[: self.now_active].tolist()))

    def probabilities(self) -> tuple[float, ...]:
        """Probability of each layer to be drawn first; of the largest gradients each may be."""
        counts, largest = np.array(self._counts) + self.prior, self._largest
        p = (1 - self._greedy) * counts / counts.sum()
        p[list(largest)] += self._greedy / len(largest)
        return tuple(p.tolist())

    def pick(self) -> tuple[int, ...]:
        """The layers of the largest gradient norm, or a draw by how often each was drawn."""
        random = np.random.default_rng(keyed_generator("frequency", self.seed, self._draws).initial_seed())
        if random.random() < self._greedy:
            return self._largest
        weights = torch.from_numpy(random.dirichlet(np.array(self._counts) + self.prior))
        return draw_without_replacement(weights.log(), self.now_active, self.seed, self._draws)

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set, and count it."""
        active = super().sample()
        self._counts = [count + (unit in active) for unit, count in enumerate(self._counts)]
        return active

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """A period longer than the training, more probing than training, and norms that no draw looks at."""
        yield from PeriodicSampler.without_effect(self, train_steps)
        if self.probing_steps > train_steps:
            yield f"probing_steps={self.probing_steps}: more steps only measure than train ({train_steps})"
        if self.refresh_period is not None and self.draw_steps(train_steps)[-1] < self.refresh_period:
            yield (
                f"refresh_period={self.refresh_period}: nothing is drawn after a refresh before training ends after "
                f"{train_steps} steps, so the gradient norms stay what probing measured"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state of the measurements, and how often each layer was drawn."""
        return super().state_dict() | {"counts": list(self._counts)}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._counts = [int(count) for count in state["counts"]]
