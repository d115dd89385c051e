"""GradES (arXiv 2509.01842): a weight matrix stops for good when its gradients stand still."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import require
from grass_ray.layerwise.schedules import Scheduled
from grass_ray.layerwise.windows import Window, means


class ConvergingSampler(PeriodicSampler):
    """GradES (arXiv 2509.01842): every unit trains until its gradients stand still, and then never again.

    After every ``period`` steps the mean gradient norm of each active unit in these steps is compared with that in the
    ones before: ``abs(new - old) / old``. From a share ``grace`` of the training on, a unit whose norm changed by less
    than ``threshold`` freezes for good. The last unit trains to the end.

    Args:
        threshold: tau, smallest relative change of the gradient norm with which a unit trains on.
        grace: alpha, share of the training in which nothing freezes.
        period: optimizer steps whose norms are averaged.
        training_steps: length of the training, of which ``grace`` is a share.
        seed: nothing is drawn at random.

    Raises:
        ValueError: a setting is out of range.
    """

    grad_norms: Literal["none", "arriving", "clipped"] = "arriving"
    PER_UNIT: ClassVar[tuple[str, ...]] = ("trains", "means")

    def __init__(
        self,
        threshold: float = 0.05,
        grace: float = 0.5,
        period: Scheduled = 10,
        *,
        training_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(1, period, seed=seed)
        require(threshold > 0, "threshold", threshold, "above 0")
        require(0 <= grace < 1, "grace", grace, "at least 0 and below 1")
        require(not grace or training_steps is not None, "grace", grace, "0, or training_steps must be given")
        self.threshold = threshold
        self.grace = grace
        self._first = grace * (training_steps or 0)
        self._begin(0)

    def _begin(self, units: int) -> None:
        self._active = tuple(range(units))
        self._means = [math.nan] * units
        self._window = Window(units)
        self._refreshes = 0

    @property
    def refreshes(self) -> int:
        """How often the norms were compared."""
        return self._refreshes

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with ``len(sizes)`` units, all of them active."""
        super().start(sizes, total)
        self._begin(len(sizes))

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """All units, with which the training begins."""
        return [tuple(range(len(weights)))]

    def importance(self) -> tuple[float, ...]:
        """Mean gradient norm of each unit in the last period in which it trained; NaN where there was none."""
        return tuple(self._means)

    def observe(self, norms: Tensor) -> None:
        """Add one step's RMS gradients, shape (units,), to the period; advance the clock."""
        self._window.add(norms)
        super().observe(norms)

    def pick(self) -> tuple[int, ...]:
        """The units whose gradients still change."""
        new = means(self._window.table()) if self._steps else self._means
        change = {unit: self._change(self._means[unit], new[unit]) for unit in self._active}
        if self._steps >= self._first:
            moving = tuple(unit for unit in self._active if not change[unit] < self.threshold)
            self._active = moving or (max(change, key=lambda unit: change[unit]),)
        self._means = [old if math.isnan(now) else now for old, now in zip(self._means, new, strict=True)]
        self._window = Window(self._num_units)
        self._refreshes += bool(self._steps)
        return self._active

    @staticmethod
    def _change(old: float, new: float) -> float:
        """Relative change of a norm; infinite where one of them is not known."""
        if math.isnan(old) or math.isnan(new):
            return math.inf
        return abs(new - old) / old if old else math.inf

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """A comparison that never comes."""
        compared = [step for step in self.draw_steps(train_steps)[2:] if step >= self._first]
        if not compared:
            yield f"threshold={self.threshold}: no norms are compared before training ends after {train_steps} steps"

    def state_dict(self) -> dict[str, Any]:
        """Clock, which units train, their norms and the open period."""
        return super().state_dict() | {
            "trains": [unit in self._active for unit in range(self._num_units)],
            "means": list(self._means),
            "refreshes": self._refreshes,
            "window": self._window.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._active = tuple(unit for unit, trains in enumerate(state["trains"]) if trains)
        self._means = [float(mean) for mean in state["means"]]
        self._refreshes = int(state["refreshes"])
        self._window = Window.restore(self._num_units, state["window"])
