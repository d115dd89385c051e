"""What a run reports: a :class:`StepReport` per step, at the end a :class:`LayerTrace` and a :class:`RunOutcome`.

Plain data without torch, for trackers, progress bars and figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, isfinite, log
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from grass_ray.tasks.lm_eval_scores import LmEvalResult
from grass_ray.tasks.scores import EvaluationResult

GIB = 1024**3
# memory of a process that no allocator of torch sees: CUDA context and kernels; on a CPU the process itself
RESERVE_BYTES = GIB // 2
MOST_UNITS_AS_SERIES = 128
# the first steps of training warm up caches and are watched closely for memory; they never count as speed
WARM_UP_STEPS = 3

# names of series
FORGETTING = "forgetting"  # rise of the loss, in nats per token, on a text that has nothing to do with the task
VALIDATION = "validation/loss"  # the mean loss in nats on the answers of held-out rows
HPARAM = "hparam/"  # and the name of a setting that a population changes during training
TOKENS = "step/tokens"  # non-padding tokens of the step, those of all workers
PHASE = "step/phase"  # PROBE or TRAIN
TRAIN_STEP = "step/train_step"  # training steps done after this step; 0 while probing
STALL_S = "step/stall_s"  # seconds that the step waited for optimizer states to move
PROBE, TRAIN = 0.0, 1.0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1, probing and training steps together.
        train_step: training steps done after it; 0 while probing.
        total_steps: the last value of ``step``.
        phase: whether the step only measured (``"probe"``) or trained.
        loss: mean over the step's labels, in nats.
        lr: learning rate; 0 while probing.
        grad_norm: norm of all trained parameters' gradients before clipping.
        active_layers: indices of the decoder layers that were trained.
        probabilities: per unit, for the next draw; None for methods without them.
        importance: per unit, the mean gradient norm; NaN if it was never measured.
        visits: per unit, the number of draws so far.
        refreshed: whether importance and probabilities were computed anew in this step.
        switched: whether an active set was drawn in this step, perhaps the same again.
        tokens: non-padding tokens, those of all workers.
        step_s: seconds of the step.
        measure_s: seconds of it that only measured: a probing step, or extra passes before a step.
        stall_s: seconds of it that training waited for optimizer states to move.
        peak_allocated_gib: peak memory of the run so far.
        host_pinned_gib: host memory of offloaded states and streamed weights.
        offload: cost of moving states since the start (:class:`grass_ray.optim.streaming.OffloadStats`); empty if
            they never move.
        workers: number of workers.
        sent_bytes: bytes that this worker gave to reductions in this step.
        full_bytes: bytes of all parameters' gradients, which full data-parallel training would give.
        padding_share: share of the step's positions that held no token.
        ages: per unit, steps since its importance was last measured; NaN if never.
    """

    step: int
    train_step: int = 0
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
    stall_s: float = 0.0
    peak_allocated_gib: float
    host_pinned_gib: float
    offload: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1
    sent_bytes: int = 0
    full_bytes: int = 0
    padding_share: float = 0.0
    ages: tuple[float, ...] | None = None

    def metrics(self) -> dict[str, float]:
        """The step's values by the names of their series; those per layer only at a refresh."""
        values = {
            TOKENS: float(self.tokens),
            PHASE: PROBE if self.phase == "probe" else TRAIN,
            TRAIN_STEP: float(self.train_step),
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/grad_norm": self.grad_norm,
            "time/step_s": self.step_s,
            "throughput/tokens_per_second": self.tokens / self.step_s if self.step_s > 0 else 0.0,
            "memory/peak_allocated_gib": self.peak_allocated_gib,
            "memory/host_pinned_gib": self.host_pinned_gib,
            "data/padding_share": self.padding_share,
        }
        if self.offload:
            values |= {STALL_S: self.stall_s, **{f"offload/{name}": value for name, value in self.offload.items()}}
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
            # a method that picks weight matrices has hundreds of units: the record's layers have them
            if len(self.probabilities) <= MOST_UNITS_AS_SERIES:
                values |= {f"layers/p_{layer:02d}": p for layer, p in enumerate(self.probabilities)}
                values |= {f"layers/mgn_{layer:02d}": m for layer, m in enumerate(self.importance or ())}
                values |= {f"layers/age_{layer:02d}": age for layer, age in enumerate(self.ages or ())}
                values |= {f"layers/visits_{layer:02d}": float(n) for layer, n in enumerate(self.visits or ())}
        return values


