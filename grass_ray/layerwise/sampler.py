"""What a sampler is: it decides which layers train, and when that changes.

A sampler has its own clock, advanced by :meth:`Sampler.observe` once per optimizer step. It picks among *units*:
decoder layers for most methods, weight matrices or embeddings and head for some. The optimizer drives it::

    sampler.start(sizes)                # number of parameters of each unit
    sampler.probe(measure)              # extra passes, for samplers that need them
    if sampler.probing:  ...            # this step only measures
    sampler.observe(norms)              # (units,) RMS gradients, NaN where frozen
    if sampler.due: active = sampler.sample()
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor


class Measure(Protocol):
    """Extra passes over the data that a sampler may ask for between two steps; they train nothing."""

    def loss(self, scales: Mapping[int, float]) -> float:
        """Mean loss on the next batch with the adapters of the given units scaled, others unchanged."""

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        """Outlier score of every layer, calibrated on the batches of the first ``steps`` training steps."""


class Sampler:
    """Base class of all samplers. By default it measures nothing, and has no probabilities and no importance.

    A subclass defines :attr:`due`, :meth:`sample` and :meth:`largest_active_sets`;
    :class:`~grass_ray.layerwise.periodic.PeriodicSampler` defines the first two for samplers that draw once per period.
    To be resumable it extends :meth:`state_dict` and :meth:`_restore`.

    Attributes:
        grad_norms: which gradients :meth:`observe` receives: ``"none"``; ``"arriving"``, the mean over the
            micro-batches of each one's norms; or ``"clipped"``, those of the accumulated and clipped gradients.
        trains_all: every unit trains at every step, so nothing is ever frozen or moved.
        probing_steps: steps before training that only measure.
        PER_UNIT: keys of the saved state that hold one value per unit.
    """

    grad_norms: Literal["none", "arriving", "clipped"] = "none"
    trains_all: ClassVar[bool] = False
    PER_UNIT: ClassVar[tuple[str, ...]] = ()
    probing_steps: int = 0
    _num_units: int = 0

    @property
    def lr_cycle_steps(self) -> int:
        """Optimizer steps within which a learning-rate schedule should keep its value."""
        return 1

    @property
    def probing(self) -> bool:
        """Whether the next step only measures, without an update."""
        return False

    @property
    def due(self) -> bool:
        """Whether a new active set must be drawn before the next step."""
        raise NotImplementedError

    @property
    def refreshes(self) -> int:
        """How often the probabilities were computed from measurements so far."""
        return 0

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin anew with the given units.

        Args:
            sizes: number of parameters of each unit.
            total: number of parameters of the model; None takes the sum of ``sizes``.

        Raises:
            ValueError: the sampler's settings do not fit these units.
        """
        self._num_units = len(sizes)

    def probe(self, measure: Measure) -> None:
        """Take extra measurements before a step, if it is time for them; may make a draw due."""

    def probabilities(self) -> tuple[float, ...] | None:
        """Probability of each unit to be drawn first; None if nothing is drawn at random."""
        return None

    def importance(self) -> tuple[float, ...] | None:
        """Importance of each unit, NaN where never measured; None for samplers without one."""
        return None

    def ages(self) -> tuple[float, ...] | None:
        """Steps since each unit's importance was last measured, NaN where never; None for samplers without one."""
        return None

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """The heaviest active set that may be drawn, and the heaviest one with unit 0.

        This decides ``offload="auto"`` and the prediction of memory.

        Args:
            weights: of each unit, for example the bytes of its optimizer states.

        Returns:
            One or two active sets.
        """
        raise NotImplementedError

    def sample(self) -> tuple[int, ...]:
        """Draw the next active set: distinct indices of units, ascending."""
        raise NotImplementedError

    def observe(self, norms: Tensor) -> None:
        """Take the RMS gradients of one step, and advance the clock.

        Args:
            norms: shape (units,), NaN where a unit was frozen.
        """

    def without_effect(self, train_steps: int) -> Iterator[str]:
        """Settings that change nothing in a training of ``train_steps`` steps, as ``"setting=value: reason"``."""
        yield from ()

    # ---------------------------------------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, in plain JSON values."""
        return {"sampler": type(self).__name__, "units": self._num_units}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            ValueError: the state is not one of this sampler's. Nothing has changed then.
        """
        vars(self).update(vars(self._restored(state)))

    def _restored(self, state: Mapping[str, Any]) -> Self:
        """A copy of this sampler that resumes from ``state``."""
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
        """A state that an earlier version saved, in the form of this version."""
        return dict(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state that fits. Assigns new values only, and never changes the old ones in place."""


def age_since(measured_at: Sequence[int | None], now: int) -> tuple[float, ...]:
    """Steps from each unit's last measurement to step ``now``, NaN where there was none."""
    return tuple(math.nan if at is None else float(now - at) for at in measured_at)


def require(condition: bool, name: str, given: object, rule: str) -> None:
    """Raise ValueError that names the setting, what was given and the rule."""
    if not condition:
        raise ValueError(f"{name} is {given!r}; it must be {rule}")


def check_complete(sampler: object) -> None:
    """Raise TypeError if ``sampler`` neither derives from :class:`Sampler` nor has all that one has."""
    if isinstance(sampler, Sampler):
        return
    public = [name for name in (*vars(Sampler), *Sampler.__annotations__) if not name.startswith("_")]
    missing = [name for name in dict.fromkeys(public) if not hasattr(sampler, name)]
    if missing:
        raise TypeError(
            f"{type(sampler).__name__} is no sampler: it lacks {', '.join(missing)}; derive it from "
            "grass_ray.layerwise.sampler.Sampler, which has them all"
        )
