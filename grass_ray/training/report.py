"""What a run reports: a :class:`StepReport` per optimizer step, and a :class:`RunOutcome` at the end.

Plain data without torch, so that trackers, progress bars and plots can use it anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, isfinite, log
from typing import Any, Literal

from pydantic import ConfigDict, computed_field, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from grass_ray.tasks.scores import EvaluationResult

GIB = 1024**3
VALIDATION = "validation/loss"  # the mean loss in nats on the answers of held-out rows
MOST_UNITS_AS_SERIES = 128

# Names of the series that keep what happened at each step.
TOKENS = "step/tokens"  # non-padding tokens of the step, those of all workers
PHASE = "step/phase"  # PROBE or TRAIN
TRAIN_STEP = "step/train_step"  # training steps done after this step; 0 while probing
STALL_S = "step/stall_s"  # seconds that the step waited for optimizer states to move
PROBE, TRAIN = 0.0, 1.0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step.

    ``step`` counts from 1 over probing and training steps together; ``total_steps`` is its last value.
    ``loss`` is the mean over non-masked tokens, ``grad_norm`` the norm over all trained parameters before clipping.
    ``probabilities``, ``importance`` (mean gradient norms, NaN where never measured) and ``visits`` (draws so far)
    have one entry a unit and are None for methods without them, as ``ages``, the steps since each unit's importance was
    last measured (NaN where never). ``refreshed`` and ``switched`` (an active set was
    drawn, perhaps the same again) say what happened in this step. ``measure_s`` is the part of ``step_s`` that only
    measured: a probing step, or extra passes before a step. ``offload`` says what moving states has cost since the
    start (:class:`grass_ray.optim.streaming.OffloadStats`); empty where states never move. ``sent_bytes`` are what this
    worker gave to reductions over the ``workers`` in this step, ``full_bytes`` the gradients of all parameters, what
    full data-parallel training would give. ``padding_share`` is the part of the step's positions that held no token.
    ``train_step`` counts training steps alone, this one included (0 while probing); ``stall_s`` is the part of
    ``step_s`` in which training waited for optimizer states to move.
    """

    step: int
    total_steps: int
    phase: Literal["probe", "train"]
    loss: float
    lr: float
    grad_norm: float
    active_layers: tuple[int, ...]
    probabilities: tuple[float, ...] | None
    importance: tuple[float, ...] | None
    visits: tuple[int, ...] | None
    refreshed: bool
    switched: bool
    tokens: int
    step_s: float
    measure_s: float
    peak_allocated_gib: float
    host_pinned_gib: float
    offload: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1
    sent_bytes: int = 0
    full_bytes: int = 0
    padding_share: float = 0.0
    ages: tuple[float, ...] | None = None
    train_step: int = 0
    stall_s: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The step under the names MLflow shows (``train/loss`` and so on); layers' series only at a refresh."""
        values = {
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/grad_norm": self.grad_norm,
            "time/step_s": self.step_s,
            "throughput/tokens_per_second": self.tokens / self.step_s if self.step_s > 0 else 0.0,
            "memory/peak_allocated_gib": self.peak_allocated_gib,
            "memory/host_pinned_gib": self.host_pinned_gib,
            "data/padding_share": self.padding_share,
            TOKENS: float(self.tokens),
            PHASE: TRAIN if self.phase == "train" else PROBE,
            TRAIN_STEP: float(self.train_step),
        }
        if self.offload:
            values |= {f"offload/{name}": value for name, value in self.offload.items()} | {STALL_S: self.stall_s}
        if self.workers > 1:
            values |= {
                "comm/bytes_per_step": float(self.sent_bytes),
                "comm/share_of_full": self.sent_bytes / self.full_bytes,
            }
        if known := [age for age in self.ages or () if isfinite(age)]:
            values |= {"layers/age_mean": sum(known) / len(known), "layers/age_max": max(known)}
        if self.refreshed and self.probabilities is not None:
            h = entropy(self.probabilities)
            values |= {"layers/entropy": h, "layers/effective": exp(h)}
            # a method that picks weight matrices has hundreds of units: the engagement report has them
            if len(self.probabilities) <= MOST_UNITS_AS_SERIES:
                values |= {f"layers/p_{layer:02d}": p for layer, p in enumerate(self.probabilities)}
                values |= {f"layers/mgn_{layer:02d}": m for layer, m in enumerate(self.importance or ())}
                values |= {f"layers/age_{layer:02d}": age for layer, age in enumerate(self.ages or ())}
                values |= {f"layers/visits_{layer:02d}": float(n) for layer, n in enumerate(self.visits or ())}
        return values


