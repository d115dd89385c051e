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

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

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
        """Begin with units of ``sizes`` parameters in a model of ``total``, whatever this sampler did before.

        Raises ValueError when the sampler cannot serve them.
        """

    def probe(self, measure: Measure) -> None:
        """Before a step: take extra measurements if it is time for them; may make a draw due."""

    def probabilities(self) -> tuple[float, ...] | None:
        """Probability of each unit to be the first drawn; None where nothing is drawn by chance."""

    def importance(self) -> tuple[float, ...] | None:
        """Importance of each unit, NaN where never measured; None for samplers without one."""

    def ages(self) -> tuple[float, ...] | None:
        """Steps since each unit's importance was last measured, NaN where never; None for samplers without one."""

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """The active sets among which are the heaviest one and the heaviest one with unit 0.

        Args:
            weights: of the units, the bytes of their states for example.
        """

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set: distinct indices, ascending."""

    def observe(self, norms: Tensor) -> None:
        """Take note of one step's RMS gradients, shape (units,), NaN where frozen; advance the clock."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, in plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises ValueError, with nothing changed, when the state is not one of this sampler's.
        """


class Resumable:
    """Saving and loading as all samplers of this package do it: a state that does not fit changes nothing.

    A class names in ``PER_UNIT`` the keys of its state that have one value a unit, and says in :meth:`_restore` how it
    goes on from a state that was found to fit.
    """

    PER_UNIT: tuple[str, ...] = ()
    _num_units = 0

    def state_dict(self) -> dict[str, Any]:
        """Whose state it is, and for how many units."""
        return {"sampler": type(self).__name__, "units": self._num_units}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError when ``state`` is not one that :meth:`load_state_dict` can go on from."""
        self._restored(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises ValueError, with nothing changed, when the state does not fit."""
        vars(self).update(vars(self._restored(state)))

    def _restored(self, state: Mapping[str, Any]) -> Self:
        """A copy of this sampler that goes on from ``state``."""
        name = type(self).__name__
        # earlier versions saved neither the name nor the number of units
        saved = state.get("sampler", name)
        if saved != name:
            raise ValueError(
                f"the saved state is of a {saved}, this sampler is a {name}; give the optimizer the sampler that the "
                "state was saved with"
            )
        state = {"sampler": name, "units": self._num_units, **self._upgraded(state)}
        if wrong := sorted(state.keys() ^ self.state_dict().keys()):
            raise ValueError(f"the saved state is not one of a {name}: {', '.join(wrong)} missing or unknown")
        try:
            numbers = {state["units"], *(len(state[key]) for key in self.PER_UNIT)}
            if numbers != {self._num_units}:
                found = next(iter(numbers - {self._num_units}))
                raise ValueError(f"the saved state is of {found} units, this model has {self._num_units}")
            restored = copy.copy(self)
            restored._restore(state)
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"the saved state of this {name} is damaged: {error}") from error
        return restored

    def _upgraded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of an earlier version as this one would have saved it."""
        return dict(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state that fits. Only gives attributes new values, never changes what they hold."""


class AllLayersSampler(Resumable):
    """Every layer, always: full fine-tuning and adapters."""

    grad_norms: Literal["none", "arriving", "clipped"] = "none"
    probing_steps = 0
    probing = False
    refreshes = 0

    def __init__(self) -> None:
        self._drawn = False

    @property
    def due(self) -> bool:
        """Whether the one and only active set is still to be drawn."""
        return not self._drawn

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with ``len(sizes)`` units."""
        self._num_units = len(sizes)
        self._drawn = False

    def probe(self, measure: Measure) -> None:
        """Nothing is measured."""

    def probabilities(self) -> None:
        """Nothing is drawn."""

    def importance(self) -> None:
        """Nothing is measured."""

    def ages(self) -> None:
        """Nothing is measured."""

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """All units."""
        return [tuple(range(len(weights)))]

    def sample(self) -> tuple[int, ...]:
        """All units."""
        self._drawn = True
        return tuple(range(self._num_units))

    def observe(self, norms: Tensor) -> None:
        """Nothing to note."""

    def state_dict(self) -> dict[str, Any]:
        """Whether the set was drawn."""
        return super().state_dict() | {"drawn": self._drawn}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._drawn = bool(state["drawn"])


class PeriodicSampler(Resumable):
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
        self._steps = self._draws = self._next_draw = 0

    def probe(self, measure: Measure) -> None:
        """Nothing beyond the training passes is measured."""

    def importance(self) -> tuple[float, ...] | None:
        """Nothing is measured."""
        return None

    def ages(self) -> tuple[float, ...] | None:
        """Nothing is measured."""
        return None

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """Of the most units that are ever active together the heaviest, and the heaviest with unit 0."""
        return heaviest_sets(weights, count_at(bounds_of(self.num_active_layers)[1], 0))

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
        clock = {"steps": self._steps, "draws": self._draws, "next_draw": self._next_draw}
        return super().state_dict() | clock

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        self._draws = int(state["draws"])
        self._next_draw = int(state["next_draw"])


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


def heaviest_sets(weights: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Of the sets of ``count`` units the heaviest, and where it is lighter the heaviest one with unit 0.

    Of equally heavy units the highest are taken: their gradients are there first, while most activations still are.
    """
    by_weight = sorted(range(len(weights)), key=lambda unit: (weights[unit], unit), reverse=True)
    with_first = (0, *[unit for unit in by_weight if unit][: count - 1])
    return distinct_sets(weights, with_first, by_weight[:count])


def distinct_sets(weights: Sequence[int], with_first: Sequence[int], heaviest: Sequence[int]) -> list[tuple[int, ...]]:
    """Both sets in ascending order, or only the first one where the second is no heavier."""
    first, second = tuple(sorted(with_first)), tuple(sorted(heaviest))
    more = sum(weights[unit] for unit in second) > sum(weights[unit] for unit in first)
    return [first, second] if more else [first]


def age_since(measured_at: Sequence[int | None], now: int) -> tuple[float, ...]:
    """Steps from each unit's last measurement to step ``now``, NaN where there was none."""
    return tuple(math.nan if at is None else float(now - at) for at in measured_at)


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
