"""GRASS (arXiv 2604.07808): layers drawn from a softmax over their mean gradient norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from grass_ray.layerwise.drawing import draw_without_replacement
from grass_ray.layerwise.periodic import PeriodicSampler
from grass_ray.layerwise.sampler import age_since, require
from grass_ray.layerwise.schedules import Scheduled, bounds_of, value_at
from grass_ray.layerwise.windows import Window, means, steps_ago, window_of_sums

TEMPERATURE = 0.5
# the temperature for a number of effective layers lies within so many octaves of the spread of the importance
OCTAVES = 40.0
HALVINGS = 50


class GradNormSampler(PeriodicSampler):
    """GRASS (arXiv 2604.07808): layers drawn from a softmax over their mean gradient norms.

    The first ``probing_steps`` steps only measure. Then ``num_active_layers`` distinct layers are drawn every
    ``period`` steps; every ``refresh_period`` steps the importance of the layers that were active since the last
    refresh moves towards what was measured, ``m <- ema * new + (1 - ema) * m``, and the probabilities follow. A
    layer that was never measured counts as an average one. What was measured is the winsorised mean of
    :mod:`grass_ray.layerwise.windows`: the paper's mean as long as no value is an outlier.

    A layer that is not drawn keeps an old value, and where all gradients grow or shrink during training, the age of a
    value then decides as much as the layer does; :meth:`ages` tells it, and ``staleness`` corrects it.

    The paper gives no values; these defaults are this project's. gamma, T_s, tau and alpha may each be a schedule
    over training (:mod:`grass_ray.layerwise.schedules`), this project's extension.

    Args:
        num_active_layers: gamma, layers that train at a time.
        period: T_s, optimizer steps between draws.
        probing_steps: T_p, steps before training that only measure.
        refresh_period: T_u, optimizer steps between refreshes; None never refreshes (static GRASS).
        temperature: tau of the softmax; None takes 0.5, or what ``effective_layers`` asks for. Near 0 the most
            important layers are drawn almost surely; a negative one prefers layers of small importance (a control).
        ema: alpha, the weight of the new value at a refresh.
        normalise: ``"mean"`` divides the importance by its mean over layers before the softmax, so that tau means
            the same for every model; ``"none"`` is the formula as printed.
        exploration: epsilon, the share of a uniform draw mixed into the probabilities (this project's extension).
        staleness: ``"none"`` leaves old values as they are, as the paper does; ``"level"`` first multiplies all of them
            by how much the gradients of the layers measured in the window have changed (the geometric mean of new over
            old), so that old and new values are of one time (this project's extension).
        effective_layers: in place of a temperature the exponential of the probabilities' entropy, exploration included,
            from 1 to the number of layers; the temperature that gives it is found anew for every draw (this project's
            extension, and may be a schedule).
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    grad_norms: Literal["none", "arriving", "clipped"] = "arriving"
    PER_UNIT: ClassVar[tuple[str, ...]] = ("importance", "measured_at")

    def __init__(
        self,
        num_active_layers: Scheduled = 2,
        period: Scheduled = 20,
        *,
        probing_steps: int = 10,
        refresh_period: int | None = 100,
        temperature: Scheduled | None = None,
        ema: Scheduled = 0.5,
        normalise: Literal["mean", "none"] = "mean",
        exploration: float = 0.0,
        staleness: Literal["none", "level"] = "none",
        effective_layers: Scheduled | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_active_layers, period, seed=seed)
        require(probing_steps >= 0, "probing_steps", probing_steps, "at least 0")
        require(refresh_period is None or refresh_period >= 1, "refresh_period", refresh_period, "at least 1 or None")
        if temperature is None:
            temperature = TEMPERATURE
        else:
            alone = effective_layers is None
            require(alone, "temperature", temperature, "left out where effective_layers is given: both say the same")
        coldest, hottest = bounds_of(temperature)
        require(coldest > 0 or hottest < 0, "temperature", temperature, "above 0, or below 0 throughout")
        least = 1 if effective_layers is None else bounds_of(effective_layers)[0]
        require(least >= 1, "effective_layers", effective_layers, "at least 1")
        low, high = bounds_of(ema)
        require(low > 0 and high <= 1, "ema", ema, "above 0 and at most 1")
        require(normalise in ("mean", "none"), "normalise", normalise, "'mean' or 'none'")
        require(0 <= exploration <= 1, "exploration", exploration, "between 0 and 1")
        require(staleness in ("none", "level"), "staleness", staleness, "'none' or 'level'")
        self.probing_steps = probing_steps
        self.refresh_period = refresh_period
        self.temperature = temperature
        self.ema = ema
        self.normalise = normalise
        self.exploration = exploration
        self.staleness = staleness
        self.effective_layers = effective_layers
        self._begin(0)

    def _begin(self, units: int) -> None:
        self._probed = 0
        self._refreshes = 0
        self._importance = [math.nan] * units
        self._measured_at: list[int | None] = [None] * units
        self._window = Window(units)

    @property
    def probing(self) -> bool:
        """Whether the next step only measures."""
        return self._probed < self.probing_steps

    @property
    def due(self) -> bool:
        """Whether probing is over and a period has ended (or nothing was drawn yet)."""
        return not self.probing and super().due

    @property
    def refreshes(self) -> int:
        """How often the probabilities were computed from measurements, the end of probing included."""
        return self._refreshes

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters.

        Raises ValueError when they are fewer than ``num_active_layers`` or ``effective_layers``.
        """
        if self.effective_layers is not None and (most := bounds_of(self.effective_layers)[1]) > len(sizes):
            raise ValueError(
                f"effective_layers is {most:g}, but there are {len(sizes)} layers; choose 1 to {len(sizes)}"
            )
        super().start(sizes, total)
        self._begin(len(sizes))

    def probabilities(self) -> tuple[float, ...]:
        """Probability of each layer to be drawn first; uniform until something was measured."""
        return tuple(self._log_probabilities().exp().tolist())

    def importance(self) -> tuple[float, ...]:
        """Mean gradient norm of each layer, not normalised; NaN where never measured."""
        return tuple(self._importance)

    def ages(self) -> tuple[float, ...]:
        """Steps, probing included, since each layer's importance was last measured; NaN where never."""
        return age_since(self._measured_at, self._probed + self._steps)

    def pick(self) -> tuple[int, ...]:
        """A draw without replacement from the probabilities."""
        return draw_without_replacement(self._log_probabilities(), self.now_active, self.seed, self._draws)

    def observe(self, norms: Tensor) -> None:
        """Add one step's RMS gradients to the window; refresh at the end of probing and every ``refresh_period``."""
        if self.probing or self.refresh_period is not None:
            self._window.add(norms)
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
        table = self._window.table()
        measured = {layer: new for layer, new in enumerate(means(table)) if not math.isnan(new)}
        old = self._importance
        if self.staleness == "level":
            level = self._level(measured)
            old = [value * level for value in old]
        alpha = value_at(self.ema, self._steps)
        now = self._probed + self._steps
        ago = steps_ago(table)
        importance, measured_at = list(old), list(self._measured_at)
        for layer, new in measured.items():
            importance[layer] = new if math.isnan(old[layer]) else alpha * new + (1 - alpha) * old[layer]
            measured_at[layer] = now - (ago[layer] or 0)
        self._importance, self._measured_at = importance, measured_at
        self._window = Window(self._num_units)
        self._refreshes += 1

    def _level(self, measured: Mapping[int, float]) -> float:
        """How much the gradients of the measured layers have changed: the geometric mean of new over old."""
        pairs = [(new, self._importance[layer]) for layer, new in measured.items()]
        changes = [math.log(new) - math.log(old) for new, old in pairs if new > 0 and old > 0]
        return math.exp(math.fsum(changes) / len(changes)) if changes else 1.0

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
        if self.effective_layers is None:
            return self._softmax(m, value_at(self.temperature, self._steps))
        return self._softmax(m, self._temperature_for(m, value_at(self.effective_layers, self._steps)))

    def _softmax(self, m: Tensor, temperature: float) -> Tensor:
        log_p = torch.log_softmax(m / temperature, dim=0)
        if self.exploration:
            uniform = torch.full_like(log_p, math.log(self.exploration / len(log_p)))
            log_p = torch.logaddexp(log_p + math.log1p(-self.exploration), uniform) if self.exploration < 1 else uniform
        return log_p

    def _temperature_for(self, m: Tensor, effective_layers: float) -> float:
        """The temperature whose probabilities have that many effective layers, or as nearly as any has.

        The number grows with the temperature, from that of equally important layers at the top to that of all.
        """
        scale = float(m.max() - m.min()) or 1.0
        low, high = -OCTAVES, OCTAVES
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            log_p = self._softmax(m, scale * math.exp2(middle))
            entropy = -float((log_p.exp() * log_p).nansum())
            low, high = (low, middle) if math.exp(entropy) > effective_layers else (middle, high)
        return scale * math.exp2((low + high) / 2)

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """A period longer than the training; what measures, and what is done with it."""
        yield from super().without_effect(train_steps)
        if self.exploration == 1:
            yield "exploration=1: every draw is uniform, so what is measured, and the temperature, change nothing"
            return
        refreshed = self.refresh_period is not None and self.draw_steps(train_steps)[-1] >= self.refresh_period
        if self.refresh_period is not None and not refreshed:
            kept = "what probing measured, as in grass-static" if self.probing_steps else "uniform"
            yield (
                f"refresh_period={self.refresh_period}: nothing is drawn after a refresh before training ends after "
                f"{train_steps} steps, so the probabilities stay {kept}"
            )
        elif not refreshed and not self.probing_steps:
            yield (
                "refresh_period=null with probing_steps=0: nothing is ever measured, so every draw is uniform whatever "
                "the temperature"
            )
        if self.staleness != "none" and not refreshed:
            yield f"staleness={self.staleness}: it corrects at refreshes, and none comes before a draw"
        if self.probing_steps > train_steps:
            yield f"probing_steps={self.probing_steps}: more steps only measure than train ({train_steps})"

    def state_dict(self) -> dict[str, Any]:
        """Clocks, draw index, importance and the open window."""
        return super().state_dict() | {
            "probed": self._probed,
            "refreshes": self._refreshes,
            "importance": list(self._importance),
            "measured_at": list(self._measured_at),
            "window": self._window.state_dict(),
        }

    def _upgraded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if "window_sum" not in state:
            return dict(state)
        kept = {key: value for key, value in state.items() if key not in ("window_sum", "window_count")}
        window = window_of_sums(state["window_sum"], state["window_count"])
        return {**kept, "window": window, "measured_at": [None] * self._num_units}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._probed = int(state["probed"])
        self._refreshes = int(state["refreshes"])
        self._importance = [float(value) for value in state["importance"]]
        self._measured_at = list(state["measured_at"])
        self._window = Window.restore(self._num_units, state["window"])
