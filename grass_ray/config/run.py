"""The configuration of one run, and its YAML."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ValidationError, field_serializer, model_validator

from grass_ray.config.base import ConfigPart, NonNegativeInt, PositiveInt, explain
from grass_ray.config.data import DataConfig
from grass_ray.config.files import write_whole
from grass_ray.config.method import MethodConfig
from grass_ray.errors import ConfigError
from grass_ray.overrides import Changes, apply, flatten
from grass_ray.reading import read_yaml

# what each data-parallel worker holds: the whole model, or a shard of it (FSDP2); changes memory, not the numbers
Parallel = Literal["replicate", "shard"]


class ModelConfig(ConfigPart):
    """The model that is fine-tuned."""

    name: str = "smollm2-135m"
    """Model id on the Hugging Face Hub, path of a folder, or a built-in model (``smollm2-135m``, ``tiny``)."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    trust_remote_code: bool = False
    """Whether to run model code that comes with the weights."""


# which decoder layers are computed again in backward; a number counts from the first layer
GradientCheckpointing = Literal["none", "all", "auto"] | PositiveInt


def recomputed_layers(setting: GradientCheckpointing, num_layers: int) -> int:
    """How many of ``num_layers`` decoder layers are recomputed in backward; ``auto`` takes all until it is decided."""
    return setting if isinstance(setting, int) else 0 if setting == "none" else num_layers


def _of_a_flag(value: Any) -> Any:
    if isinstance(value, bool):
        return "all" if value else "none"
    if value in ("none", "all", "auto") or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError("must be none, all, auto, or a number of layers, at least 1")


class TrainingConfig(ConfigPart):
    """The training loop."""

    steps: NonNegativeInt = 50
    """Number of optimizer steps, not counting the steps that only measure."""
    batch_size: PositiveInt = 8
    """Number of rows per optimizer step."""
    accumulation_steps: PositiveInt = 1
    """Number of micro-batches per optimizer step. Must divide ``batch_size``."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after the warmup."""
    warmup_steps: NonNegativeInt = 5
    """Number of steps over which the learning rate rises from zero."""
    gradient_checkpointing: Annotated[GradientCheckpointing, BeforeValidator(_of_a_flag)] = "none"
    """Which decoder layers are recomputed in the backward pass to save memory: ``none``, ``all``, as few as fit into
    the memory of the GPU (``auto``), or that many from the first one up. The weights become the same. Written as
    ``false`` where it is ``none``, as ``true`` where it is ``all``."""
    checkpoint_every_steps: PositiveInt | None = None
    """Number of steps between checkpoints. ``null`` saves only at the end."""
    deterministic: bool = False
    """Whether torch may use only algorithms that give the same bits at every run on a GPU, and refuses operations that
    have none. They are slower. Without it a GPU may add in another order each time; on a CPU nothing changes."""

    @field_serializer("gradient_checkpointing")
    def _as_a_flag(self, value: GradientCheckpointing) -> bool | str | int:
        # it was a flag at first: fingerprints, by which runs are found, and what records say stay as they were
        flags: dict[GradientCheckpointing, bool] = {"none": False, "all": True}
        return flags.get(value, value)

    @model_validator(mode="after")
    def _batches_split_evenly(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal micro-batches; "
                "make it a multiple of accumulation_steps"
            )
        return self


