"""Profile the memory of one training step without allocating it, on torch's meta device.

The forward pass of the model, the loss of the training loop and the backward pass of autograd run on tensors that have
shapes but no memory, and :mod:`grass_ray.memory.allocations` records when each storage is allocated and freed. So what
autograd saves, where backward stops, what checkpointing recomputes and which copies the loss makes are not estimated by
formulas::

    stepped = SteppedModel(build_skeleton(config))      # on the meta device
    profile = profile_step(stepped, StepShape(rows=4, tokens=1024), device="cuda")
    print(profile.peak.activations, profile.peak.logits)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grass_ray.config import GradientCheckpointing, recomputed_layers
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.memory.allocations import AllocationLog, DeviceKind, Parts, kernel_stand_ins
from grass_ray.memory.equal_layers import LayerKind, Run, ShortenedStep, equal_runs, shortened
from grass_ray.optim.recompute import Recompute
from grass_ray.tasks.inference.lm_head import splits
from grass_ray.training.batches import Batch
from grass_ray.training.loss import summed_loss


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The work of an optimizer step.

    Attributes:
        rows: rows per micro-batch.
        tokens: tokens per row.
        labelled: positions with a label; None for all.
        padded: whether rows differ in length, so that attention needs a mask; None if there is more than one row.
        micro_batches: micro-batches per step.
        checkpointing: which decoder layers are recomputed in backward.
    """

    rows: int
    tokens: int
    labelled: int | None = None
    padded: bool | None = None
    micro_batches: int = 1
    checkpointing: GradientCheckpointing = "none"

    @property
    def label_positions(self) -> int:
        """Positions per row whose logits are computed."""
        return self.tokens if self.labelled is None else min(self.labelled, self.tokens)

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask."""
        return self.rows > 1 if self.padded is None else self.padded


@dataclass(frozen=True, kw_only=True)
class InBackward:
    """Updates inside the backward pass of the last micro-batch.

    Attributes:
        units: the parameters of each unit; it is updated, and its gradients can go, when all of them are there.
        behind: how many updates still hold their gradients when the next one begins.
        workspace: bytes that an update takes for itself.
    """

    units: Sequence[Sequence[Tensor]]
    behind: int
    workspace: int


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Memory of a step.

    Attributes:
        peak: the parts at the moment of forward and backward with most bytes.
        gradients: bytes of gradients after backward.
    """

    peak: Parts
    gradients: int


