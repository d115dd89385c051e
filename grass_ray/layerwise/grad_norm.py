"""GRASS (arXiv 2604.07808): layers drawn from a softmax over their mean gradient norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grass_ray.layerwise.samplers import PeriodicSampler, draw_without_replacement, require
from grass_ray.layerwise.schedules import Scheduled, bounds_of, value_at


class GradNormSampler(PeriodicSampler):
    """GRASS (arXiv 2604.07808): layers drawn from a softmax over their mean gradient norms.

    The first ``probing_steps`` steps only measure. Then ``num_active_layers`` distinct layers are drawn every
    ``period`` steps; every ``refresh_period`` steps the importance of the layers that were active since the last
    refresh moves towards what was measured, ``m <- ema * new + (1 - ema) * m``, and the probabilities follow. A
    layer that was never measured counts as an average one.

    The paper gives no values; these defaults are this project's. gamma, T_s, tau and alpha may each be a schedule
    over training (:mod:`grass_ray.layerwise.schedules`), this project's extension.

    Args:
        num_active_layers: gamma, layers that train at a time.
        period: T_s, optimizer steps between draws.
        probing_steps: T_p, steps before training that only measure.
        refresh_period: T_u, optimizer steps between refreshes; None never refreshes (static GRASS).
        temperature: tau of the softmax.
        ema: alpha, the weight of the new value at a refresh.
        normalise: ``"mean"`` divides the importance by its mean over layers before the softmax, so that tau means
            the same for every model; ``"none"`` is the formula as printed.
        exploration: epsilon, the share of a uniform draw mixed into the probabilities (this project's extension).
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    grad_norms: Literal["none", "arriving", "clipped"] = "arriving"

    def __init__(
        self,
        num_active_layers: Scheduled = 2,
        period: Scheduled = 20,
        *,
        probing_steps: int = 10,
        refresh_period: int | None = 100,
        temperature: Scheduled = 0.5,
        ema: Scheduled = 0.5,
        normalise: Literal["mean", "none"] = "mean",
        exploration: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_active_layers, period, seed=seed)
        require(probing_steps >= 0, "probing_steps", probing_steps, "at least 0")
        require(refresh_period is None or refresh_period >= 1, "refresh_period", refresh_period, "at least 1 or None")
        require(bounds_of(temperature)[0] > 0, "temperature", temperature, "above 0")
        low, high = bounds_of(ema)
        require(low > 0 and high <= 1, "ema", ema, "above 0 and at most 1")
        require(normalise in ("mean", "none"), "normalise", normalise, "'mean' or 'none'")
        require(0 <= exploration <= 1, "exploration", exploration, "between 0 and 1")
        self.probing_steps = probing_steps
        self.refresh_period = refresh_period
        self.temperature = temperature
        self.ema = ema
        self.normalise = normalise
        self.exploration = exploration
        self._probed = 0
        self._refreshes = 0
        self._importance: list[float] = []
        self._window_sum: Tensor | None = None
        self._window_count: Tensor | None = None

    @property
    def probing(self) -> bool:
        """Whether the next step only measures."""
        return self._probed < self.probing_steps

    @property
    def due(self) -> bool:
        """Whether probing is over and a period has ended (or nothing was drawn yet)."""
        return not self.probing and super().due

    @property
    def refreshes(self) -> int:  # type: ignore[override]
        """How often the probabilities were computed from measurements, the end of probing included."""
        return self._refreshes

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters. Raises ValueError when fewer than ``num_active_layers``."""
        super().start(sizes, total)
        self._importance = [math.nan] * len(sizes)

    def probabilities(self) -> tuple[float, ...]:
        """Probability of each layer to be drawn first; uniform until something was measured."""
        return tuple(self._log_probabilities().exp().tolist())

    def importance(self) -> tuple[float, ...]:
        """Mean gradient norm of each layer, not normalised; NaN where never measured."""
        return tuple(self._importance)

    def pick(self) -> tuple[int, ...]:
        """A draw without replacement from the probabilities."""
        return draw_without_replacement(self._log_probabilities(), self.now_active, self.seed, self._draws)

    def observe(self, norms: Tensor) -> None:
        """Add one step's RMS gradients to the window; refresh at the end of probing and every ``refresh_period``."""
        measured = ~norms.isnan()
        if self._window_sum is None or self._window_count is None:
            self._window_sum = torch.zeros_like(norms)
            self._window_count = torch.zeros_like(norms)
        self._window_sum = self._window_sum + norms.nan_to_num(nan=0.0)
        self._window_count = self._window_count + measured
        if self.probing:
            self._probed += 1
            if not self.probing:
                self._refresh()
            return
        super().observe(norms)
        if self.refresh_period is not None and self._steps % self.refresh_period == 0:
            self._refresh()

    def _refresh(self) -> None:
        """Move the importance of every layer measured in the window towards its mean there; clear the window."""
        assert self._window_sum is not None
        assert self._window_count is not None
        sums, counts = self._window_sum.tolist(), self._window_count.tolist()
        alpha = value_at(self.ema, self._steps)
        for layer, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                new, old = total / count, self._importance[layer]
                self._importance[layer] = new if math.isnan(old) else alpha * new + (1 - alpha) * old
        self._window_sum = self._window_count = None
        self._refreshes += 1

    def _log_probabilities(self) -> Tensor:
        """Natural logarithms of the probabilities, float64 of shape (L,); logarithms so that none underflows."""
        m = torch.tensor(self._importance, dtype=torch.float64)
        mean = m.nanmean()
        if mean.isnan():
            m = torch.zeros_like(m)
        else:
            m = torch.where(m.isnan(), mean, m)
            if self.normalise == "mean" and mean > 0:
                m = m / mean
        log_p = torch.log_softmax(m / value_at(self.temperature, self._steps), dim=0)
        if self.exploration:
            uniform = torch.full_like(log_p, math.log(self.exploration / len(log_p)))
            log_p = torch.logaddexp(log_p + math.log1p(-self.exploration), uniform) if self.exploration < 1 else uniform
        return log_p

    def state_dict(self) -> dict[str, Any]:
        """Clocks, draw index, importance and the open window."""
        return super().state_dict() | {
            "probed": self._probed,
            "refreshes": self._refreshes,
            "importance": list(self._importance),
            "window_sum": None if self._window_sum is None else self._window_sum.tolist(),
            "window_count": None if self._window_count is None else self._window_count.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        self._probed = state["probed"]
        self._refreshes = state["refreshes"]
        self._importance = list(state["importance"])
        self._window_sum = None if state["window_sum"] is None else torch.tensor(state["window_sum"])
        self._window_count = None if state["window_count"] is None else torch.tensor(state["window_count"])
