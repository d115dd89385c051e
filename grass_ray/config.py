"""The configuration of one run: typed, frozen, extra keys forbidden.

A :class:`RunConfig` says everything that decides a run's numbers. YAML goes in and the same YAML comes out::

    config = RunConfig.from_yaml(path)
    config = config.override(["method.sampler.temperature=0.2", "training.steps=100"])
    config.save(folder / "config.yaml")

Importing this module loads no torch, so that command lines and planners stay instant.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal, Self

import pydantic_core
import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

# what a worker of several holds: the whole model, or shards of it (FSDP2); decides where a run fits, not its numbers
Parallel = Literal["replicate", "shard"]


class ConfigError(ValueError):
    """A user's mistake: what was given, the rule, what is available. Command lines exit with 2 on it."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[str]]:
    """A text file to write, in its place once it is whole: a full disk or a kill leaves what was there before."""
    part = Path(f"{path}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class ConfigPart(BaseModel):
    """A frozen piece of configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class BuildablePart(ConfigPart):
    """A part that describes one object: the fields are its constructor's arguments."""

    # import path of the object's class: importing it may load torch, so it is imported when the object is built
    builds: ClassVar[str]

    def make(self, **arguments: Any) -> Any:
        """Construct the object from this part's fields and ``arguments``; the latter take precedence."""
        module, _, name = self.builds.rpartition(".")
        fields = {key: value for key, value in self if key != "kind"}
        return getattr(import_module(module), name)(**fields | arguments)


# ------------------------------------------------------------------------------------------- settings that may change


class ScheduleConfig(BuildablePart):
    """A setting that changes over training."""

    def build(self, train_steps: int) -> Any:
        """The :class:`~grass_ray.layerwise.schedules.Schedule`; spans ``train_steps`` if ``steps`` is null."""
        return self.make(steps=dict(self)["steps"] or max(train_steps, 1))


class LinearScheduleConfig(ScheduleConfig):
    """From ``start`` to ``end`` in equal steps over ``steps`` optimizer steps; null spans the whole training."""

    builds: ClassVar[str] = "grass_ray.layerwise.schedules.Linear"
    kind: Literal["linear"]
    start: Annotated[float, Field(gt=0)]
    end: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)] | None = None


class CosineScheduleConfig(ScheduleConfig):
    """From ``start`` to ``end`` along half a cosine over ``steps`` optimizer steps; null spans the whole training."""

    builds: ClassVar[str] = "grass_ray.layerwise.schedules.Cosine"
    kind: Literal["cosine"]
    start: Annotated[float, Field(gt=0)]
    end: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)] | None = None


class StepScheduleConfig(ScheduleConfig):
    """``values`` one after another; ``at_progress`` are the shares of ``steps`` at which the next one begins."""

    builds: ClassVar[str] = "grass_ray.layerwise.schedules.Step"
    kind: Literal["step"]
    values: tuple[Annotated[float, Field(gt=0)], ...]
    at_progress: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    steps: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _boundaries_separate_values(self) -> Self:
        if len(self.at_progress) != len(self.values) - 1 or list(self.at_progress) != sorted(set(self.at_progress)):
            raise ValueError(
                f"{len(self.values)} values need {len(self.values) - 1} ascending boundaries in at_progress"
            )
        return self


AnySchedule = Annotated[LinearScheduleConfig | CosineScheduleConfig | StepScheduleConfig, Field(discriminator="kind")]


def _number_or_schedule(value: object) -> str:
    return "schedule" if isinstance(value, dict | ConfigPart) else "number"


