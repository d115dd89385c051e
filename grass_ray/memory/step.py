"""Profile the memory of one training step without allocating it, on torch's meta device.

The forward pass of the model, the loss of the training loop and the backward pass of autograd run on tensors that have
shapes but no memory, and :mod:`grass_ray.memory.allocations` records when each storage is allocated and freed. So what
autograd saves, where backward stops, what checkpointing recomputes and which copies the loss makes are not estimated by
formulas::

    model = build_skeleton(config)                      # on the meta device
    profile = profile_step(model, StepShape(rows=4, tokens=1024), device="cuda")
    print(profile.peak.activations, profile.peak.logits)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grass_ray.config import GradientCheckpointing, recomputed_layers
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.memory.allocations import AllocationLog, DeviceKind, Parts, kernel_stand_ins
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
class StepProfile:
    """Memory of a step.

    Attributes:
        peak: the parts at the moment of forward and backward with most bytes.
        gradients: bytes of gradients after backward.
    """

    peak: Parts
    gradients: int


def profile_step(
    model: nn.Module,
    shape: StepShape,
    *,
    device: DeviceKind,
    probing: bool = False,
) -> StepProfile:
    """Run forward and backward of one optimizer step on the meta device.

    Args:
        model: on the meta device; parameters with ``requires_grad`` train.
        shape: work of the step.
        device: whose kernels and allocator to assume.
        probing: whether the step only measures: each gradient is freed as soon as it is complete, and every layer is
            recomputed.
    """
    log = AllocationLog(device, logits=_head_shape(model))
    handles: list[Any] = [
        p.register_post_accumulate_grad_hook(_drop if probing else log.mark_gradient)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    model.train()
    with _MaskAnswers(shape.masked):
        splits(model)  # asks a forward of its own, once
    layers = find_decoder_stack(model).modules
    recompute = Recompute(layers if probing else layers[: recomputed_layers(shape.checkpointing, len(layers))])
    recompute.switch(True)
    handles.append(recompute)
    log.adopt(tensor for tensor in (*model.parameters(), *model.buffers()))
    try:
        with kernel_stand_ins(device, log), log:
            for _ in range(shape.micro_batches):
                batch = _PlannedBatch.of(shape)
                with _MaskAnswers(shape.masked):
                    loss = summed_loss(model, batch, divisor=batch.num_labels)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss, batch
    finally:
        for handle in handles:
            handle.remove()
    left = sum(log.size_of(p.grad) for p in model.parameters() if p.grad is not None)
    for parameter in model.parameters():
        parameter.grad = None
    return StepProfile(peak=log.peak(), gradients=left)


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


class _MaskAnswers(TorchFunctionMode):
    """Gives an answer where the model asks whether a mask has padding, since meta tensors have no values."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self._padded = padded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:  # others, such as a drawn number, have a value
            return not self._padded
        return func(*args, **(kwargs or {}))


def _head_shape(model: Any) -> tuple[int, int] | None:
    """Number of features and of tokens in the vocabulary, if the model's configuration has them."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if get_text_config else None
    features, vocabulary = getattr(text, "hidden_size", None), getattr(text, "vocab_size", None)
    return None if features is None or vocabulary is None else (features, vocabulary)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