def entropy(probabilities: tuple[float, ...]) -> float:
    """Shannon entropy in nats; its exponential is the effective number of layers."""
    return -sum(p * log(p) for p in probabilities if p > 0)


def first_layers(count: int, num_layers: int) -> str:
    """``count`` decoder layers, from the first, in words: ``layers 0-11 of 32``."""
    if count == num_layers:
        return f"all {num_layers} layers"
    return f"layers 0-{count - 1} of {num_layers}" if count > 1 else f"layer 0 of {num_layers}"


class LayerTrace(BaseModel):
    """Which layers trained when, what the sampler measured, and the check that no other weights changed.

    A unit is what the sampler draws: a decoder layer, for some methods a weight matrix, or layers and both ends.
    """

    # NaN is a text in JSON, and read back as NaN
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    num_layers: int
    units: list[str] = Field(default_factory=list, description="what the sampler picked from, in the order of visits")
    total_parameters: int
    trainable_parameters: int = Field(description="the most that trained at one time")
    trainable_share: float = Field(
        default_factory=lambda fields: fields["trainable_parameters"] / fields["total_parameters"],
        description="of all parameters",
    )
    intervals: list[tuple[int, tuple[int, ...]]] = Field(
        default_factory=list, description="(first step, active units) of every draw"
    )
    refreshes: list[tuple[int, tuple[float, ...], tuple[float, ...]]] = Field(
        default_factory=list, description="(step, importance, probabilities), one entry per unit"
    )
    ages: list[tuple[int, tuple[float, ...]]] = Field(
        default_factory=list, description="(step, steps since each unit's importance was last measured) at refreshes"
    )
    visits: list[int] = Field(default_factory=list, description="draws of each unit")
    recomputed: list[int] = Field(
        default_factory=list,
        description="decoder layers that were recomputed in backward (training.gradient_checkpointing)",
    )
    without_effect: list[str] = Field(default_factory=list, description="settings that could change nothing")
    only_active_layers_changed: bool = Field(
        default=True, description="false as soon as another set of weights changed than was active"
    )
    resident_state_bytes: int = 0
    host_state_bytes: int = 0
    workers: int = Field(default=1, description="the largest number of them")
    sent_bytes_per_step: float = Field(
        default=0.0, description="what a worker gives to reductions, the mean over training steps of several workers"
    )
    sent_share_of_full: float = Field(default=0.0, description="of full data-parallel training")

    def describe(self) -> str:
        """The trace as text."""
        share = f"{100 * self.trainable_share:.2f} %"
        lines = [
            f"{self.num_layers} decoder layers, {len(self.units)} units to pick from",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train at a time ({share})",
            f"optimizer states: {self.resident_state_bytes / GIB:.3f} GiB on the device, "
            f"{self.host_state_bytes / GIB:.3f} GiB on the host",
            "exactly the active units changed: " + ("yes" if self.only_active_layers_changed else "NO"),
        ]
        if self.recomputed:
            lines.append(f"recomputed in backward: {first_layers(len(self.recomputed), self.num_layers)}")
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
    """What a run measured: enough to make its record.

    Attributes:
        metrics: last or aggregate values by MLflow's names (``eval/average``, ``time/train_s``, ...).
        tasks: results of the evaluation, by task.
        model_revision: commit of the base model on the hub.
        series: (step, value) pairs of everything that was measured over steps.
        layers: which layers trained when; None if nothing was trained.
        data: where the data came from, hashes, and how many rows were used.
        lm_eval: results of lm-eval's own tasks, by task.
    """

    metrics: Mapping[str, float]
    tasks: Mapping[str, EvaluationResult]
    model_revision: str | None
    series: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    layers: LayerTrace | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    lm_eval: Mapping[str, LmEvalResult] = field(default_factory=dict)


class TrainingFailure(RuntimeError):  # noqa: N818 - an outcome of a run, not a defect
    """A run ended for a reason that a retry would not change: out of memory, or a number that is not finite."""

    def __init__(self, status: Literal["failed", "out_of_memory"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
