"""The clock that most samplers share: a draw every ``period`` optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from grass_ray.layerwise.drawing import heaviest_sets
from grass_ray.layerwise.sampler import Sampler, require
from grass_ray.layerwise.schedules import Scheduled, bounds_of, count_at, described


class PeriodicSampler(Sampler):
    """Draws ``num_active_layers`` units every ``period`` optimizer steps; a subclass defines :meth:`pick`.

    Both settings may be schedules over training. A period that changes counts from the draw it began with.

    Args:
        num_active_layers: gamma, number of units that train at a time.
        period: T_s, optimizer steps between draws.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, num_active_layers: Scheduled, period: Scheduled, *, seed: int) -> None:
        require(bounds_of(num_active_layers)[0] >= 1, "num_active_layers", num_active_layers, "at least 1")
        require(bounds_of(period)[0] >= 1, "period", period, "at least 1")
        self.num_active_layers = num_active_layers
        self.period = period
        self.seed = seed
        self._steps = 0
        self._draws = 0
        self._next_draw = 0

    @property
    def due(self) -> bool:
        """Whether a period has ended, or nothing was drawn yet."""
        return self._steps >= self._next_draw

    @property
    def now_active(self) -> int:
        """Number of units that train at this step (gamma)."""
        return count_at(self.num_active_layers, self._steps)

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters. Raises ValueError if they are fewer than ``num_active_layers``."""
        most = bounds_of(self.num_active_layers)[1]
        if most > len(sizes):
            raise ValueError(
                f"num_active_layers (gamma) is {most:g}, but the model has {len(sizes)} decoder layers; "
                f"choose 1 to {len(sizes)}"
            )
        super().start(sizes, total)
        self._steps = self._draws = self._next_draw = 0

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """The heaviest sets of as many units as are ever active together."""
        return heaviest_sets(weights, count_at(bounds_of(self.num_active_layers)[1], 0))

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set."""
        active = self.pick()
        self._draws += 1
        self._next_draw = self._steps + count_at(self.period, self._steps)
        return active

    def pick(self) -> tuple[int, ...]:
        """The active set of draw number ``self._draws``: distinct indices of units, ascending."""
        raise NotImplementedError

    def observe(self, norms: Tensor) -> None:
        """Advance the clock."""
        self._steps += 1

    def draw_steps(self, train_steps: int) -> list[int]:
        """Training steps, from 0, before which this sampler draws by its period."""
        found = [0]
        while (coming := found[-1] + count_at(self.period, found[-1])) < train_steps:
            found.append(coming)
        return found

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """A period that is longer than the training."""
        if len(self.draw_steps(train_steps)) == 1:
            yield (
                f"period={described(self.period)}: training ends after {train_steps} steps, so the first active set "
                "trains throughout"
            )

    def state_dict(self) -> dict[str, Any]:
        """Clock and draw index."""
        clock = {"steps": self._steps, "draws": self._draws, "next_draw": self._next_draw}
        return super().state_dict() | clock

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        self._draws = int(state["draws"])
        self._next_draw = int(state["next_draw"])