def entropy(probabilities: tuple[float, ...]) -> float:
    """Shannon entropy in nats; its exponential is the effective number of layers."""
    return -sum(p * log(p) for p in probabilities if p > 0)


@pydantic_dataclass(kw_only=True, config=ConfigDict(extra="forbid", ser_json_inf_nan="strings"))
class LayerTrace:
    """Which layers trained when: proof that layer-wise training happened, and a part of the run's record.

    Attributes:
        num_layers: decoder layers of the model.
        total_parameters: parameters of the model.
        trainable_parameters: the most that trained at one time.
        units: names of what the sampler picks from: decoder layers; for some methods weight matrices, or layers,
            embeddings and head. Other fields number the units in this order.
        intervals: (first step, active units) of every draw.
        refreshes: (step, importance, probabilities) of every measurement, one number per unit; NaN where a unit was
            never measured.
        ages: (step, steps since each unit's importance was last measured) at the same steps.
        visits: how often each unit was drawn.
        without_effect: settings that changed nothing in this run.
        only_active_layers_changed: False as soon as weights changed that were not active, or active ones did not.
        resident_state_bytes: optimizer states on the device.
        host_state_bytes: optimizer states in host memory.
        workers: the largest number of workers.
        sent_bytes_per_step: what one of several workers sends for reductions, the mean over training steps.
        sent_share_of_full: that over the gradients of all parameters.
    """

    num_layers: int
    total_parameters: int
    trainable_parameters: int
    units: list[str] = field(default_factory=list)
    intervals: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    refreshes: list[tuple[int, tuple[float, ...], tuple[float, ...]]] = field(default_factory=list)
    ages: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    only_active_layers_changed: bool = True
    resident_state_bytes: int = 0
    host_state_bytes: int = 0
    workers: int = 1
    sent_bytes_per_step: float = 0.0
    sent_share_of_full: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _without_computed(cls, values: Any) -> Any:
        """A record holds the share, too."""
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "trainable_share"}
        return values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def trainable_share(self) -> float:
        """The most parameters that trained at one time, over all parameters."""
        return self.trainable_parameters / self.total_parameters

    def describe(self) -> str:
        """The report as text: how much trains, who was active when, visits, importance, states, and the proof."""
        share = f"{100 * self.trainable_share:.2f} %"
        lines = [
            f"{self.num_layers} decoder layers, {len(self.units)} units to pick from",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train at a time ({share})",
            f"optimizer states: {self.resident_state_bytes / GIB:.3f} GiB on the device, "
            f"{self.host_state_bytes / GIB:.3f} GiB on the host",
            "exactly the active units changed: " + ("yes" if self.only_active_layers_changed else "NO"),
        ]
        if self.workers > 1:
            sent = f"{self.sent_bytes_per_step / 1024**2:.3f} MiB"
            lines.append(
                f"{self.workers} workers; each gives {sent} a step to reductions, "
                f"{100 * self.sent_share_of_full:.2f} % of full data-parallel training"
            )
        lines += [f"without effect: {setting}" for setting in self.without_effect]
        if len(self.intervals) > 1 or any(len(active) < len(self.units) for _, active in self.intervals):
            lines += ["", "first step  active units"]
            lines += [f"{step:>10}  {' '.join(self.units[u] for u in active)}" for step, active in self.intervals]
            heading = "unit: visits, and importance / probability"
            lines += ["", f"{heading}{' / age in steps' if self.ages else ''} at each refresh"]
            ages = dict(self.ages)
            for unit, name in enumerate(self.units):
                measured = "  ".join(
                    f"{m[unit]:.3g} / {p[unit]:.3g}" + (f" / {ages[step][unit]:g}" if step in ages else "")
                    for step, m, p in self.refreshes
                )
                lines.append(f"{name}: {self.visits[unit]}  {measured}".rstrip())
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a run came to: enough to make a run record of it.

    ``metrics`` holds last or aggregate values under MLflow's names (``eval/average``, ``time/train_s``, ...);
    ``series`` holds (step, value) pairs of every metric that was seen over steps.
    """

    metrics: Mapping[str, float]
    series: Mapping[str, list[tuple[int, float]]]
    tasks: Mapping[str, EvaluationResult]
    engagement: LayerTrace | None
    data: Mapping[str, Any]
    model_revision: str | None


class TrainingFailure(RuntimeError):  # noqa: N818 - an outcome of a run, not a defect
    """A run that ended for a reason worth recording and not worth retrying: out of memory, or a number gone bad."""

    def __init__(self, status: Literal["failed", "out_of_memory"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