class SteppedModel:
    """A model on the meta device, with what every step through it asks for and what earlier steps have told.

    Args:
        model: its modules do not change any more.

    Attributes:
        names: of all parameters.
        stack: its decoder layers.
        buffers: all of them.
        outside: parameters of no decoder layer.
        layers: what decides what each decoder layer allocates.
        followed: steps that were followed through some of the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {p: name for name, p in model.named_parameters()}
        self.buffers = list(model.buffers())
        self.stack = find_decoder_stack(model)
        inside = {p for layer in self.stack.layers for p in layer}
        self.outside = [p for p in self.names if p not in inside]
        self.layers = [LayerKind(layer) for layer in self.stack.modules]
        self.followed: dict[Hashable, FollowedStep] = {}


def profile_step(
    stepped: SteppedModel,
    shape: StepShape,
    *,
    device: DeviceKind,
    probing: bool = False,
    in_backward: InBackward | None = None,
    dropped: frozenset[Tensor] = frozenset(),
    every_layer: bool = False,
) -> StepProfile:
    """Run forward and backward of one optimizer step on the meta device.

    Args:
        stepped: the model; parameters with ``requires_grad`` train.
        shape: work of the step.
        device: whose kernels and allocator to assume.
        probing: whether the step only measures: each gradient is freed as soon as it is complete, and every layer is
            recomputed.
        in_backward: the updates, if they are not left to the end of the step.
        dropped: parameters whose gradients are freed as soon as they are there.
        every_layer: run through every layer, also where an earlier step differs only in the number of equal layers.
    """
    recomputed = recomputed_layers(shape.checkpointing, stepped.stack.num_layers)
    if probing:
        recomputed, dropped = stepped.stack.num_layers, frozenset(stepped.names)

    def follow(runs: Sequence[Run]) -> FollowedStep:
        return _follow(stepped, shape, runs, recomputed, device=device, dropped=dropped, in_backward=in_backward)

    if not every_layer:
        runs = equal_runs(stepped.layers, recomputed, dropped)
        others = tuple(stepped.names[p] for p in stepped.outside if p.requires_grad)
        updates = None if in_backward is None else (in_backward.behind, in_backward.workspace)
        key = (device, replace(shape, checkpointing="none"), probing, updates, others, *(run.key for run in runs))
        step = stepped.followed.get(key)
        if step is None:
            step = stepped.followed[key] = follow(runs)
        if step.repeats:
            return step.profile(runs)
    runs = [Run(index, 1, None) for index in range(stepped.stack.num_layers)]
    return follow(runs).profile(runs)


@dataclass(frozen=True, kw_only=True)
class FollowedStep:
    """A step that ran through some of the layers.

    Attributes:
        step: what it allocated.
        gradients: bytes of gradients after it, by layer; -1 is everything outside of layers.
    """

    step: ShortenedStep
    gradients: Mapping[int, int]

    @property
    def repeats(self) -> bool:
        """Whether it tells what a step through more equal layers takes."""
        return self.step.repeats

    def profile(self, runs: Sequence[Run]) -> StepProfile:
        """The memory of a step through all layers of ``runs``."""
        return StepProfile(
            peak=self.step.peak(runs),
            gradients=sum(size * self.step.times(runs).get(layer, 1) for layer, size in self.gradients.items()),
        )


def _follow(
    stepped: SteppedModel,
    shape: StepShape,
    runs: Sequence[Run],
    recomputed: int,
    *,
    device: DeviceKind,
    dropped: frozenset[Tensor],
    in_backward: InBackward | None,
) -> FollowedStep:
    model, stack = stepped.model, stepped.stack
    log = AllocationLog(device, logits=_head_shape(model))
    kept: list[Callable[[Tensor], None]] = [log.mark_gradient]
    if in_backward is not None:
        kept.append(_Updates(in_backward, log, shape.micro_batches))
    handles: list[Any] = [
        p.register_post_accumulate_grad_hook(react)  # type: ignore[no-untyped-call]
        for p in stepped.names
        if p.requires_grad
        for react in ([_drop] if p in dropped else kept)
    ]
    recompute = Recompute(stack.modules[:recomputed])
    recompute.switch(True)
    handles.append(recompute)
    log.adopt((*stepped.names, *stepped.buffers))
    model.train()
    try:
        with shortened(model, stack, runs) as mark_on:
            with _mask_answers(shape.masked):
                splits(model)  # asks a forward of its own, once
            mark_on(log)
            with kernel_stand_ins(device, log), log:
                _run(model, shape)
    finally:
        for handle in handles:
            handle.remove()
    layers = {p: index for index, layer in enumerate(stack.layers) for p in layer}
    gradients: dict[int, int] = {}
    for parameter in stepped.names:
        if parameter.grad is not None:
            layer = layers.get(parameter, -1)
            gradients[layer] = gradients.get(layer, 0) + log.size_of(parameter.grad)
        parameter.grad = None
    return FollowedStep(step=ShortenedStep(runs, log.segments()), gradients=gradients)


def _run(model: nn.Module, shape: StepShape) -> None:
    """Forward and backward of all micro-batches."""
    for _ in range(shape.micro_batches):
        batch = _PlannedBatch.of(shape)
        with _mask_answers(shape.masked):
            loss = summed_loss(model, batch, divisor=batch.num_labels)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        del loss, batch


def profile_block(block: Callable[[], object], *, device: DeviceKind, inputs: Iterable[Tensor] = ()) -> int:
    """Peak memory of ``block`` on the meta device, without that of ``inputs``."""
    log = AllocationLog(device)
    log.adopt(inputs)
    with log:
        result = block()
    del result
    return log.peak().total


# ------------------------------------------------------------------------------------------------------- the step


class _PlannedBatch(Batch):
    """A batch on the meta device, whose number of labelled positions is given."""

    @classmethod
    def of(cls, shape: StepShape) -> _PlannedBatch:
        ids = torch.empty(shape.rows, shape.tokens, dtype=torch.long, device="meta")
        batch = cls(ids, torch.empty_like(ids), torch.empty_like(ids), tokens=shape.rows * shape.tokens)
        object.__setattr__(batch, "positions", shape.label_positions)
        return batch

    @property
    def num_labels(self) -> int:
        """Number of labels in the batch."""
        return int(self.input_ids.shape[0] * self._positions)

    @property
    def _positions(self) -> int:
        return int(self.__dict__["positions"])

    def labelled_positions(self) -> Tensor:
        """Positions with a label in any row, shape (positions,), on the meta device."""
        return torch.empty(self._positions, dtype=torch.long, device="meta")

    def labelled_tokens(self) -> Tensor:
        """Places of all labels in the flattened rows, shape (labels,), on the meta device."""
        return torch.empty(self.num_labels, dtype=torch.long, device="meta")


class _Updates:
    """Frees the gradients of a unit when the last micro-batch's backward has brought them all."""

    def __init__(self, told: InBackward, log: AllocationLog, micro_batches: int) -> None:
        self._told = told
        self._log = log
        self._unit_of = {p: index for index, unit in enumerate(told.units) for p in unit}
        self._missing = [len(unit) * micro_batches for unit in told.units]
        self._held: deque[Sequence[Tensor]] = deque()

    def __call__(self, parameter: Tensor) -> None:
        unit = self._unit_of[parameter]
        self._missing[unit] -= 1
        if self._missing[unit]:
            return
        # an update that begins waits for all but so many before it
        self._free(down_to=max(self._told.behind - 1, 0))
        with self._log.workspace():
            torch.empty(self._told.workspace, dtype=torch.uint8, device="meta")
        self._held.append(self._told.units[unit])
        self._free(down_to=self._told.behind)

    def _free(self, *, down_to: int) -> None:
        while len(self._held) > down_to:
            for parameter in self._held.popleft():
                parameter.grad = None


@contextmanager
def _mask_answers(padded: bool) -> Iterator[None]:
    """In the block, tensors without values answer the model when it asks whether a mask is without padding."""
    asked = Tensor.__bool__

    def answer(self: Tensor) -> bool:
        return not padded if self.is_meta else asked(self)  # others, such as a drawn number, have a value

    Tensor.__bool__ = answer  # type: ignore[assignment, method-assign]  # a TorchFunctionMode would see every operation
    try:
        yield
    finally:
        del Tensor.__bool__


def _head_shape(model: Any) -> tuple[int, int] | None:
    """Number of features and of tokens in the vocabulary, if the model's configuration has them."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if get_text_config else None
    features, vocabulary = getattr(text, "hidden_size", None), getattr(text, "vocab_size", None)
    return None if features is None or vocabulary is None else (features, vocabulary)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
