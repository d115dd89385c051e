"""Which layers train next: what a sampler is, and the ones that need no measurement.

A sampler has its own clock, moved by :meth:`Sampler.observe` once an optimizer step. It picks among *units*: decoder
layers for most methods, weight matrices or embeddings and head too for some. Whoever drives it asks::

    sampler.start(sizes)                # parameters of each unit
    sampler.probe(measure)              # extra passes, for the samplers that need them
    if sampler.probing:  ...            # this step only measures
    sampler.observe(norms)              # (units,) RMS gradients, NaN where frozen
    if sampler.due: active = sampler.sample()

Draws come from a private generator keyed by (seed, draw index): the same on every worker and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from grass_ray.layerwise.generators import keyed_generator
from grass_ray.layerwise.schedules import Scheduled, bounds_of, count_at


class Measure(Protocol):
    """Extra passes over the data that a sampler may ask for between two steps; nothing is trained by them."""

    def loss(self, scales: Mapping[int, float]) -> float:
        """Mean loss on the coming batch with the adapters of the given units scaled, others as they are."""

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        """Outlier score of every layer, calibrated on the batches of the first ``steps`` training steps."""


class Sampler(Protocol):
    """What an optimizer asks of a sampler.

    ``grad_norms`` says which gradients :meth:`observe` wants to hear of: none; each micro-batch's as it arrives,
    averaged; or the accumulated ones after clipping.
    """

    grad_norms: Literal["none", "arriving", "clipped"]
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

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters in a model of ``total``.

        Raises ValueError when the sampler cannot serve them.
        """

    def probe(self, measure: Measure) -> None:
        """Before a step: take extra measurements if it is time for them; may make a draw due."""

    def probabilities(self) -> tuple[float, ...] | None:
        """Probability of each unit to be the first drawn; None where nothing is drawn by chance."""

    def importance(self) -> tuple[float, ...] | None:
        """Importance of each unit, NaN where never measured; None for samplers without one."""

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set: distinct indices, ascending."""

    def observe(self, norms: Tensor) -> None:
        """Take note of one step's RMS gradients, shape (units,), NaN where frozen; advance the clock."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, in plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class AllLayersSampler:
    """Every layer, always: full fine-tuning and adapters."""

    grad_norms: Literal["none", "arriving", "clipped"] = "none"
    probing_steps = 0
    probing = False
    refreshes = 0

    def __init__(self) -> None:
        self._num_units = 0
        self._drawn = False

    @property
    def due(self) -> bool:
        """Whether the one and only active set is still to be drawn."""
        return not self._drawn

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with ``len(sizes)`` units."""
        self._num_units = len(sizes)

    def probe(self, measure: Measure) -> None:
        """Nothing is measured."""

    def probabilities(self) -> None:
        """Nothing is drawn."""

    def importance(self) -> None:
        """Nothing is measured."""

    def sample(self) -> tuple[int, ...]:
        """All units."""
        self._drawn = True
        return tuple(range(self._num_units))

    def observe(self, norms: Tensor) -> None:
        """Nothing to note."""

    def state_dict(self) -> dict[str, Any]:
        """Whether the set was drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._drawn = state["drawn"]


