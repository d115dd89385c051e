"""Settings that may change during training: a number, or a schedule over the optimizer steps."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from grass_ray.config.base import BuildablePart, ConfigPart, Fraction, NonZeroFloat, PositiveFloat, PositiveInt


class ScheduleConfig(BuildablePart):
    """Base class of the schedules. A subclass has the key ``steps``, its length in optimizer steps."""

    @property
    def length(self) -> int | None:
        """The length in optimizer steps; None for the whole training."""
        steps: int | None = dict(self)["steps"]
        return steps

    def build(self, train_steps: int) -> Any:
        """Build the :class:`~grass_ray.layerwise.schedules.Schedule` for a training of ``train_steps`` steps."""
        return self.make(steps=self.length or max(train_steps, 1))


class _RampConfig(ScheduleConfig):
    """A schedule from one value to another."""

    kind: str
    start: PositiveFloat
    """Value at the first optimizer step."""
    end: PositiveFloat
    """Value after ``steps`` optimizer steps, and from then on."""
    steps: PositiveInt | None = None
    """Length of the schedule in optimizer steps. Defaults to the whole training."""


class LinearScheduleConfig(_RampConfig):
    """Changes from ``start`` to ``end`` in equal steps."""

    builds: ClassVar[str] = "grass_ray.layerwise.schedules.Linear"
    kind: Literal["linear"]


class CosineScheduleConfig(_RampConfig):
    """Changes from ``start`` to ``end`` along half a cosine."""

    builds: ClassVar[str] = "grass_ray.layerwise.schedules.Cosine"
    kind: Literal["cosine"]


class StepScheduleConfig(ScheduleConfig):
    """Takes each of ``values`` in turn."""

    builds: ClassVar[str] = "grass_ray.layerwise.schedules.Step"
    kind: Literal["step"]
    values: tuple[PositiveFloat, ...]
    """The values, in order."""
    at_progress: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    """When each value after the first begins, as a fraction of ``steps``; ascending, one fewer than ``values``."""
    steps: PositiveInt | None = None
    """Length of the schedule in optimizer steps. Defaults to the whole training."""

    @model_validator(mode="after")
    def _boundaries_separate_values(self) -> Self:
        if len(self.at_progress) != len(self.values) - 1 or list(self.at_progress) != sorted(set(self.at_progress)):
            raise ValueError(
                f"{len(self.values)} values need {len(self.values) - 1} ascending boundaries in at_progress"
            )
        return self


AnyScheduleConfig = Annotated[
    LinearScheduleConfig | CosineScheduleConfig | StepScheduleConfig, Field(discriminator="kind")
]


def _number_or_schedule(value: object) -> str:
    return "schedule" if isinstance(value, dict | ConfigPart) else "number"


_Schedule = Annotated[AnyScheduleConfig, Tag("schedule")]
_Choose = Discriminator(_number_or_schedule)
ScheduledCount = Annotated[Annotated[PositiveInt, Tag("number")] | _Schedule, _Choose]
ScheduledTemperature = Annotated[Annotated[NonZeroFloat, Tag("number")] | _Schedule, _Choose]
ScheduledFraction = Annotated[Annotated[Fraction, Tag("number")] | _Schedule, _Choose]
ScheduledLayers = Annotated[Annotated[Annotated[float, Field(ge=1)], Tag("number")] | _Schedule, _Choose]