Count = Annotated[
    Annotated[Annotated[int, Field(ge=1)], Tag("number")] | Annotated[AnySchedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
]
Positive = Annotated[
    Annotated[Annotated[float, Field(gt=0)], Tag("number")] | Annotated[AnySchedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
]
Share = Annotated[
    Annotated[Annotated[float, Field(gt=0, le=1)], Tag("number")] | Annotated[AnySchedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
]
Layers = Annotated[
    Annotated[Annotated[float, Field(ge=1)], Tag("number")] | Annotated[AnySchedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
]


# ----------------------------------------------------------------------------------------------- which layers train


class SamplerConfig(BuildablePart):
    """Which layers train, and when that changes."""

    trains_all: ClassVar[bool] = False

    def build(self, *, seed: int, train_steps: int) -> Any:
        """The :class:`~grass_ray.layerwise.sampler.Sampler`; schedules without a length span ``train_steps``.

        Raises:
            ValueError: a setting is out of range.
        """
        schedules = {key: value.build(train_steps) for key, value in self if isinstance(value, ScheduleConfig)}
        return self.make(**schedules, **self.arguments(seed, train_steps))

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """The constructor's arguments that are not fields."""
        return {"seed": seed}

    def mismatch(self, method: MethodConfig) -> str | None:
        """Why this sampler cannot serve ``method``; None if it can."""
        return None


class AllLayersConfig(SamplerConfig):
    """Every layer trains at every step."""

    builds: ClassVar[str] = "grass_ray.layerwise.all_layers.AllLayersSampler"
    trains_all: ClassVar[bool] = True
    kind: Literal["all"] = "all"

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """Nothing is drawn at random."""
        return {}


class UniformSamplerConfig(SamplerConfig):
    """LISA (arXiv 2403.17919): layers drawn uniformly without replacement."""

    builds: ClassVar[str] = "grass_ray.layerwise.uniform.UniformSampler"
    kind: Literal["uniform"] = "uniform"
    num_active_layers: Count = 2
    period: Count = Field(default=20, description="optimizer steps between draws")


class GradNormSamplerConfig(SamplerConfig):
    """GRASS (arXiv 2604.07808): layers drawn from a softmax over mean gradient norms."""

    builds: ClassVar[str] = "grass_ray.layerwise.grad_norm.GradNormSampler"
    kind: Literal["grad_norm"] = "grad_norm"
    num_active_layers: Count = Field(default=2, description="gamma")
    period: Count = Field(default=20, description="T_s, optimizer steps between draws")
    probing_steps: Annotated[int, Field(ge=0, description="T_p, steps that only measure")] = 10
    refresh_period: Annotated[int, Field(ge=1)] | None = Field(
        default=100, description="T_u, optimizer steps between refreshes of the importance; null never refreshes"
    )
    temperature: Positive | None = Field(default=0.5, description="tau; null where effective_layers is given")
    ema: Share = Field(default=0.5, description="alpha, the weight of the new value")
    normalise: Literal["mean", "none"] = "mean"
    exploration: Annotated[float, Field(ge=0, le=1, description="epsilon, share of a uniform draw")] = 0.0
    staleness: Literal["none", "level"] = Field(
        default="none", description="level brings old values to the level of the gradients at a refresh"
    )
    effective_layers: Layers | None = Field(
        default=None, description="exponential of the entropy of the probabilities, in place of the temperature"
    )

    @model_validator(mode="after")
    def _temperature_or_effective_layers(self) -> Self:
        if (self.temperature is None) == (self.effective_layers is None):
            given = "both are null" if self.temperature is None else "both are given"
            raise ValueError(
                f"temperature and effective_layers say the same in two ways, and {given}; set one of them to null"
            )
        return self


class OutlierSamplerConfig(SamplerConfig):
    """OWS (Findings of ACL 2025): layers drawn in proportion to their share of outlier weights."""

    builds: ClassVar[str] = "grass_ray.layerwise.outliers.OutlierSampler"
    kind: Literal["outlier"] = "outlier"
    num_active_layers: Count = 5
    period: Count = 50
    threshold: Annotated[float, Field(gt=0, description="M, times the mean that an outlier exceeds")] = 13.0
    calibration_steps: Annotated[int, Field(ge=1, description="steps whose batches calibrate")] = 4


class CyclicSamplerConfig(SamplerConfig):
    """LIFT, HiFT, BAdam: groups of neighbouring units one after another."""

    builds: ClassVar[str] = "grass_ray.layerwise.cyclic.CyclicSampler"
    kind: Literal["cyclic"] = "cyclic"
    num_active_layers: Annotated[int, Field(ge=1, description="units in a group")] = 1
    period: Count | None = Field(default=50, description="steps a group trains; null spreads one cycle over training")
    order: Literal["ascending", "descending", "random", "shuffled"] = "ascending"
    hold_lr: bool = Field(default=False, description="the learning rate stays the same within a cycle (HiFT)")

    def arguments(self, seed: int, train_steps: int) -> dict[str, Any]:
        """A period of null spreads one cycle over the training."""
        return {"seed": seed, "training_steps": train_steps}


class RewardSamplerConfig(SamplerConfig):
    """IST (EMNLP 2024): layers drawn by an importance learnt from damped forward passes; needs LoRA adapters."""

    builds: ClassVar[str] = "grass_ray.layerwise.rewards.RewardSampler"
    kind: Literal["reward"] = "reward"
    share: Annotated[float, Field(gt=0, le=1, description="of the layers that train at a time")] = 0.25
    period: Count = 1
    refresh_period: Annotated[int, Field(ge=1)] = 10
    trials: Annotated[int, Field(ge=2)] = 3
    damped_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    damping: Annotated[float, Field(ge=0)] = 0.25
    learning_rate: Annotated[float, Field(gt=0, description="of the importance")] = 10.0

    def mismatch(self, method: MethodConfig) -> str | None:
        """Its trials damp LoRA adapters."""
        if isinstance(method.adapter, LoraConfig):
            return None
        return "the reward sampler (IST) damps LoRA adapters; the method needs an adapter of kind lora"


class MatrixNormSamplerConfig(SamplerConfig):
    """MISA (arXiv 2511.00056): weight matrices drawn by gradient norm until a budget of parameters is full."""

    builds: ClassVar[str] = "grass_ray.layerwise.matrix_norm.MatrixNormSampler"
    kind: Literal["matrix_norm"] = "matrix_norm"
    budget: Annotated[float, Field(gt=0, le=1, description="share of the model's parameters")] = 0.03
    period: Count = 50
    eta: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.8
    forced: Annotated[int, Field(ge=0, description="least recently used matrices that come first")] = 2

    def mismatch(self, method: MethodConfig) -> str | None:
        """Its units are weight matrices."""
        if method.granularity == "matrix":
            return None
        return "the matrix_norm sampler (MISA) picks weight matrices; set granularity to matrix"


AnySampler = Annotated[
    AllLayersConfig
    | UniformSamplerConfig
    | GradNormSamplerConfig
    | OutlierSamplerConfig
    | CyclicSamplerConfig
    | RewardSamplerConfig
    | MatrixNormSamplerConfig,
    Field(discriminator="kind"),
]


# --------------------------------------------------------------------------------------------------- how they train


class LoraConfig(ConfigPart):
    """peft LoRA adapters in every decoder layer; ``dora`` adds magnitudes (DoRA, arXiv 2402.09353)."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    dora: bool = False


class PrefixConfig(ConfigPart):
    """peft prefix tuning (arXiv 2101.00190): trained keys and values before every layer's own."""

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20


class PromptConfig(ConfigPart):
    """peft prompt tuning (arXiv 2104.08691): trained embeddings before the text."""

    kind: Literal["prompt"] = "prompt"
    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20


AdapterConfig = Annotated[LoraConfig | PrefixConfig | PromptConfig, Field(discriminator="kind")]


class ProjectionConfig(BuildablePart):
    """Keeps the moments of the layers' matrices in a small space."""

    def build(self) -> Any:
        """The :class:`~grass_ray.optim.projection.Projection`."""
        return self.make()


class GaLoreConfig(ProjectionConfig):
    """GaLore (arXiv 2403.03507): moments of the layers' matrices in the top singular directions of the gradient."""

    builds: ClassVar[str] = "grass_ray.optim.projection.GaLore"
    kind: Literal["galore"] = "galore"
    rank: Annotated[int, Field(ge=1)] = 128
    refresh_period: Annotated[int, Field(ge=1, description="steps between new projections")] = 200
    scale: Annotated[float, Field(gt=0)] = 0.25


class ApolloConfig(ProjectionConfig):
    """APOLLO (arXiv 2412.05270): gradients scaled by factors that low-rank random moments give."""

    builds: ClassVar[str] = "grass_ray.optim.projection.Apollo"
    kind: Literal["apollo"] = "apollo"
    rank: Annotated[int, Field(ge=1)] = 256
    refresh_period: Annotated[int, Field(ge=1, description="steps between new projections")] = 200
    scale: Annotated[float, Field(gt=0)] = 1.0
    scaling: Literal["channel", "tensor"] = "channel"


AnyProjection = Annotated[GaLoreConfig | ApolloConfig, Field(discriminator="kind")]


class OptimizerConfig(ConfigPart):
    """AdamW and its clipping; ``projection`` keeps the moments of the layers' matrices in a small space."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    projection: AnyProjection | None = None
    precision: Literal["weights", "rem16", "exact"] = Field(
        default="rem16", description="state of bfloat16 weights: their own dtype; with a remainder; float32 moments too"
    )


class MethodConfig(ConfigPart):
    """A method is data: adapter x sampler x optimizer x state policy x always-trained parts."""

    name: str
    adapter: AdapterConfig | None = None
    sampler: AnySampler = AllLayersConfig()
    granularity: Literal["layer", "block", "matrix"] = Field(
        default="layer", description="what the sampler picks from: layers; layers and both ends; weight matrices"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    offload: Literal["none", "resident", "blocking", "overlap", "lazy", "auto"] = "none"
    inactive_states: Literal["keep", "reset"] = "keep"
    train_embeddings: bool = False
    train_head: bool = False
    train_norm: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if mismatch := self.sampler.mismatch(self):
            raise ValueError(mismatch)
        if self.optimizer.projection is not None and self.offload in ("blocking", "overlap", "lazy"):
            raise ValueError(
                f"offload {self.offload}: projected states are small and not streamed; use none or resident"
            )
        if self.granularity == "block" and (self.train_embeddings or self.train_head or self.train_norm):
            raise ValueError("granularity block samples embeddings, head and norm; the train_* flags must be false")
        if isinstance(self.adapter, PrefixConfig | PromptConfig) and not self.sampler.trains_all:
            raise ValueError(f"{self.adapter.kind} tuning trains nothing inside the layers; its sampler must be all")
        return self


# ---------------------------------------------------------------------------------------------------- model and data


class ModelConfig(ConfigPart):
    """A decoder: a hub id, a folder, or a built-in name (``smollm2-135m``, ``tiny``)."""

    name: str = "smollm2-135m"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False


class GeneratedSource(ConfigPart):
    """Arithmetic word problems made by the project; train and test are disjoint."""

    kind: Literal["generated"] = "generated"
    train_rows: Annotated[int, Field(ge=1)] = 2000
    test_rows: Annotated[int, Field(ge=1)] = 200
    seed: int = 0


class FolderSource(ConfigPart):
    """Files in the published LLM-Adapters layout (``dataset/<Name>/{train,test}.json``)."""

    kind: Literal["folder"] = "folder"
    path: str


class HubSource(ConfigPart):
    """The original data sets on the Hugging Face Hub, mapped into the same rows."""

    kind: Literal["hub"] = "hub"


class CustomFields(ConfigPart):
    """Under which keys a user's own rows hold what."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    answer: str = "answer"


class CustomSource(ConfigPart):
    """A user's own task, as its YAML file says it (:mod:`grass_ray.tasks.custom`); paths are absolute."""

    kind: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
    answer: Literal["number", "letter", "labels"]
    labels: tuple[str, ...] = ()
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    instruction: str | None = Field(default=None, description="the same for every row; null takes each row's own")
    train: str | None = None
    test: str
    fields: CustomFields = CustomFields()

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> CustomSource:
        """Validate plain values. Raises :class:`ConfigError` that lists every mistake of the file ``where``."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(f"{where}: {_explain(error)}") from None

    @model_validator(mode="before")
    @classmethod
    def _letters_are_a_to_e_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("answer") == "letter" and not values.get("labels"):
            return {**values, "labels": list("ABCDE")}
        return values

    @field_validator("labels")
    @classmethod
    def _labels_are_composed_unicode(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(unicodedata.normalize("NFC", label) for label in labels)

    @model_validator(mode="after")
    def _labels_fit_the_answer(self) -> Self:
        if self.answer == "number" and self.labels:
            raise ValueError("an answer of kind number has no labels; leave labels out, or use answer: labels")
        if self.answer != "number" and (len(set(self.labels)) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"an answer of kind {self.answer} needs at least two labels, each once")
        if self.answer == "letter" and not all(len(label) == 1 and "A" <= label <= "Z" for label in self.labels):
            raise ValueError("the labels of an answer of kind letter are single capital letters; else use labels")
        if any(label != label.strip() or not label for label in self.labels):
            raise ValueError("a label is empty or has white space around it")
        return self


SourceConfig = Annotated[GeneratedSource | FolderSource | HubSource | CustomSource, Field(discriminator="kind")]


class DataConfig(ConfigPart):
    """What is learnt and where it comes from.

    ``tasks`` is the part of ``suite`` that is evaluated. Training takes the suite's published mixture where the source
    has it, else a mixture of the train sets of ``tasks``; the record says which.
    """

    suite: str = "generated"
    tasks: tuple[str, ...] = ("generated",)
    source: SourceConfig = GeneratedSource()
    template: Literal["clean", "published"] = "clean"
    train_on_inputs: bool = False
    max_length_tokens: Annotated[int, Field(ge=8)] = 256
    batching: Literal["plain", "bucketed", "packed"] = Field(
        default="plain", description="rows of a step: padded; of about one length; one after another, kept apart"
    )
    max_train_rows: Annotated[int, Field(ge=1)] | None = None
    validation_rows: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="training rows held out for choosing settings; their loss is validation/loss"
    )
    broken_rows: Literal["refuse", "skip"] = Field(
        default="refuse", description="rows that cannot be used: an error, or left out and counted in the record"
    )


class TrainingConfig(ConfigPart):
    """The loop. ``steps`` counts optimizer updates; probing steps come on top."""

    steps: Annotated[int, Field(ge=0)] = 50
    batch_size: Annotated[int, Field(ge=1, description="rows an optimizer step")] = 8
    accumulation_steps: Annotated[int, Field(ge=1, description="micro-batches an optimizer step")] = 1
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    gradient_checkpointing: bool = False
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _batches_split_evenly(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal micro-batches; "
                "make it a multiple of accumulation_steps"
            )
        return self


class EvaluationConfig(ConfigPart):
    """How accuracy is measured after training."""

    test: bool = Field(default=True, description="false leaves the test alone: a trial of a search")
    limit: Annotated[int, Field(ge=1, description="examples a task; null takes all")] | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="examples at a time; auto takes what fits into memory. Accuracy is the same"
    )
    scoring: Literal["generation", "loglikelihood"] = "generation"
    extraction: Literal["published", "strict"] = "published"
    num_beams: Annotated[int, Field(ge=1)] = 1


class RunConfig(ConfigPart):
    """Everything that decides the numbers of one run."""

    method: MethodConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Annotated[int, Field(ge=0)] = 0

    # -- text in, the same text out

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Validate plain values. Raises :class:`ConfigError` that lists every mistake at once."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a configuration file. Raises :class:`ConfigError` on a missing or malformed one."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}; a configuration is a mapping of keys")
        return cls.parse(values)

    def to_yaml(self) -> str:
        """The configuration as YAML; reading it back gives an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML."""
        with whole_file(path) as file:
            file.write(self.to_yaml())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    def flatten(self) -> dict[str, str]:
        """Dotted keys to text, as MLflow params want them."""
        return dict(_flatten("", self.to_dict()))

    def override(self, assignments: Iterable[str]) -> RunConfig:
        """A copy with ``dotted.key=value`` assignments applied; values are read as YAML."""
        values = self.to_dict()
        for assignment in assignments:
            key, separator, text = assignment.partition("=")
            if not separator or not key:
                raise ConfigError(f"cannot read the override {assignment!r}; write it as dotted.key=value")
            _assign(values, key.split("."), yaml.safe_load(text), assignment)
        return RunConfig.parse(values)

    # -- names

    @property
    def name(self) -> str:
        """The run's name, such as ``grass-smollm2_135m-commonsense-s0``."""
        return f"{self.method.name}-{slug(self.model.name)}-{slug(self.data.suite)}-s{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that two equal configurations share."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def assignment(key: str, value: object) -> str:
    """``key=value`` as :meth:`RunConfig.override` reads it; the value as one line of YAML that reads back equal."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"


def to_json(value: object, *, indent: int | None = None, keep: bool = False) -> str:
    """JSON that strict readers take, which know no bare NaN: a number that is none is null.

    With ``keep`` it is the text ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, which :func:`from_json` reads back.
    """
    return pydantic_core.to_json(value, indent=indent, inf_nan_mode="strings" if keep else "null").decode()


def from_json(text: str) -> Any:
    """What :func:`to_json` wrote with ``keep``; a bare NaN is read, too."""
    return _with_numbers(json.loads(text))


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def slug(name: str) -> str:
    """A model's or suite's name as one word: the last path component, ``-`` and odd characters as ``_``."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name.rstrip("/").rsplit("/", 1)[-1]).strip("_")


def _flatten(prefix: str, value: object) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    elif isinstance(value, list):
        yield prefix, ",".join(str(item) for item in value)
    else:
        yield prefix, str(value)


def _assign(values: dict[str, Any], keys: list[str], value: object, assignment: str) -> None:
    part: Any = values
    for depth, key in enumerate(keys):
        if not isinstance(part, dict) or key not in part:
            where = ".".join(keys[:depth]) or "the configuration"
            available = ", ".join(part) if isinstance(part, dict) else "no keys"
            raise ConfigError(f"cannot apply {assignment!r}: {where} has no key {key!r}; it has {available}")
        if depth == len(keys) - 1:
            part[key] = value
        part = part[key]


# pydantic names the chosen kind of a part in its locations; users never wrote it
_KINDS = frozenset(
    {"all", "uniform", "grad_norm", "outlier", "cyclic", "reward", "matrix_norm"}
    | {"lora", "prefix", "prompt", "galore", "apollo", "generated", "folder", "hub", "custom"}
    | {"linear", "cosine", "step", "number", "schedule"}
)


def _explain(error: ValidationError) -> str:
    lines = []
    for mistake in error.errors():
        where = ".".join(str(key) for key in mistake["loc"] if key not in _KINDS)
        given = mistake.get("input")
        shown = "" if isinstance(given, dict) else f" (given: {given!r})"
        lines.append(f"{where or 'configuration'}: {mistake['msg']}{shown}")
    return "; ".join(lines)
