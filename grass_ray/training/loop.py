"""The one training loop, for every method: a generator of step reports.

``for report in fit(state): ...`` trains; leaving the loop stops it, and calling ``fit`` again goes on. The optimizer
owns probing, sampling and switching, so nothing here knows which method runs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grass_ray.config import TrainingConfig
from grass_ray.layerwise.outliers import outlier_scores
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.optim.sharded import local
from grass_ray.training.adapters import scaled_adapters
from grass_ray.training.batches import Batch, Batches
from grass_ray.training.loss import accumulate_gradients, summed_loss
from grass_ray.training.metrics import MemoryMeter
from grass_ray.training.report import GIB, WARM_UP_STEPS, StepReport, TrainingFailure
from grass_ray.training.trace import LayerTracer


@dataclass(kw_only=True)
class TrainState:
    """Everything a run consists of; what :mod:`grass_ray.training.checkpoint` saves.

    Attributes:
        probed: probing steps done.
        trained: training steps done.
        train_s: seconds of all steps.
        measure_s: seconds of them that only measured.
        timed_tokens: non-padding tokens of the training steps after the warm-up steps.
        timed_s: seconds of these steps.
        series: (step, value) pairs of everything that is measured over steps.
    """

    config: TrainingConfig
    model: Any
    device: torch.device
    batches: Batches
    optimizer: LayerwiseAdamW
    schedule: torch.optim.lr_scheduler.LRScheduler
    tracer: LayerTracer
    memory: MemoryMeter
    probed: int = 0
    trained: int = 0
    train_s: float = 0.0
    measure_s: float = 0.0
    timed_tokens: int = 0
    timed_s: float = 0.0
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def steps_done(self) -> int:
        """Steps so far, probing included."""
        return self.probed + self.trained

    def record(self, name: str, value: float) -> None:
        """Add a point to the series ``name``, at the step that was just done."""
        self.series.setdefault(name, []).append((self.steps_done, value))

    def note(self, report: StepReport) -> None:
        """Add a step to the sums, the trace and the series."""
        self.train_s += report.step_s
        self.measure_s += report.measure_s
        if report.train_step > WARM_UP_STEPS:
            self.timed_tokens += report.tokens
            self.timed_s += report.step_s
        self.tracer.note(report, self.optimizer)
        for name, value in report.metrics().items():
            self.record(name, value)

    @property
    def total_steps(self) -> int:
        """Steps in all, probing included."""
        return self.optimizer.sampler.probing_steps + self.config.steps

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens per second of training without the warm-up steps; NaN if there were no others."""
        return self.timed_tokens / self.timed_s if self.timed_s else math.nan


def fit(state: TrainState, until: int | None = None) -> Iterator[StepReport]:
    """Train from where ``state`` is to its last step, yielding one report per optimizer step.

    Probing steps see the first batches, and training starts again from the first batch: none is lost to probing.

    Args:
        state: the run.
        until: stop when so many training steps are done; None takes all of ``state.config.steps``.

    Raises:
        TrainingFailure: the device ran out of memory, or the loss or a gradient is not a finite number.
    """
    state.model.train()
    optimizer = state.optimizer
    last = state.config.steps if until is None else min(until, state.config.steps)
    while state.trained < last:
        # 1. the batch of this step
        probing = optimizer.probing
        number = state.probed if probing else state.trained
        micro_batches = state.batches[number]
        lr = 0.0 if probing else optimizer.param_groups[0]["lr"]
        sent_bytes = optimizer.workers.sent_bytes
        closely = state.steps_done == 0 or (not probing and state.trained < WARM_UP_STEPS)
        started = _synchronized_time(state.device)
        try:
            with state.memory.watch(_alive_tensors(state), closely=closely):
                # 2. extra measurements, for the methods that need them
                _measure(optimizer, StepMeasure(state, micro_batches), state)
                measure_s = _synchronized_time(state.device) - started
                state.tracer.begin_step(state.steps_done + 1, optimizer)
                # 3. forward and backward over the micro-batches; measure, or clip, update and switch
                key = (state.batches.seed, "probe" if probing else "train", number)
                loss = accumulate_gradients(state.model, micro_batches, state.device, optimizer=optimizer, key=key)
                _check_finite("loss", loss, state)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        except torch.OutOfMemoryError as error:
            raise TrainingFailure("out_of_memory", f"step {state.steps_done + 1}: {error}") from error
        assert optimizer.grad_norm is not None
        grad_norm = float(optimizer.grad_norm)
        _check_finite("gradient norm", grad_norm, state)
        # 4. the schedule, which stands still while the optimizer is probing
        if probing:
            state.probed += 1
        else:
            state.trained += 1
            state.schedule.step()
        step_s = _synchronized_time(state.device) - started
        state.memory.raise_to(*optimizer.workers.maximum(state.memory.peaks))
        # 5. the report
        report = _report(
            state,
            micro_batches,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            sent_bytes=optimizer.workers.sent_bytes - sent_bytes,
            step_s=step_s,
            measure_s=step_s if probing else measure_s,
            phase="probe" if probing else "train",
        )
        state.note(report)
        yield report


