"""Which layers train: one configuration per sampler of :mod:`grass_ray.layerwise`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from grass_ray.config.base import (
    ConfigPart,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from grass_ray.config.schedules import ScheduledCount, ScheduledFloat, ScheduledFraction, ScheduledLayers


class AllLayersConfig(ConfigPart):
    """Trains every layer at every step."""

    kind: Literal["all"] = "all"


class UniformSamplerConfig(ConfigPart):
    """LISA (arXiv 2403.17919): samples layers uniformly without replacement."""

    kind: Literal["uniform"] = "uniform"
    num_active_layers: ScheduledCount = 2
    """Number of layers trained at a time (gamma)."""
    period: ScheduledCount = 20
    """Number of optimizer steps between draws (K)."""


class GradNormSamplerConfig(ConfigPart):
    """GRASS (arXiv 2604.07808): samples layers from a softmax over their mean gradient norms."""

    kind: Literal["grad_norm"] = "grad_norm"
    num_active_layers: ScheduledCount = 2
    """Number of layers trained at a time (gamma)."""
    period: ScheduledCount = 20
    """Number of optimizer steps between draws (T_s)."""
    probing_steps: NonNegativeInt = 10
    """Number of steps before training that only measure gradient norms (T_p)."""
    refresh_period: PositiveInt | None = 100
    """Number of optimizer steps between updates of the importance (T_u). ``null`` never updates it (static GRASS)."""
    temperature: ScheduledFloat | None = 0.5
    """Temperature of the softmax (tau). Set it to ``null`` if ``effective_layers`` is given."""
    ema: ScheduledFraction = 0.5
    """Weight of the new measurement in the moving average of the importance (alpha)."""
    normalise: Literal["mean", "none"] = "mean"
    """``mean`` divides the importance by its mean over layers, so that a temperature means the same for every model;
    ``none`` uses the published formula."""
    exploration: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of a uniform distribution mixed into the probabilities (epsilon). Not part of the paper."""
    staleness: Literal["none", "level"] = "none"
    """How old measurements are corrected at a refresh: ``none`` leaves them as they are; ``level`` scales them by how
    much the gradient norms of recently trained layers have changed. Not part of the paper."""
    effective_layers: ScheduledLayers | None = None
    """Exponential of the entropy of the probabilities, used to choose the temperature at every draw. Not part of the
    paper."""

    @model_validator(mode="after")
    def _temperature_or_effective_layers(self) -> Self:
        if (self.temperature is None) == (self.effective_layers is None):
            given = "both are null" if self.temperature is None else "both are given"
            raise ValueError(
                f"temperature and effective_layers say the same in two ways, and {given}; set one of them to null"
            )
        return self


class OutlierSamplerConfig(ConfigPart):
    """OWS (Findings of ACL 2025): samples layers in proportion to their fraction of outlier weights."""

    kind: Literal["outlier"] = "outlier"
    num_active_layers: ScheduledCount = 5
    """Number of layers trained at a time (gamma)."""
    period: ScheduledCount = 50
    """Number of optimizer steps between draws."""
    threshold: PositiveFloat = 13.0
    """How many times the mean saliency of its layer a weight must exceed to be an outlier (M)."""
    calibration_steps: PositiveInt = 4
    """Number of training steps whose batches are used to measure the outliers."""


class CyclicSamplerConfig(ConfigPart):
    """LIFT, HiFT and BAdam: trains groups of neighbouring units in turn."""

    kind: Literal["cyclic"] = "cyclic"
    num_active_layers: PositiveInt = 1
    """Number of units in a group."""
    period: ScheduledCount | None = 50
    """Number of optimizer steps for which a group trains. ``null`` spreads one cycle over the whole training."""
    order: Literal["ascending", "descending", "random", "shuffled"] = "ascending"
    """Order of the groups: from the first layer to the last, the reverse, a new random order in every cycle
    (``random``), or one random order for all cycles (``shuffled``)."""
    hold_lr: bool = False
    """Whether the learning rate stays the same within a cycle, as in HiFT."""


class RewardSamplerConfig(ConfigPart):
    """IST (Findings of EMNLP 2024): samples layers by an importance learned from damped forward passes. Needs LoRA."""

    kind: Literal["reward"] = "reward"
    share: Fraction = 0.25
    """Fraction of the layers trained at a time, rounded down to at least one layer."""
    period: ScheduledCount = 1
    """Number of optimizer steps between draws."""
    refresh_period: PositiveInt = 10
    """Number of optimizer steps between updates of the importance."""
    trials: Annotated[int, Field(ge=2)] = 3
    """Number of damped forward passes per update."""
    damped_share: Fraction = 0.5
    """Fraction of the layers damped in each forward pass, rounded down to at least one layer."""
    damping: NonNegativeFloat = 0.25
    """Factor applied to the adapters of a damped layer."""
    learning_rate: PositiveFloat = 10.0
    """Learning rate of the importance."""


class MatrixNormSamplerConfig(ConfigPart):
    """MISA (arXiv 2511.00056): samples weight matrices by gradient norm until a budget of parameters is used up."""

    kind: Literal["matrix_norm"] = "matrix_norm"
    budget: Fraction = 0.03
    """Fraction of the model's parameters that may train at a time (delta)."""
    period: ScheduledCount = 50
    """Number of optimizer steps between draws."""
    eta: PositiveFloat = 1.0
    """Weight of the squared gradient norm in the exponent of the probabilities (eta)."""
    beta: Decay = 0.8
    """Weight of the old value in the moving average of a matrix's gradient norm (beta)."""
    forced: NonNegativeInt = 2
    """Number of least recently trained matrices that are selected before any are drawn."""


SamplerConfig = Annotated[
    AllLayersConfig
    | UniformSamplerConfig
    | GradNormSamplerConfig
    | OutlierSamplerConfig
    | CyclicSamplerConfig
    | RewardSamplerConfig
    | MatrixNormSamplerConfig,
    Field(discriminator="kind"),
]
