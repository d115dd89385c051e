"""MISA (arXiv 2511.00056): weight matrices drawn by their gradient norms until a budget of parameters is full."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grass_ray.layerwise.drawing import distinct_sets, random_order
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import age_since, require
from grass_ray.layerwise.schedules import Scheduled
from grass_ray.layerwise.windows import Window, means, steps_ago, window_of_sums

NEVER = -1
HIGHEST_EXPONENT = 5.0


class MatrixNormSampler(PeriodicSampler):
    """MISA: matrices drawn with ``p ~ exp(min(5, eta * G^2))`` while they fit a budget.

    ``G`` is a matrix's gradient norm (Frobenius, after clipping), averaged over the steps of an interval in which it
    was active (winsorised, :mod:`grass_ray.layerwise.windows`), then over its visits by an exponential mean with bias
    correction. A first sweep visits every matrix once, one step a group; afterwards an interval lasts ``period`` steps
    and the ``forced`` least recently used matrices come first. The optimizer needs
    ``options=LayerwiseOptions(granularity="matrix")``.

    Args:
        budget: share of the model's parameters that may train at a time.
        period: optimizer steps between draws.
        eta: weight of the squared norm.
        beta: of the mean over visits, the weight of the old value.
        forced: how many of the least recently used matrices come first.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    grad_norms: Literal["none", "arriving", "clipped"] = "clipped"
    PER_UNIT = ("last_used", "visits", "means", "measured_at")

    def __init__(
        self,
        budget: float = 0.03,
        period: Scheduled = 50,
        *,
        eta: float = 1.0,
        beta: float = 0.8,
        forced: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(1, period, seed=seed)
        require(0 < budget <= 1, "budget", budget, "above 0 and at most 1")
        require(eta > 0, "eta", eta, "above 0")
        require(0 <= beta < 1, "beta", beta, "at least 0 and below 1")
        require(forced >= 0, "forced", forced, "at least 0")
        self.budget = budget
        self.eta = eta
        self.beta = beta
        self.forced = forced
        self._room = 0
        self._begin(())

    def _begin(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self._last_used = [NEVER] * len(sizes)
        self._visits = [0] * len(sizes)
        self._means = [0.0] * len(sizes)
        self._measured_at: list[int | None] = [None] * len(sizes)
        self._window = Window(len(sizes))
        self._refreshes = 0

    @property
    def refreshes(self) -> int:
        """How often the norms of an interval entered the probabilities."""
        return self._refreshes

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with matrices of ``sizes`` parameters out of ``total``.

        Raises:
            ValueError: the largest matrix alone exceeds the budget, so it could never be drawn.
        """
        whole = total or sum(sizes)
        room = math.floor(self.budget * whole + 1e-6)  # 0.29 * 100 is 28.999... in floating point
        if max(sizes) > room:
            raise ValueError(
                f"budget is {self.budget:g} of {whole:,} parameters, but the largest matrix has {max(sizes):,}; "
                f"it must be at least {math.ceil(1e6 * max(sizes) / whole) / 1e6:g}"
            )
        super().start(sizes, total)
        self._room = room
        self._begin(sizes)

    def probabilities(self) -> tuple[float, ...]:
        """Probability of each matrix to be the first drawn after the forced ones."""
        return tuple(self._log_probabilities().exp().tolist())

    def importance(self) -> tuple[float, ...]:
        """``G`` of each matrix; NaN where never visited."""
        return tuple(
            mean / (1 - self.beta**visits) if visits else math.nan
            for mean, visits in zip(self._means, self._visits, strict=True)
        )

    def ages(self) -> tuple[float, ...]:
        """Steps since each matrix's gradient norm was last measured; NaN where never."""
        return age_since(self._measured_at, self._steps)

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """The heaviest set that fits the budget, and the heaviest with matrix 0.

        Of what was tried: filling the room with those first that weigh most a parameter, of equal ones the largest, and
        the same from each later one on.
        """

        def worth(unit: int) -> tuple[float, int, int]:
            return weights[unit] / self._sizes[unit], weights[unit], unit

        others = sorted(range(1, len(weights)), key=worth, reverse=True)
        tried = [self._filled(others[first:] + others[:first]) for first in range(len(others))]
        heaviest = max(tried, key=lambda active: sum(weights[unit] for unit in active), default=[0])
        return distinct_sets(weights, self._filled([0, *others]), heaviest)

    def _filled(self, order: Sequence[int]) -> list[int]:
        """The units that are taken one after another, each if it fits what is left of the budget."""
        room = self._room
        active = []
        for unit in order:
            if self._sizes[unit] <= room:
                room -= self._sizes[unit]
                active.append(unit)
        return active

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set; during the first sweep it lasts one step."""
        if self._draws:
            self._refresh()
        active = super().sample()
        if NEVER in self._last_used:
            self._next_draw = self._steps + 1
        return active

    def pick(self) -> tuple[int, ...]:
        """Never used and least recently used matrices, then a random order by probability, each if it fits."""
        by_age = sorted(range(self._num_units), key=lambda unit: (self._last_used[unit], unit))
        first = max(self.forced, self._last_used.count(NEVER))
        chances = random_order(self._log_probabilities(), self.seed, self._draws)
        early = by_age[:first]
        active = self._filled([*early, *(unit for unit in chances if unit not in set(early))])
        for unit in active:
            self._last_used[unit] = self._draws
        return tuple(sorted(active))

    def observe(self, norms: Tensor) -> None:
        """Add one step's RMS gradients, shape (units,), to the interval; advance the clock."""
        self._window.add(norms)
        super().observe(norms)

    def _refresh(self) -> None:
        """Let the norms of the interval that ended enter the means over visits."""
        table = self._window.table()
        frobenius = means(table * torch.tensor(self._sizes, dtype=torch.float32).sqrt())
        for unit, (new, ago) in enumerate(zip(frobenius, steps_ago(table), strict=True)):
            if not math.isnan(new):
                self._visits[unit] += 1
                self._means[unit] = (1 - self.beta) * new + self.beta * self._means[unit]
                self._measured_at[unit] = self._steps - (ago or 0)
        self._window = Window(self._num_units)
        self._refreshes += 1

    def _log_probabilities(self) -> Tensor:
        g = torch.tensor(self.importance(), dtype=torch.float64).nan_to_num(nan=0.0)
        return torch.log_softmax((self.eta * g.square()).clamp(max=HIGHEST_EXPONENT), dim=0)

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """Nothing: the first sweep draws at every step whatever the period."""
        yield from ()

    def state_dict(self) -> dict[str, Any]:
        """Clock, draw index, means and the open interval."""
        return super().state_dict() | {
            "last_used": list(self._last_used),
            "visits": list(self._visits),
            "means": list(self._means),
            "refreshes": self._refreshes,
            "measured_at": list(self._measured_at),
            "window": self._window.state_dict(),
        }

    def _upgraded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if "sums" not in state:
            return dict(state)
        kept = {key: value for key, value in state.items() if key not in ("sums", "counts")}
        norms = None if state["sums"] is None else [s / n**0.5 for s, n in zip(state["sums"], self._sizes, strict=True)]
        window = window_of_sums(norms, state["counts"])
        return {**kept, "window": window, "measured_at": [None] * self._num_units}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._last_used = [int(draw) for draw in state["last_used"]]
        self._visits = [int(number) for number in state["visits"]]
        self._means = [float(mean) for mean in state["means"]]
        self._refreshes = int(state["refreshes"])
        self._measured_at = list(state["measured_at"])
        self._window = Window.restore(self._num_units, state["window"])
