"""What a run tells whoever listens: one :class:`StepReport` an optimizer step, one :class:`Engagement` at the end.

Plain data, no torch, so that trackers, progress bars and plots can use it anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any, Literal

from grass_ray.tasks.scores import EvaluationResult

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step.

    ``step`` counts from 1 over probing and training steps together; ``total_steps`` is its last value.
    ``loss`` is the mean over non-masked tokens, ``grad_norm`` the norm over all trained parameters before clipping.
    ``probabilities`` and ``importance`` (mean gradient norms, NaN where never measured) have one entry a layer and
    are None for methods without them. ``refreshed`` and ``switched`` (an active set was drawn,
    perhaps the same again) say what happened at the end of this step.
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
    refreshed: bool
    switched: bool
    tokens: int
    step_s: float
    peak_allocated_gib: float
    host_pinned_gib: float

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
        }
        if self.refreshed and self.probabilities is not None:
            values["layers/entropy"] = entropy(self.probabilities)
            values |= {f"layers/p_{layer:02d}": p for layer, p in enumerate(self.probabilities)}
            if self.importance is not None:
                values |= {f"layers/mgn_{layer:02d}": m for layer, m in enumerate(self.importance)}
        return values


def entropy(probabilities: tuple[float, ...]) -> float:
    """Shannon entropy in nats; its exponential is the effective number of layers."""
    return -sum(p * log(p) for p in probabilities if p > 0)


@dataclass(kw_only=True)
class Engagement:
    """Proof that layer-wise training was engaged (what users of other implementations could not see).

    ``intervals`` lists (first step, active layers) of every draw; ``refreshes`` lists (step, importance,
    probabilities); ``only_active_layers_changed`` is False as soon as one interval changed another set than its own.
    """

    num_layers: int
    total_parameters: int
    trainable_parameters: int
    intervals: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    refreshes: list[tuple[int, tuple[float, ...], tuple[float, ...]]] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    only_active_layers_changed: bool = True
    resident_state_bytes: int = 0
    host_state_bytes: int = 0

    @property
    def trainable_share(self) -> float:
        """Most parameters that train at one time, over all parameters."""
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a run came to: enough to make a run record of it.

    ``metrics`` holds last or aggregate values under MLflow's names (``eval/average``, ``time/train_s``, ...);
    ``series`` holds (step, value) pairs of every metric that was seen over steps.
    """

    metrics: Mapping[str, float]
    series: Mapping[str, list[tuple[int, float]]]
    tasks: Mapping[str, EvaluationResult]
    engagement: Engagement | None
    data: Mapping[str, Any]
    model_revision: str | None


class TrainingFailure(RuntimeError):  # noqa: N818 - an outcome of a run, not a defect
    """A run that ended for a reason worth recording and not worth retrying: out of memory, or a number gone bad."""

    def __init__(self, status: Literal["failed", "out_of_memory"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