class PeriodicSampler:
    """The clock that samplers share: a draw of ``num_active_layers`` units every ``period`` steps.

    Both may be schedules over training; a period that changes counts from the draw it began with.

    Args:
        num_active_layers: gamma, units that train at a time.
        period: T_s, optimizer steps between draws.
        seed: of the private generator.

    Raises:
        ValueError: a setting is out of range.
    """

    grad_norms: Literal["none", "arriving", "clipped"] = "none"
    probing_steps = 0
    refreshes = 0

    def __init__(self, num_active_layers: Scheduled, period: Scheduled, *, seed: int) -> None:
        require(bounds_of(num_active_layers)[0] >= 1, "num_active_layers", num_active_layers, "at least 1")
        require(bounds_of(period)[0] >= 1, "period", period, "at least 1")
        self.num_active_layers = num_active_layers
        self.period = period
        self.seed = seed
        self._num_units = 0
        self._steps = 0
        self._draws = 0
        self._next_draw = 0

    @property
    def probing(self) -> bool:
        """Whether the next step only measures: never."""
        return False

    @property
    def due(self) -> bool:
        """Whether a period has ended (or nothing was drawn yet)."""
        return self._steps >= self._next_draw

    @property
    def now_active(self) -> int:
        """How many units train at this step (gamma)."""
        return count_at(self.num_active_layers, self._steps)

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters. Raises ValueError when fewer than ``num_active_layers``."""
        check_num_active_layers(self.num_active_layers, len(sizes))
        self._num_units = len(sizes)

    def probe(self, measure: Measure) -> None:
        """Nothing beyond the training passes is measured."""

    def importance(self) -> tuple[float, ...] | None:
        """Nothing is measured."""
        return None

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set."""
        active = self.pick()
        self._draws += 1
        self._next_draw = self._steps + count_at(self.period, self._steps)
        return active

    def pick(self) -> tuple[int, ...]:
        """The active set of draw number ``_draws``; what kinds of samplers differ in."""
        raise NotImplementedError

    def observe(self, norms: Tensor) -> None:
        """Advance the clock."""
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Clock and draw index."""
        return {"steps": self._steps, "draws": self._draws, "next_draw": self._next_draw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._steps = state["steps"]
        self._draws = state["draws"]
        self._next_draw = state["next_draw"]


class UniformSampler(PeriodicSampler):
    """LISA (arXiv 2403.17919): ``num_active_layers`` distinct layers, all equally likely, every ``period`` steps.

    Args:
        num_active_layers: gamma, layers that train at a time.
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


class CyclicSampler(PeriodicSampler):
    """Groups of neighbouring units one after another: LIFT, HiFT, BAdam.

    A group is ``num_active_layers`` neighbours (the last may be smaller). When every group had its turn the next
    cycle begins; in ``"random"`` order each cycle is a fresh permutation of the groups.

    Args:
        num_active_layers: units in a group.
        period: optimizer steps a group trains; None spreads one cycle over ``training_steps``.
        order: ``"ascending"`` from the input to the output, ``"descending"``, ``"random"`` (reshuffled every
            cycle), or ``"shuffled"`` (one permutation, the same in every cycle).
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

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with units of ``sizes`` parameters. Raises ValueError when fewer than ``num_active_layers``."""
        super().start(sizes, total)
        if self._spread is not None:
            # rounded up: the last groups get fewer steps rather than the first ones a second turn
            self.period = max(1, -(-self._spread // len(self._groups())))

    @property
    def cycle_steps(self) -> int:
        """Optimizer steps in which every group has one turn (at the period the training starts with)."""
        return len(self._groups()) * count_at(self.period, 0)

    def probabilities(self) -> None:
        """Nothing is drawn by chance."""

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
    return tuple(sorted(random_order(log_p, seed, draw)[:count]))


def random_order(log_p: Tensor, seed: int, draw: int) -> list[int]:
    """All indices in the order in which drawing without replacement finds them (see the function above)."""
    uniform = torch.rand(len(log_p), dtype=torch.float64, generator=keyed_generator("draw", seed, draw)).clamp_(
        min=1e-300
    )
    order: list[int] = torch.topk(log_p - (-uniform.log()).log(), len(log_p)).indices.tolist()
    return order


def check_num_active_layers(num_active_layers: Scheduled, num_layers: int) -> None:
    """Raise ValueError when more layers are asked for than there are."""
    most = bounds_of(num_active_layers)[1]
    if most > num_layers:
        raise ValueError(
            f"num_active_layers (gamma) is {most:g}, but the model has {num_layers} decoder layers; "
            f"choose 1 to {num_layers}"
        )


def require(condition: bool, name: str, given: object, rule: str) -> None:
    """Raise ValueError that names the setting, what was given and the rule."""
    if not condition:
        raise ValueError(f"{name} is {given!r}; it must be {rule}")