def _report(state: TrainState, micro_batches: list[Batch], **measured: Any) -> StepReport:
    """The report of the step that was just done; ``measured`` are the fields that are not found in ``state``."""
    optimizer, done = state.optimizer, state.optimizer.last
    assert done is not None
    tokens = sum(batch.tokens for batch in micro_batches)
    return StepReport(
        step=state.steps_done,
        train_step=state.trained,
        total_steps=state.total_steps,
        active_layers=done.active_layers,
        probabilities=done.probabilities,
        importance=done.importance,
        ages=done.ages,
        visits=tuple(state.tracer.trace.visits),
        refreshed=done.refreshed,
        switched=done.switched,
        tokens=tokens,
        padding_share=1 - tokens / sum(batch.input_ids.numel() for batch in micro_batches),
        stall_s=done.stall_s,
        peak_allocated_gib=state.memory.peak_allocated_gib,
        host_pinned_gib=(optimizer.state_bytes()[1] + optimizer.weights.host_bytes) / GIB,
        workers=optimizer.workers.count,
        full_bytes=state.tracer.full_bytes,
        offload=optimizer.stats.to_dict() if optimizer.offload != "none" or optimizer.weights.streams else {},
        **measured,
    )


class StepMeasure:
    """The extra passes a sampler may ask for before a step (:class:`grass_ray.layerwise.sampler.Measure`).

    Args:
        state: the run.
        micro_batches: of the coming step.
    """

    def __init__(self, state: TrainState, micro_batches: list[Batch]) -> None:
        self._state = state
        self._micro_batches = micro_batches

    @torch.no_grad()
    def loss(self, scales: Mapping[int, float]) -> float:
        """Mean loss on the coming batch with the adapters of the given units scaled, without dropout."""
        state = self._state
        units, workers, batches = state.optimizer.units, state.optimizer.workers, self._micro_batches
        by_layer = {layer: scale for unit, scale in scales.items() if (layer := units[unit].layer) is not None}
        state.model.eval()
        with scaled_adapters([state.optimizer.stack.modules[layer] for layer in by_layer], list(by_layer.values())):
            sums = [float(summed_loss(state.model, batch.to(state.device))) for batch in workers.share(batches)]
        state.model.train()
        return workers.sum([sum(sums)])[0] / sum(batch.num_labels for batch in batches)

    def outlier_scores(self, threshold: float, steps: int) -> tuple[float, ...]:
        """Outlier score of every layer, from the batches of the first ``steps`` training steps."""
        state = self._state
        batches = [batch.to(state.device) for step in range(steps) for batch in state.batches[step]]

        def forward() -> None:
            for batch in batches:
                for ids in batch.documents():
                    # one document at a time: padding must not count
                    state.model(input_ids=ids.unsqueeze(0), use_cache=False)

        state.model.eval()
        scores = outlier_scores(state.optimizer.stack.modules, forward, threshold)
        state.model.train()
        return scores


def _alive_tensors(state: TrainState) -> Iterator[Tensor]:
    """Everything that stays on the device between steps: weights, buffers, gradients, resident states."""
    parameters = state.optimizer.weights.on_device(state.model.parameters())
    yield from map(local, itertools.chain(parameters, state.model.buffers()))
    yield from (local(p.grad) for p in state.model.parameters() if p.grad is not None)
    yield from state.optimizer.resident_states()


def _measure(optimizer: LayerwiseAdamW, measure: StepMeasure, state: TrainState) -> None:
    try:
        optimizer.probe(measure)
    except ValueError as error:
        raise TrainingFailure("failed", f"step {state.steps_done + 1}: {error}") from error


def _check_finite(what: str, value: float, state: TrainState) -> None:
    if not math.isfinite(value):
        raise TrainingFailure("failed", f"{what} became {value} at step {state.steps_done + 1}")


def _synchronized_time(device: torch.device) -> float:
    """The time in seconds when the training's queued kernels have finished, so that a step's time is its own.

    Waits for the training's stream alone: with ``offload="lazy"`` updates go on beside it, under the next forward.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