class LmEvalConfig(ConfigPart):
    """Tasks of lm-eval, the evaluation harness, that are evaluated as it does."""

    tasks: tuple[str, ...] = ()
    """Names of its tasks, groups or tags, or patterns of them (``mmlu``, ``ifeval``, ``arc_*``), and folders or YAML
    files with tasks of your own, written with a slash or with ``.yaml``."""
    num_fewshot: NonNegativeInt | None = None
    """Number of examples before each question. ``null`` takes what each task says; a task that says 0 keeps it."""
    apply_chat_template: bool = False
    """Whether questions are put into the tokenizer's chat template."""

    @model_validator(mode="after")
    def _settings_have_tasks(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task is named twice; name each once")
        if not self.tasks and (self.num_fewshot is not None or self.apply_chat_template):
            raise ValueError("num_fewshot and apply_chat_template have no effect without tasks; name some in tasks")
        return self


class EvaluationConfig(ConfigPart):
    """How accuracy is measured after training."""

    test: bool = True
    """Whether to evaluate on the test sets. Trials of a search are judged by their validation loss alone."""
    limit: PositiveInt | None = None
    """Maximum number of examples per task. ``null`` evaluates all examples."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Number of examples evaluated at a time. ``auto`` selects what fits into memory. Does not change accuracy."""
    scoring: Literal["generation", "loglikelihood", "loss", "lm_eval"] = "generation"
    """Whether the model generates its answer (``generation``), the most likely of the possible answers is taken
    (``loglikelihood``), or only the loss of the right answer is measured, without an accuracy (``loss``). With
    ``lm_eval`` the tasks of ``data`` are not evaluated, only those of ``lm_eval.tasks``."""
    extraction: Literal["published", "strict"] = "published"
    """How an answer is read from generated text: as in the LLM-Adapters evaluation (``published``), or only where the
    text states its answer (``strict``)."""
    num_beams: PositiveInt = 1
    """Number of beams for beam search. 1 is greedy decoding."""
    forgetting: str | None = None
    """A text that has nothing to do with the task, whose loss is measured before and after training: ``generated``, a
    text file, or a data set with a column ``text``. ``null`` measures none."""
    lm_eval: LmEvalConfig = LmEvalConfig()
    """Tasks of lm-eval that are evaluated beside those of ``data``."""

    @model_validator(mode="after")
    def _something_is_scored(self) -> Self:
        if self.scoring == "lm_eval" and not self.lm_eval.tasks:
            raise ValueError("scoring lm_eval evaluates the tasks of lm_eval.tasks alone, and it has none; name some")
        return self


class RunConfig(ConfigPart):
    """Everything that determines the numbers of one run."""

    method: MethodConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: NonNegativeInt = 0
    """Seed of data order, layer sampling, adapter initialization and dropout."""

    # -- text in, the same text out

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Validate plain values. Raises :class:`ConfigError` that lists every mistake at once."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a configuration file. Raises :class:`ConfigError` on a missing or malformed one."""
        values = read_yaml(path, "the configuration")
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}; a configuration is a mapping of keys")
        return cls.parse(values)

    def to_yaml(self) -> str:
        """The configuration as YAML; reading it back gives an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML."""
        write_whole(path, self.to_yaml())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    def flatten(self) -> dict[str, str]:
        """Return dotted keys and their values as text, as MLflow params want them."""
        return as_text(self.to_dict())

    def override(self, changes: Changes) -> RunConfig:
        """Return a copy with the values of dotted keys changed. Raises :class:`ConfigError`."""
        return RunConfig.parse(apply(self.to_dict(), changes))

    # -- names

    @property
    def name(self) -> str:
        """The run's name, such as ``grass-smollm2_135m-commonsense-s0``."""
        return f"{self.method.name}-{slug(self.model.name)}-{slug(self.data.suite)}-s{self.seed}"

    @property
    def folder(self) -> str:
        """Name of the folder of a run with this configuration; its end is the fingerprint."""
        return f"{self.name}-{self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that two equal configurations share."""
        return fingerprint_of(self.to_dict())


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """The fingerprint of a configuration's plain values, also of a version with other keys than this one's.

    Keys that came later are left out at their defaults: runs of an earlier version are still found.
    """
    later: dict[str, dict[str, Any]] = {
        "method": {"weights": "resident", "update_in_backward": False, "inactive_updates": None},
        "training": {"deterministic": False},
        "evaluation": {"lm_eval": LmEvalConfig().model_dump(mode="json")},
    }
    old = {
        part: {key: value for key, value in values[part].items() if key not in keys or value != keys[key]}
        for part, keys in later.items()
    }
    return hashlib.sha256(json.dumps({**values, **old}, sort_keys=True).encode()).hexdigest()[:12]


def as_text(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration's dotted keys and their values as text."""
    flat = flatten(config)
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in flat.items()}


def slug(name: str) -> str:
    """A model's or suite's name as one word: the last path component, ``-`` and odd characters as ``_``."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name.rstrip("/").rsplit("/", 1)[-1]).strip("_")
