"""The one training loop, for every method: a generator of step reports.

``for report in fit(state): ...`` trains; leaving the loop stops it, and calling ``fit`` again goes on. The optimizer
owns probing, sampling and switching, so nothing here knows which method runs.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from grass_ray.config import TrainingConfig
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.training.batches import IGNORED, Batch, Batches
from grass_ray.training.engagement import EngagementLog
from grass_ray.training.metrics import MemoryMeter
from grass_ray.training.report import GIB, StepReport, TrainingFailure

# the first steps of training warm up caches and are watched closely for memory; they never count as speed
WARM_UP_STEPS = 3


@dataclass(kw_only=True)
class TrainState:
    """Everything a run consists of; what :mod:`grass_ray.training.checkpoint` saves.

    ``probed`` and ``trained`` count steps done; ``timed_tokens`` and ``timed_s`` leave the warm-up steps out.
    """

    config: TrainingConfig
    model: Any
    device: torch.device
    batches: Batches
    optimizer: LayerwiseAdamW
    schedule: torch.optim.lr_scheduler.LRScheduler
    engagement: EngagementLog
    memory: MemoryMeter
    probed: int = 0
    trained: int = 0
    train_s: float = 0.0
    timed_tokens: int = 0
    timed_s: float = 0.0
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, probing included."""
        return self.probed + self.trained

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all, probing included."""
        return self.optimizer.sampler.probing_steps + self.config.steps

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens a second of training, warm-up steps left out; NaN when there was nothing else."""
        return self.timed_tokens / self.timed_s if self.timed_s else math.nan


def fit(state: TrainState) -> Iterator[StepReport]:
    """Train from where ``state`` stands to its last step, one report an optimizer step.

    Probing steps see the first batches, and training starts again from the first batch: none is lost to it.

    Raises:
        TrainingFailure: the device ran out of memory, or the loss or a gradient is not a finite number.
    """
    state.model.train()
    optimizer = state.optimizer
    while state.trained < state.config.steps:
        probing = optimizer.probing
        # 1. the batch of this step
        micro_batches = state.batches[state.probed if probing else state.trained]
        lr = optimizer.param_groups[0]["lr"]
        active_layers = optimizer.active_layers
        refreshes, switches = optimizer.sampler.refreshes, optimizer.switches
        closely = state.steps_done == 0 or (not probing and state.trained < WARM_UP_STEPS)
        _wait_for(state.device)
        started = time.perf_counter()
        try:
            # 2. forward and backward over the micro-batches; 3. probe, or clip, update and switch
            with state.memory.watch(_alive_tensors(state), closely=closely):
                loss = accumulate_gradients(state.model, micro_batches, state.device)
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
        _wait_for(state.device)
        elapsed = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in micro_batches)
        state.train_s += elapsed
        if not probing and state.trained > WARM_UP_STEPS:
            state.timed_tokens += tokens
            state.timed_s += elapsed
        # 5. tell whoever listens
        report = StepReport(
            step=state.steps_done,
            total_steps=state.total_steps,
            phase="probe" if probing else "train",
            loss=loss,
            lr=0.0 if probing else lr,
            grad_norm=grad_norm,
            active_layers=active_layers,
            probabilities=optimizer.sampler.probabilities(),
            importance=optimizer.sampler.importance(),
            refreshed=optimizer.sampler.refreshes > refreshes,
            switched=optimizer.switches > switches,
            tokens=tokens,
            step_s=elapsed,
            peak_allocated_gib=state.memory.peak_allocated_gib,
            host_pinned_gib=optimizer.state_bytes()[1] / GIB,
        )
        state.engagement.note(report, optimizer)
        for name, value in report.metrics().items():
            state.series.setdefault(name, []).append((report.step, value))
        yield report


def accumulate_gradients(model: Any, micro_batches: list[Batch], device: torch.device) -> float:
    """Backward over all micro-batches; the loss is the mean over the step's labels, wherever they are."""
    num_labels = sum(batch.num_labels for batch in micro_batches)
    losses: list[Tensor] = []
    can_keep = keeps_logits(model)
    for batch in micro_batches:
        on_device = batch.to(device)
        # the LM head is a large part of a small model: leave out positions where no row has a label
        labelled = on_device.labelled_positions()
        options = {"logits_to_keep": labelled} if can_keep else {}
        labels = on_device.labels[:, labelled] if options else on_device.labels
        logits = model(
            input_ids=on_device.input_ids, attention_mask=on_device.attention_mask, use_cache=False, **options
        ).logits.float()
        summed = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = summed / num_labels
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return float(torch.stack(losses).sum())


def keeps_logits(model: Any) -> bool:
    """Whether the model can compute logits at some positions only (``logits_to_keep``, most decoders can)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _alive_tensors(state: TrainState) -> Iterator[Tensor]:
    """Everything that stays on the device between steps: weights, buffers, gradients, resident states."""
    yield from itertools.chain(state.model.parameters(), state.model.buffers())
    yield from (p.grad for p in state.model.parameters() if p.grad is not None)
    yield from state.optimizer.resident_states()


def _check_finite(what: str, value: float, state: TrainState) -> None:
    if not math.isfinite(value):
        raise TrainingFailure("failed", f"{what} became {value} at step {state.steps_done + 1}")


def _wait_for(device: torch.device) -> None:
    """Let queued kernels finish, so that a step's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
