"""Groups of neighbouring units one after another: LIFT, HiFT, BAdam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from grass_ray.layerwise.generators import keyed_generator
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import require
from grass_ray.layerwise.schedules import Scheduled, count_at


class CyclicSampler(PeriodicSampler):
    """Groups of neighbouring units one after another: LIFT, HiFT, BAdam.

    A group is ``num_active_layers`` neighbours (the last may be smaller). When every group had its turn the next
    cycle begins; in ``"random"`` order each cycle is a new permutation of the groups.

    Args:
        num_active_layers: number of units in a group.
        period: optimizer steps for which a group trains; None spreads one cycle over ``training_steps``.
        order: ``"ascending"`` from the input to the output, ``"descending"``, ``"random"`` (a new permutation per
            cycle), or ``"shuffled"`` (one permutation for all cycles).
        hold_lr: the learning rate should stay the same within a cycle (HiFT); see :attr:`lr_cycle_steps`.
        training_steps: length of the training, for a period of None.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        num_active_layers: int = 1,
        period: Scheduled | None = 50,
        *,
        order: Literal["ascending", "descending", "random", "shuffled"] = "ascending",
        hold_lr: bool = False,
        training_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_active_layers, 1 if period is None else period, seed=seed)
        given = period is not None or training_steps is not None
        require(given, "period", period, "a number of steps, or training_steps must be given")
        self._spread = training_steps if period is None else None
        orders = ("ascending", "descending", "random", "shuffled")
        require(order in orders, "order", order, f"one of {', '.join(orders)}")
        self.order = order
        self.hold_lr = hold_lr

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters. Raises ValueError if they are fewer than ``num_active_layers``."""
        super().start(sizes, total)
        if self._spread is not None:
            # rounded up: the last groups get fewer steps rather than the first ones a second turn
            self.period = max(1, -(-self._spread // len(self._groups())))

    @property
    def cycle_steps(self) -> int:
        """Optimizer steps in which every group has one turn (at the period the training starts with)."""
        return len(self._groups()) * count_at(self.period, 0)

    @property
    def lr_cycle_steps(self) -> int:
        """The length of a cycle if ``hold_lr``, else 1."""
        return self.cycle_steps if self.hold_lr else 1

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """The group of unit 0, and the heaviest."""
        groups = self._groups()
        heaviest = max(groups, key=lambda group: sum(weights[unit] for unit in group))
        return list(dict.fromkeys((groups[0], heaviest)))

    def _groups(self) -> list[tuple[int, ...]]:
        size, units = self.now_active, self._num_units
        return [tuple(range(first, min(first + size, units))) for first in range(0, units, size)]

    def pick(self) -> tuple[int, ...]:
        """The next group."""
        groups = self._groups()
        cycle, turn = divmod(self._draws, len(groups))
        match self.order:
            case "descending":
                return groups[-1 - turn]
            case "random" | "shuffled":
                key = cycle if self.order == "random" else 0
                order = torch.randperm(len(groups), generator=keyed_generator("cycle", self.seed, key))
                return groups[int(order[turn])]
            case _:
                return groups[turn]

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """A period that is longer than the training, unless it is spread over it."""
        if self._spread is None:
            yield from super().without_effect(train_steps)
