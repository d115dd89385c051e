"""Which layers train: one configuration per sampler of :mod:`grass_ray.layerwise`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from grass_ray.config.adapters import AdapterConfig, LoraConfig
from grass_ray.config.base import (
    BuildablePart,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from grass_ray.config.imported import ImportedPart
from grass_ray.config.schedules import (
    ScheduleConfig,
    ScheduledCount,
    ScheduledFraction,
    ScheduledLayers,
    ScheduledTemperature,
)


class SamplerConfig(BuildablePart):
    """Base class of the samplers. A subclass names its ``kind``, its keys with their defaults, and what it builds."""

    trains_all: ClassVar[bool] = False
    """Whether every layer trains at every step."""
    in_turn: ClassVar[bool] = False
    """Whether units take turns, so that there is no probability of a draw."""
    measure: ClassVar[str] = "importance"
    """What its importance is, as figures label it."""

    kind: str

    def build(self, *, seed: int, train_steps: int) -> Any:
        """Build the :class:`~grass_ray.layerwise.sampler.Sampler`.

        Args:
            seed: of its draws.
            train_steps: length of the training, which schedules without a length span.

        Raises:
            ValueError: a setting is out of range.
        """
        schedules = {key: value.build(train_steps) for key, value in self if isinstance(value, ScheduleConfig)}
        return self.make(**schedules, **self.arguments(seed, train_steps))

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """Arguments of the sampler that are not keys."""
        return {"seed": seed}

    def mismatch(self, adapter: AdapterConfig | None, granularity: str) -> str | None:
        """Why the sampler cannot train a method with this adapter and granularity; None if it can."""
        return None


class AllLayersConfig(SamplerConfig):
    """Trains every layer at every step."""

    builds: ClassVar[str] = "grass_ray.layerwise.all_layers.AllLayersSampler"
    trains_all: ClassVar[bool] = True
    kind: Literal["all"] = "all"

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """None: nothing is drawn at random."""
        return {}


class UniformSamplerConfig(SamplerConfig):
    """LISA (arXiv 2403.17919): samples layers uniformly without replacement."""

    builds: ClassVar[str] = "grass_ray.layerwise.uniform.UniformSampler"
    kind: Literal["uniform"] = "uniform"
    num_active_layers: ScheduledCount = 2
    """Number of layers trained at a time (gamma)."""
    period: ScheduledCount = 20
    """Number of optimizer steps between draws (K)."""


class GradNormSamplerConfig(SamplerConfig):
    """GRASS (arXiv 2604.07808): samples layers from a softmax over their mean gradient norms."""

    builds: ClassVar[str] = "grass_ray.layerwise.grad_norm.GradNormSampler"
    measure: ClassVar[str] = "mean gradient norm (MGN)"
    kind: Literal["grad_norm"] = "grad_norm"
    num_active_layers: ScheduledCount = 2
    """Number of layers trained at a time (gamma)."""
    period: ScheduledCount = 20
    """Number of optimizer steps between draws (T_s)."""
    probing_steps: NonNegativeInt = 10
    """Number of steps before training that only measure gradient norms (T_p)."""
    refresh_period: PositiveInt | None = 100
    """Number of optimizer steps between updates of the importance (T_u). ``null`` never updates it (static GRASS)."""
    temperature: ScheduledTemperature | None = 0.5
    """Temperature of the softmax (tau). A negative one prefers layers of small importance. Set it to ``null`` if
    ``effective_layers`` is given."""
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


class OutlierSamplerConfig(SamplerConfig):
    """OWS (Findings of ACL 2025): samples layers in proportion to their fraction of outlier weights."""

    builds: ClassVar[str] = "grass_ray.layerwise.outliers.OutlierSampler"
    measure: ClassVar[str] = "outlier score"
    kind: Literal["outlier"] = "outlier"
    num_active_layers: ScheduledCount = 5
    """Number of layers trained at a time (gamma)."""
    period: ScheduledCount = 50
    """Number of optimizer steps between draws."""
    threshold: PositiveFloat = 13.0
    """How many times the mean saliency of its layer a weight must exceed to be an outlier (M)."""
    calibration_steps: PositiveInt = 4
    """Number of training steps whose batches are used to measure the outliers."""


class CyclicSamplerConfig(SamplerConfig):
    """LIFT, HiFT and BAdam: trains groups of neighbouring units in turn."""

    builds: ClassVar[str] = "grass_ray.layerwise.cyclic.CyclicSampler"
    in_turn: ClassVar[bool] = True
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

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """The length of the training too, for a period of ``null``."""
        return {"seed": seed, "training_steps": train_steps}


class RewardSamplerConfig(SamplerConfig):
    """IST (Findings of EMNLP 2024): samples layers by an importance learned from damped forward passes. Needs LoRA."""

    builds: ClassVar[str] = "grass_ray.layerwise.rewards.RewardSampler"
    measure: ClassVar[str] = "learnt importance"
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

    def mismatch(self, adapter: AdapterConfig | None, granularity: str) -> str | None:
        """Why the adapter does not fit: the sampler damps LoRA adapters."""
        if isinstance(adapter, LoraConfig):
            return None
        return "the reward sampler (IST) damps LoRA adapters; the method needs an adapter of kind lora"


class MatrixNormSamplerConfig(SamplerConfig):
    """MISA (arXiv 2511.00056): samples weight matrices by gradient norm until a budget of parameters is used up."""

    builds: ClassVar[str] = "grass_ray.layerwise.matrix_norm.MatrixNormSampler"
    measure: ClassVar[str] = "gradient norm, smoothed"
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

    def mismatch(self, adapter: AdapterConfig | None, granularity: str) -> str | None:
        """Why the granularity does not fit: the units are weight matrices."""
        if granularity == "matrix":
            return None
        return "the matrix_norm sampler (MISA) picks weight matrices; set granularity to matrix"


def _third_or_indices(value: object) -> str:
    return "third" if isinstance(value, str) else "indices"


_Third = Annotated[Literal["first", "middle", "last"], Tag("third")]
_Indices = Annotated[tuple[NonNegativeInt, ...], Tag("indices")]


class FixedSamplerConfig(SamplerConfig):
    """A control: trains the same layers throughout."""

    builds: ClassVar[str] = "grass_ray.layerwise.fixed.FixedSampler"
    in_turn: ClassVar[bool] = True
    kind: Literal["fixed"] = "fixed"
    layers: Annotated[_Third | _Indices, Discriminator(_third_or_indices)] = "middle"
    """Which layers train: the ``first``, ``middle`` or ``last`` third, or a list of indices from 0."""

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """None: nothing is drawn at random."""
        return {}


class ConvergingSamplerConfig(SamplerConfig):
    """GradES (arXiv 2509.01842): freezes each weight matrix for good when its gradients stand still."""

    builds: ClassVar[str] = "grass_ray.layerwise.converging.ConvergingSampler"
    in_turn: ClassVar[bool] = True
    measure: ClassVar[str] = "mean gradient norm"
    kind: Literal["converging"] = "converging"
    threshold: PositiveFloat = 0.05
    """Smallest relative change of the mean gradient norm with which a matrix trains on (tau)."""
    grace: Decay = 0.5
    """Fraction of the training in which nothing freezes (alpha)."""
    period: ScheduledCount = 10
    """Number of optimizer steps whose gradient norms are averaged and compared with those of the steps before."""

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """The length of the training too, of which ``grace`` is a fraction."""
        return {"seed": seed, "training_steps": train_steps}


class FrequencySamplerConfig(SamplerConfig):
    """AdaGradSelect (arXiv 2512.15764): samples layers by how often they trained, at first those of large gradients."""

    builds: ClassVar[str] = "grass_ray.layerwise.frequency.FrequencySampler"
    measure: ClassVar[str] = "mean gradient norm"
    kind: Literal["frequency"] = "frequency"
    num_active_layers: ScheduledCount = 2
    """Number of layers trained at a time (k)."""
    period: ScheduledCount = 20
    """Number of optimizer steps between draws."""
    probing_steps: PositiveInt = 10
    """Number of steps before training that only measure gradient norms."""
    refresh_period: PositiveInt | None = 100
    """Number of optimizer steps between updates of the gradient norms. ``null`` never updates them."""
    ema: ScheduledFraction = 0.5
    """Weight of the new measurement in the moving average of the gradient norms."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Probability that the first draw takes the layers of the largest gradient norm (epsilon)."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Factor of this probability from one draw to the next."""
    prior: PositiveFloat = 1.0
    """Added to the number of draws of each layer, as the parameter of the Dirichlet distribution."""


class ImportedSamplerConfig(SamplerConfig, ImportedPart):
    """A sampler of your own, from a method file."""

    base: ClassVar[str] = "grass_ray.layerwise.sampler.Sampler"
    needs: ClassVar[tuple[str, ...]] = ("due", "sample", "largest_active_sets")
    kind: Literal["import"] = "import"

    def build(self, *, seed: int, train_steps: int) -> Any:
        """Build the sampler; ``seed`` and ``training_steps`` are given to it if it takes them."""
        return self.build_with(train_steps, seed=seed, training_steps=train_steps)


AnySamplerConfig = Annotated[
    AllLayersConfig
    | UniformSamplerConfig
    | GradNormSamplerConfig
    | OutlierSamplerConfig
    | CyclicSamplerConfig
    | RewardSamplerConfig
    | MatrixNormSamplerConfig
    | FixedSamplerConfig
    | FrequencySamplerConfig
    | ConvergingSamplerConfig
    | ImportedSamplerConfig,
    Field(discriminator="kind"),
]


def sampler_config(kind: str) -> type[SamplerConfig]:
    """The configuration class of a kind; the base class for kinds that this version does not know."""
    known = {part.model_fields["kind"].default: part for part in SamplerConfig.__subclasses__()}
    return known.get(kind, SamplerConfig)
