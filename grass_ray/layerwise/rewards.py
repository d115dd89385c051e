"""IST (importance-aware sparse tuning, EMNLP 2024): layers drawn by what damping their adapters costs.

Importance ``I`` starts at 0, and a *high* value means unimportant: layers to train are drawn with weights
``sigmoid(-I)``. Every ``refresh_period`` steps a few trials damp the adapters of half of the layers, drawn with weights
``sigmoid(I)``; a trial whose loss stays low tells that its layers matter little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from grass_ray.layerwise.drawing import draw_without_replacement, heaviest_sets
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import Measure, age_since, require
from grass_ray.layerwise.schedules import Scheduled

# when the weights leave no chance of another set, trials repeat one
MOST_ATTEMPTS = 200


class RewardSampler(PeriodicSampler):
    """IST: a share of the layers is drawn every step by an importance learnt from damped forward passes.

    Args:
        share: of the layers that train at a time (rounded down, at least one).
        period: optimizer steps between draws.
        refresh_period: optimizer steps between updates of the importance.
        trials: damped forward passes an update.
        damped_share: of the layers that a trial damps (rounded down, at least one).
        damping: the factor on a damped layer's adapters.
        learning_rate: of the importance.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    PER_UNIT = ("importance", "measured_at")

    def __init__(
        self,
        share: float = 0.25,
        period: Scheduled = 1,
        *,
        refresh_period: int = 10,
        trials: int = 3,
        damped_share: float = 0.5,
        damping: float = 0.25,
        learning_rate: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__(1, period, seed=seed)
        require(0 < share <= 1, "share", share, "above 0 and at most 1")
        require(0 < damped_share <= 1, "damped_share", damped_share, "above 0 and at most 1")
        require(refresh_period >= 1, "refresh_period", refresh_period, "at least 1")
        require(trials >= 2, "trials", trials, "at least 2: rewards are compared with their mean")
        require(damping >= 0, "damping", damping, "at least 0")
        require(learning_rate > 0, "learning_rate", learning_rate, "above 0")
        self.share = share
        self.refresh_period = refresh_period
        self.trials = trials
        self.damped_share = damped_share
        self.damping = damping
        self.learning_rate = learning_rate
        self._begin(0)

    def _begin(self, units: int) -> None:
        self._importance = [0.0] * units
        self._measured_at: list[int | None] = [None] * units
        self._refreshes = 0
        self._refreshed_at = 0

    @property
    def refreshes(self) -> int:
        """How often the importance was updated."""
        return self._refreshes

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters."""
        super().start(sizes, total)
        self._begin(len(sizes))

    def probe(self, measure: Measure) -> None:
        """At a refresh: a few forward passes with damped adapters, and a new draw."""
        if self._steps == self._refreshed_at or self._steps % self.refresh_period:
            return
        self._refreshed_at = self._steps
        weights = [_sigmoid(i) for i in self._importance]
        damped = self._trial_layers(weights)
        losses = [measure.loss(dict.fromkeys(layers, self.damping)) for layers in damped]
        # a trial whose loss is not a number has no reward
        trials = [trial for trial in zip(damped, losses, strict=True) if not math.isnan(trial[1])]
        rewards = [(layers, math.exp(-loss)) for layers, loss in trials]
        mean = sum(reward for _, reward in rewards) / max(len(rewards), 1)
        for layers, reward in rewards:
            for layer in layers:
                slope = weights[layer] * (1 - weights[layer])
                self._importance[layer] += (reward - mean) * slope * self.learning_rate
                self._measured_at[layer] = self._steps
        self._refreshes += 1
        self._next_draw = self._steps

    def _trial_layers(self, weights: Sequence[float]) -> list[tuple[int, ...]]:
        """The layers each trial damps, distinct from trial to trial as far as chance finds such sets."""
        count = max(1, int(self.damped_share * self._num_units))
        choices = math.comb(self._num_units, count)
        log_w = torch.tensor(weights, dtype=torch.float64).clamp_(min=1e-300).log()
        found: list[tuple[int, ...]] = []
        attempt = 0
        while len(found) < self.trials:
            # a key of its own for every attempt, never one of a training draw
            layers = draw_without_replacement(log_w, count, self.seed, -1 - self._refreshes * 1_000_003 - attempt)
            attempt += 1
            if layers not in found or len(found) >= choices or attempt >= MOST_ATTEMPTS:
                found.append(layers)
        return found

    def probabilities(self) -> tuple[float, ...]:
        """``sigmoid(-I)`` over its sum."""
        weights = [_sigmoid(-i) for i in self._importance]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    def importance(self) -> tuple[float, ...]:
        """``I`` of each layer; high means unimportant."""
        return tuple(self._importance)

    def ages(self) -> tuple[float, ...]:
        """Steps since a trial last damped each layer; NaN where none did."""
        return age_since(self._measured_at, self._steps)

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """Of the sets of a share of the layers the heaviest, and the heaviest with layer 0."""
        return heaviest_sets(weights, self._count)

    @property
    def _count(self) -> int:
        """How many layers train at a time."""
        return max(1, int(self.share * self._num_units))

    def pick(self) -> tuple[int, ...]:
        """A draw without replacement in proportion to ``sigmoid(-I)``."""
        log_p = torch.tensor(self.probabilities(), dtype=torch.float64).log()
        return draw_without_replacement(log_p, self._count, self.seed, self._draws)

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """A period or a refresh that is longer than the training."""
        yield from super().without_effect(train_steps)
        if self.refresh_period >= train_steps:
            yield (
                f"refresh_period={self.refresh_period}: training ends after {train_steps} steps, so the importance is "
                "never updated and every draw is uniform"
            )

    def state_dict(self) -> dict[str, Any]:
        """Clock, draw index and importance."""
        return super().state_dict() | {
            "importance": list(self._importance),
            "refreshes": self._refreshes,
            "refreshed_at": self._refreshed_at,
            "measured_at": list(self._measured_at),
        }

    def _upgraded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"measured_at": [None] * self._num_units} | dict(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._importance = [float(value) for value in state["importance"]]
        self._refreshes = int(state["refreshes"])
        self._refreshed_at = int(state["refreshed_at"])
        self._measured_at = list(state["measured_at"])


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
