"""The run record: everything needed to recompute a leaderboard row. One ``record.json`` per trial.

Leaderboards are computed from records alone; MLflow only stores them. ::

    record = RunRecord.load(folder / "record.json")        # or record.json.gz
    tokens, waited = sum(record.step_tokens().values()), sum(record.step_stalls().values())

Schema 2 keeps four raw facts of each step as series of their own. Of a record of schema 1, which has none of them, the
methods :meth:`RunRecord.step_tokens`, ``probing_steps``, ``train_steps`` and ``step_stalls`` compute them from what it
has: speed, learning rate, and running totals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grass_ray.config import ConfigError, read_text, write_whole
from grass_ray.config.base import explain
from grass_ray.tasks.scores import TextLoss, text_loss
from grass_ray.training.report import HPARAM, PHASE, PROBE, STALL_S, TOKENS, TRAIN_STEP, VALIDATION, LayerTrace

Status = Literal["finished", "failed", "out_of_memory", "stopped"]
CHECKPOINT_FOLDER = "checkpoint"  # what a run trained, beside its record


class RecordPart(BaseModel):
    """A part of a record. Unknown keys are an error; NaN is written as the string ``"NaN"`` and read back as NaN."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class TaskScore(RecordPart):
    """One task's result. Lists have one entry per example, in the order of the test file.

    With scoring ``loss`` the accuracy is NaN, and nothing is correct.
    """

    accuracy: float
    num_examples: int
    correct: list[bool]
    example_ids: list[str] = Field(description="a hash of each prompt, so that runs can be compared example by example")
    scoring: str
    extraction: str
    protocol: dict[str, Any] = Field(default_factory=dict)
    workload: dict[str, float] = Field(default_factory=dict, description="tokens, padding, halved batches, seconds")
    answer_nats: list[float] | None = Field(
        default=None, description="negative log-likelihood of each reference response, the sum over its tokens"
    )
    answer_tokens: list[int] | None = Field(default=None, description="tokens of each reference response")
    answer_bytes: list[int] | None = Field(
        default=None, description="bytes of the learned text of each row without a right answer"
    )
    option_nats: list[float] | None = Field(
        default=None, description="negative logarithm of the right option's share of the likelihood of all options"
    )

    @property
    def losses(self) -> list[float] | None:
        """Loss of each right answer in nats: among the options, else per token of the reference response.

        None if it was not measured.
        """
        if self.option_nats is not None:
            return self.option_nats
        if self.answer_nats is None or self.answer_tokens is None:
            return None
        return [nats / tokens for nats, tokens in zip(self.answer_nats, self.answer_tokens, strict=True)]

    @property
    def loss(self) -> float | None:
        """Mean of :attr:`losses`; None if they were not measured or there are no examples."""
        return fmean(self.losses) if self.losses else None

    @property
    def text_loss(self) -> TextLoss | None:
        """Loss of held-out text over all of its tokens; None for questions."""
        rows = (self.answer_nats, self.answer_tokens, self.answer_bytes)
        return None if None in rows else text_loss(list(zip(*rows, strict=True)))  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _one_entry_per_example(self) -> Self:
        if not self.num_examples == len(self.correct) == len(self.example_ids):
            raise ValueError("num_examples, correct and example_ids do not agree")
        for name in ("answer_nats", "answer_tokens", "answer_bytes", "option_nats"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_examples:
                raise ValueError(f"num_examples and {name} do not agree")
        return self


class LmEvalScore(RecordPart):
    """Result of one of lm-eval's own tasks, or of a group of them. Lists have one entry per example."""

    metric: str = Field(description="the task's first metric, by which rows are compared")
    value: float
    stderr: float | None = None
    higher_is_better: bool = True
    metrics: dict[str, float] = Field(default_factory=dict, description="everything that lm-eval computed")
    subtasks: dict[str, float] = Field(default_factory=dict, description="the metric of each task of a group")
    example_ids: list[str] = Field(default_factory=list, description="a hash of each prompt")
    values: list[float] | None = Field(default=None, description="the metric of each example; null if it is no mean")
    protocol: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_value_per_example(self) -> Self:
        if self.values is not None and len(self.values) != len(self.example_ids):
            raise ValueError("values and example_ids do not agree")
        return self


class LineageStep(RecordPart):
    """One stretch of a population member's history: where it began, with whose weights, and with which settings."""

    step: int = Field(description="training steps done when it began")
    weights_of: str = Field(description="key of the trial whose checkpoint it continued from")
    settings: dict[str, Any]


class SearchPart(RecordPart):
    """Which search a trial belongs to."""

    search: str = Field(description="grid, random or optuna")
    scheduler: str = Field(description="none, asha or pbt")
    stage: Literal["search", "winner"]
    number: int = Field(description="position among its method's trials, from 0")
    stopped_after: int | None = Field(default=None, description="training steps after which it was stopped early")
    lineage: list[LineageStep] = Field(default_factory=list, description="history of a member of a population")


class _Known(BaseModel):
    """The keys of a configuration that every version's records have, and that leaderboards are made of."""

    class _Named(BaseModel):
        name: str

    class _Method(_Named):
        class _Optimizer(BaseModel):
            lr: float

        optimizer: _Optimizer
        sampler: dict[str, Any]

    class _Data(BaseModel):
        suite: str
        tasks: list[str]
        source: dict[str, Any]

    class _Training(BaseModel):
        steps: int
        batch_size: int

    method: _Method
    model: _Named
    data: _Data
    training: _Training
    evaluation: dict[str, Any]
    seed: int


class RunRecord(RecordPart):
    """One trial: its configuration, what was measured, and what it ran on."""

    schema_version: Literal[1, 2] = 2
    run_id: str
    name: Annotated[str, Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$")]  # files are named after it
    sweep: str
    sweep_id: str
    status: Status
    failure: str | None = None
    config: dict[str, Any]
    metrics: dict[str, float] = Field(default_factory=dict, description="last or aggregate value of each metric")
    series: dict[str, list[tuple[int, float]]] = Field(
        default_factory=dict, description="(step, value) pairs; steps count probing and training together, from 1"
    )
    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    lm_eval: dict[str, LmEvalScore] = Field(default_factory=dict, description="lm-eval's own tasks")
    layers: LayerTrace | None = None
    data: dict[str, Any] = Field(default_factory=dict, description="files, hashes, row counts, truncation counts")
    hardware: str
    world_size: int = 1
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None
    model_revision: str | None = None
    started_at: str
    finished_at: str
    model_sha256: str | None = Field(default=None, description="of the base model's weight files, as of sha256sum")
    threads: int | None = Field(default=None, description="CPU threads that torch used")
    weights_sha256: str | None = Field(default=None, description="of the trained parameters at the end")
    search: SearchPart | None = None
    reused_from: str | None = Field(default=None, description="id of the earlier run whose results were taken over")
    code: dict[str, str] = Field(
        default_factory=dict, description="text of the modules, by path, of a method of the user's own"
    )

    @field_validator("config")
    @classmethod
    def _config_has_what_tables_need(cls, config: dict[str, Any]) -> dict[str, Any]:
        try:
            _Known.model_validate(config, strict=True)
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        return config

    @property
    def is_tested(self) -> bool:
        """Whether it was evaluated, on the tasks of its data or on lm-eval's own."""
        return bool(self.tasks or self.lm_eval)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, compressed if the name ends with ``.gz``."""
        write_whole(path, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record. Raises :class:`ConfigError` when it cannot be read."""
        try:
            return cls.model_validate_json(read_text(path))
        except OSError as error:
            raise ConfigError(f"cannot read the record {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not a run record: it is not text") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{path} is not a run record of schema 1 or 2: {error.error_count()} mistakes, the first in "
                f"{where or 'the file'}: {first['msg'][:200]}"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{path} is not a run record: {error}") from None

    def without_steps(self, questions: dict[str, str]) -> RunRecord:
        """A copy without what was measured at every step, which is most of a record, for tables of many runs.

        What is measured now and then stays: the loss on held-out rows and settings that changed, with the number of
        training steps done by then. The number of tokens stays as one point, so that leaderboards are the same.

        Args:
            questions: ids of questions seen before, by themselves (:meth:`with_known`).
        """
        now_and_then = [name for name in self.series if name == VALIDATION or name.startswith(HPARAM)]
        kept = {name: self.series[name] for name in now_and_then}
        steps = {step for points in kept.values() for step, _ in points}
        for name in (PHASE, TRAIN_STEP):
            if points := [point for point in self.series.get(name, ()) if point[0] in steps]:
                kept[name] = points
        if tokens := self.step_tokens():
            kept[TOKENS] = [(max(tokens), sum(tokens.values()))]
        layers = self.layers
        if layers is not None:
            layers = layers.model_copy(update={"intervals": [], "refreshes": [], "ages": []})
        return self.with_known(questions).model_copy(update={"series": kept, "layers": layers})

    def with_known(self, questions: dict[str, str]) -> RunRecord:
        """A copy whose ids of questions are those of ``questions``, where each id is in memory once; new ones join."""

        def known(score: TaskScore | LmEvalScore) -> TaskScore | LmEvalScore:
            ids = [questions.setdefault(example, example) for example in score.example_ids]
            return score.model_copy(update={"example_ids": ids})

        both: dict[str, Mapping[str, TaskScore | LmEvalScore]] = {"tasks": self.tasks, "lm_eval": self.lm_eval}
        return self.model_copy(
            update={name: {task: known(score) for task, score in own.items()} for name, own in both.items()}
        )

    # What happened at each step. A record of schema 1 says it by other names; a run that began under schema 1 and was
    # resumed under schema 2 has the series of schema 2 from there on.

    def step_tokens(self) -> dict[int, float]:
        """Non-padding tokens of each step, probing included; empty where a step's are unknown."""
        speeds, seconds = (dict(self.series.get(name, ())) for name in ("throughput/tokens_per_second", "time/step_s"))
        computed = {step: speeds[step] * seconds[step] for step in speeds} if speeds.keys() == seconds.keys() else {}
        return computed | dict(self.series.get(TOKENS, ()))

    def probing_steps(self) -> set[int]:
        """The steps that only measured, before training began."""
        known = dict(self.series.get(PHASE, ()))
        intervals = [] if self.layers is None else self.layers.intervals
        first = intervals[0][0] if intervals else math.inf  # a schedule may end at a learning rate of 0, too
        guessed = {step for step, rate in self.series.get("train/lr", ()) if rate == 0.0 and step < first}
        return {step for step, phase in known.items() if phase == PROBE} | (guessed - known.keys())

    def train_steps(self, steps: Iterable[int]) -> dict[int, int]:
        """For each of the given steps, the number of training steps done after it; not above 0 while probing."""
        known = dict(self.series.get(TRAIN_STEP, ()))
        probed = int(self.config["method"]["sampler"].get("probing_steps", 0))
        return {step: int(known.get(step, step - probed)) for step in steps}

    def step_stalls(self) -> dict[int, float]:
        """Seconds that each step waited for optimizer states to move; empty where none are moved."""
        stalls, before = {}, 0.0
        for step, total in self.series.get("offload/exposed_s", ()):
            stalls[step] = total - before if total >= before else total  # the total begins anew after a resume
            before = total
        return stalls | dict(self.series.get(STALL_S, ()))
