"""Which layers train next: every layer, a uniform draw (LISA), or a draw by mean gradient norm (GRASS).

A sampler has its own clock, moved by :meth:`observe` once an optimizer step. Whoever drives it asks three questions::

    sampler.start(num_layers)
    if sampler.probing:  ...            # this step only measures
    sampler.observe(norms)              # (L,) RMS gradients, NaN where frozen
    if sampler.due: active = sampler.sample()

Draws come from a private generator keyed by (seed, draw index): the same on every worker and after a resume.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from grass_ray.layerwise.generators import keyed_generator


class Sampler(Protocol):
    """What an optimizer asks of a sampler."""

    needs_grad_norms: bool
    probing_steps: int

    @property
    def probing(self) -> bool:
        """Whether the next step only measures (no update)."""

    @property
    def due(self) -> bool:
        """Whether a new active set must be drawn before the next step."""

    @property
    def refreshes(self) -> int:
        """How often the probabilities were computed from measurements so far."""

    def start(self, num_layers: int) -> None:
        """Begin with ``num_layers`` layers. Raises ValueError when the sampler cannot serve them."""

    def probabilities(self) -> tuple[float, ...] | None:
        """Probability of each layer to be the first drawn; None where nothing is drawn."""

    def importance(self) -> tuple[float, ...] | None:
        """Importance of each layer, NaN where never measured; None for samplers without one."""

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set: distinct layer indices, ascending."""

    def observe(self, norms: Tensor) -> None:
        """Take note of one step's RMS gradients, shape (L,), NaN where a layer was frozen; advance the clock."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, in plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class AllLayersSampler:
    """Every layer, always: full fine-tuning and adapters."""

    needs_grad_norms = False
    probing_steps = 0
    probing = False
    refreshes = 0

    def __init__(self) -> None:
        self._num_layers = 0
        self._drawn = False

    @property
    def due(self) -> bool:
        """Whether the one and only active set is still to be drawn."""
        return not self._drawn

    def start(self, num_layers: int) -> None:
        """Begin with ``num_layers`` layers."""
        self._num_layers = num_layers

    def probabilities(self) -> None:
        """Nothing is drawn."""

    def importance(self) -> None:
        """Nothing is measured."""

    def sample(self) -> tuple[int, ...]:
        """All layers."""
        self._drawn = True
        return tuple(range(self._num_layers))

    def observe(self, norms: Tensor) -> None:
        """Nothing to note."""

    def state_dict(self) -> dict[str, Any]:
        """Whether the set was drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._drawn = state["drawn"]


