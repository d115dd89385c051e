"""The one training loop, for every method: a generator of step reports.

``for report in fit(state): ...`` trains; leaving the loop stops it, and calling ``fit`` again goes on. The optimizer
owns probing, sampling and switching, so nothing here knows which method runs.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from grass_ray.config import TrainingConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.layerwise.outliers import outlier_scores
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.optim.sharded import local
from grass_ray.training.adapters import leading_virtual_tokens, scaled_adapters
from grass_ray.training.batches import IGNORED, Batch, Batches
from grass_ray.training.metrics import MemoryMeter
from grass_ray.training.report import GIB, StepReport, TrainingFailure
from grass_ray.training.trace import EngagementLog

# the first steps of training warm up caches and are watched closely for memory; they never count as speed
WARM_UP_STEPS = 3


@dataclass(kw_only=True)
class TrainState:
    """Everything a run consists of; what :mod:`grass_ray.training.checkpoint` saves.

    ``probed`` and ``trained`` count steps done; ``measure_s`` is the part of ``train_s`` that only measured;
    ``timed_tokens`` and ``timed_s`` leave the warm-up steps out.
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
    measure_s: float = 0.0
    timed_tokens: int = 0
    timed_s: float = 0.0
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, probing included."""
        return self.probed + self.trained

    def record(self, name: str, value: float) -> None:
        """Add a point to the series ``name``, at the step that was just done."""
        self.series.setdefault(name, []).append((self.steps_done, value))

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all, probing included."""
        return self.optimizer.sampler.probing_steps + self.config.steps

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens a second of training, warm-up steps left out; NaN when there was nothing else."""
        return self.timed_tokens / self.timed_s if self.timed_s else math.nan


def fit(state: TrainState, until: int | None = None) -> Iterator[StepReport]:
    """Train from where ``state`` stands to its last step, yielding one report per optimizer step.

    Probing steps see the first batches, and training starts again from the first batch: none is lost to it.

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
        probing = optimizer.probing
        # 1. the batch of this step
        number = state.probed if probing else state.trained
        micro_batches = state.batches[number]
        lr = optimizer.param_groups[0]["lr"]
        sent_bytes = optimizer.workers.sent_bytes
        closely = state.steps_done == 0 or (not probing and state.trained < WARM_UP_STEPS)
        _wait_for(state.device)
        started = time.perf_counter()
        try:
            with state.memory.watch(_alive_tensors(state), closely=closely):
                # 2. extra measurements, for the methods that need them
                _measure(optimizer, StepMeasure(state, micro_batches), state)
                _wait_for(state.device)
                measured_s = time.perf_counter() - started
                state.engagement.begin_step(state.steps_done + 1, optimizer)
                # 3. forward and backward over the micro-batches; measure, or clip, update and switch
                loss = accumulate_gradients(
                    state.model,
                    micro_batches,
                    state.device,
                    optimizer=optimizer,
                    key=(state.batches.seed, "probe" if probing else "train", number),
                )
                _check_finite("loss", loss, state)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        except torch.OutOfMemoryError as error:
            raise TrainingFailure("out_of_memory", f"step {state.steps_done + 1}: {error}") from error
        done = optimizer.last
        assert done is not None
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
        state.memory.raise_to(*optimizer.workers.maximum(state.memory.peaks))
        tokens = sum(batch.tokens for batch in micro_batches)
        state.train_s += elapsed
        state.measure_s += elapsed if probing else measured_s
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
            active_layers=done.active_layers,
            probabilities=done.probabilities,
            importance=done.importance,
            ages=done.ages,
            visits=tuple(state.engagement.engagement.visits),
            refreshed=done.refreshed,
            switched=done.switched,
            tokens=tokens,
            padding_share=1 - tokens / sum(batch.input_ids.numel() for batch in micro_batches),
            step_s=elapsed,
            measure_s=elapsed if probing else measured_s,
            peak_allocated_gib=state.memory.peak_allocated_gib,
            host_pinned_gib=optimizer.state_bytes()[1] / GIB,
            workers=optimizer.workers.count,
            sent_bytes=optimizer.workers.sent_bytes - sent_bytes,
            full_bytes=state.engagement.full_bytes,
            offload={} if optimizer.offload == "none" else optimizer.stats.to_dict(),
        )
        state.engagement.note(report, optimizer)
        for name, value in report.metrics().items():
            state.record(name, value)
        yield report


def accumulate_gradients(
    model: Any,
    micro_batches: list[Batch],
    device: torch.device,
    *,
    optimizer: LayerwiseAdamW | None = None,
    key: tuple[int | str, ...] | None = None,
) -> float:
    """Backward over a step's micro-batches, or over this worker's share of them.

    Args:
        model: what trains, on ``device``.
        micro_batches: of all workers; their number is a multiple of the number of workers.
        device: where they go.
        optimizer: whose workers share them, and who is told of the last one; None takes all of them here.
        key: what names the step. Random numbers (dropout) are keyed by it and by the micro-batch's place in the step,
            so that neither a resume nor the number of workers changes them; None lets the generators go on.

    Returns:
        The mean loss over the step's labels, wherever they are and whichever worker has them.
    """
    num_labels = sum(batch.num_labels for batch in micro_batches)
    places = list(enumerate(micro_batches))
    own = places if optimizer is None else optimizer.workers.share(places)
    losses: list[Tensor] = []
    for place, batch in own:
        if key is not None:
            torch.manual_seed(keyed_generator("dropout", *key, place).initial_seed())
        loss = summed_loss(model, batch.to(device)) / num_labels
        if optimizer is not None:
            optimizer.last_micro_batch = place == own[-1][0]
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    total = float(torch.stack(losses).sum())
    return total if optimizer is None else optimizer.workers.sum([total])[0]


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labels of one micro-batch on the model's device, a scalar."""
    virtual = leading_virtual_tokens(model)
    labels = batch.labels
    # the LM head is a large part of a small model: leave out positions where no row has a label
    options = {}
    if keeps_logits(model):
        labelled = batch.labelled_positions()
        options = {"logits_to_keep": labelled + virtual}
        labels = labels[:, labelled]
        virtual = 0
    # documents that share a row are told apart by their positions, and then no mask may say otherwise
    if batch.position_ids is None:
        options["attention_mask"] = batch.attention_mask
    else:
        options["position_ids"] = batch.position_ids
    output = model(input_ids=batch.input_ids, use_cache=False, **options)
    logits = output.logits[:, virtual:].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


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


def keeps_logits(model: Any) -> bool:
    """Whether the model can compute logits at some positions only (``logits_to_keep``, most decoders can)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _alive_tensors(state: TrainState) -> Iterator[Tensor]:
    """Everything that stays on the device between steps: weights, buffers, gradients, resident states."""
    yield from map(local, itertools.chain(state.model.parameters(), state.model.buffers()))
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


def _wait_for(device: torch.device) -> None:
    """Let the training's queued kernels finish, so that a step's time is its own.

    Only its own stream: with ``offload="lazy"`` updates go on beside it, under the next forward.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