class UniformSampler:
    """LISA (arXiv 2403.17919): ``num_active_layers`` distinct layers, all equally likely, every ``period`` steps.

    Args:
        num_active_layers: gamma, layers that train at a time.
        period: optimizer steps between draws.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    needs_grad_norms = False
    probing_steps = 0
    probing = False
    refreshes = 0

    def __init__(self, num_active_layers: int = 2, period: int = 20, *, seed: int = 0) -> None:
        _require(num_active_layers >= 1, "num_active_layers", num_active_layers, "at least 1")
        _require(period >= 1, "period", period, "at least 1")
        self.num_active_layers = num_active_layers
        self.period = period
        self.seed = seed
        self._num_layers = 0
        self._steps = 0
        self._draws = 0

    @property
    def due(self) -> bool:
        """Whether a period has ended (or nothing was drawn yet)."""
        return self._draws <= self._steps // self.period

    def start(self, num_layers: int) -> None:
        """Begin with ``num_layers`` layers. Raises ValueError when fewer than ``num_active_layers``."""
        check_num_active_layers(self.num_active_layers, num_layers)
        self._num_layers = num_layers

    def probabilities(self) -> tuple[float, ...]:
        """1 / L for every layer."""
        return (1.0 / self._num_layers,) * self._num_layers

    def importance(self) -> None:
        """Nothing is measured."""

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set."""
        active = draw_without_replacement(
            torch.zeros(self._num_layers, dtype=torch.float64), self.num_active_layers, self.seed, self._draws
        )
        self._draws += 1
        return active

    def observe(self, norms: Tensor) -> None:
        """Advance the clock."""
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Clock and draw index."""
        return {"steps": self._steps, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._steps = state["steps"]
        self._draws = state["draws"]


class GradNormSampler:
    """GRASS (arXiv 2604.07808): layers drawn from a softmax over their mean gradient norms.

    The first ``probing_steps`` steps only measure. Then ``num_active_layers`` distinct layers are drawn every
    ``period`` steps; every ``refresh_period`` steps the importance of the layers that were active since the last
    refresh moves towards what was measured, ``m <- ema * new + (1 - ema) * m``, and the probabilities follow. A
    layer that was never measured counts as an average one.

    The paper gives no values; these defaults are this project's.

    Args:
        num_active_layers: gamma, layers that train at a time.
        period: T_s, optimizer steps between draws.
        probing_steps: T_p, steps before training that only measure.
        refresh_period: T_u, optimizer steps between refreshes; None never refreshes (static GRASS).
        temperature: tau of the softmax.
        ema: alpha, the weight of the new value at a refresh.
        normalise: ``"mean"`` divides the importance by its mean over layers before the softmax, so that tau means
            the same for every model; ``"none"`` is the formula as printed.
        exploration: epsilon, the share of a uniform draw mixed into the probabilities.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    needs_grad_norms = True

    def __init__(
        self,
        num_active_layers: int = 2,
        period: int = 20,
        *,
        probing_steps: int = 10,
        refresh_period: int | None = 100,
        temperature: float = 0.5,
        ema: float = 0.5,
        normalise: Literal["mean", "none"] = "mean",
        exploration: float = 0.0,
        seed: int = 0,
    ) -> None:
        _require(num_active_layers >= 1, "num_active_layers", num_active_layers, "at least 1")
        _require(period >= 1, "period", period, "at least 1")
        _require(probing_steps >= 0, "probing_steps", probing_steps, "at least 0")
        _require(refresh_period is None or refresh_period >= 1, "refresh_period", refresh_period, "at least 1 or None")
        _require(temperature > 0, "temperature", temperature, "above 0")
        _require(0 < ema <= 1, "ema", ema, "above 0 and at most 1")
        _require(normalise in ("mean", "none"), "normalise", normalise, "'mean' or 'none'")
        _require(0 <= exploration <= 1, "exploration", exploration, "between 0 and 1")
        self.num_active_layers = num_active_layers
        self.period = period
        self.probing_steps = probing_steps
        self.refresh_period = refresh_period
        self.temperature = temperature
        self.ema = ema
        self.normalise = normalise
        self.exploration = exploration
        self.seed = seed
        self._probed = 0
        self._steps = 0
        self._draws = 0
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
        return not self.probing and self._draws <= self._steps // self.period

    @property
    def refreshes(self) -> int:
        """How often the probabilities were computed from measurements, the end of probing included."""
        return self._refreshes

    def start(self, num_layers: int) -> None:
        """Begin with ``num_layers`` layers. Raises ValueError when fewer than ``num_active_layers``."""
        check_num_active_layers(self.num_active_layers, num_layers)
        self._importance = [math.nan] * num_layers

    def probabilities(self) -> tuple[float, ...]:
        """Probability of each layer to be drawn first; uniform until something was measured."""
        return tuple(self._log_probabilities().exp().tolist())

    def importance(self) -> tuple[float, ...]:
        """Mean gradient norm of each layer, not normalised; NaN where never measured."""
        return tuple(self._importance)

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set."""
        active = draw_without_replacement(self._log_probabilities(), self.num_active_layers, self.seed, self._draws)
        self._draws += 1
        return active

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
        self._steps += 1
        if self.refresh_period is not None and self._steps % self.refresh_period == 0:
            self._refresh()

    def _refresh(self) -> None:
        """Move the importance of every layer measured in the window towards its mean there; clear the window."""
        assert self._window_sum is not None
        assert self._window_count is not None
        sums, counts = self._window_sum.tolist(), self._window_count.tolist()
        for layer, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                new, old = total / count, self._importance[layer]
                self._importance[layer] = new if math.isnan(old) else self.ema * new + (1 - self.ema) * old
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
        log_p = torch.log_softmax(m / self.temperature, dim=0)
        if self.exploration:
            uniform = torch.full_like(log_p, math.log(self.exploration / len(log_p)))
            log_p = torch.logaddexp(log_p + math.log1p(-self.exploration), uniform) if self.exploration < 1 else uniform
        return log_p

    def state_dict(self) -> dict[str, Any]:
        """Clocks, draw index, importance and the open window."""
        return {
            "probed": self._probed,
            "steps": self._steps,
            "draws": self._draws,
            "refreshes": self._refreshes,
            "importance": list(self._importance),
            "window_sum": None if self._window_sum is None else self._window_sum.tolist(),
            "window_count": None if self._window_count is None else self._window_count.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._probed = state["probed"]
        self._steps = state["steps"]
        self._draws = state["draws"]
        self._refreshes = state["refreshes"]
        self._importance = list(state["importance"])
        self._window_sum = None if state["window_sum"] is None else torch.tensor(state["window_sum"])
        self._window_count = None if state["window_count"] is None else torch.tensor(state["window_count"])


def draw_without_replacement(log_p: Tensor, count: int, seed: int, draw: int) -> tuple[int, ...]:
    """Draw ``count`` distinct indices, one after another, each in proportion to what is left.

    Adding Gumbel noise to log-probabilities and taking the largest is the same distribution as drawing in sequence,
    and stays right where a probability is too small for a float.

    Args:
        log_p: float64 log-probabilities, shape (L,).
        count: how many to draw, at most L.
        seed: of the generator.
        draw: index of this draw; (seed, draw) decides the result.

    Returns:
        Ascending indices.
    """
    uniform = torch.rand(len(log_p), dtype=torch.float64, generator=keyed_generator("draw", seed, draw)).clamp_(
        min=1e-300
    )
    return tuple(sorted(torch.topk(log_p - (-uniform.log()).log(), count).indices.tolist()))


def check_num_active_layers(num_active_layers: int, num_layers: int) -> None:
    """Raise ValueError when more layers are asked for than there are."""
    if num_active_layers > num_layers:
        raise ValueError(
            f"num_active_layers (gamma) is {num_active_layers}, but the model has {num_layers} decoder layers; "
            f"choose 1 to {num_layers}"
        )


def _require(condition: bool, name: str, given: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {given!r}; it must be {rule}")
