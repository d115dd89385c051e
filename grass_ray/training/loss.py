"""The loss of a batch, and its gradients accumulated over micro-batches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from grass_ray.layerwise.generators import keyed_generator
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.tasks.inference.lm_head import Head, splits, with_head
from grass_ray.training.adapters import leading_virtual_tokens
from grass_ray.training.batches import IGNORED, Batch
from grass_ray.training.chunked_loss import chunked_cross_entropy
from grass_ray.training.report import TrainingFailure


def accumulate_gradients(
    model: Any,
    micro_batches: list[Batch],
    device: torch.device,
    *,
    optimizer: LayerwiseAdamW | None = None,
    key: tuple[int | str, ...] | None = None,
) -> float:
    """Run forward and backward over a step's micro-batches, or over this worker's share of them.

    Args:
        model: the model, on ``device``.
        micro_batches: of all workers; their number is a multiple of the number of workers.
        device: where the micro-batches go.
        optimizer: its workers share the micro-batches, and it is told of the last one; None takes all of them here.
        key: name of the step. Random numbers (dropout) are keyed by it and by the micro-batch's place in the step, so
            that neither a resume nor the number of workers changes them; None leaves torch's generator as it is.

    Returns:
        The mean loss in nats over the labels of all micro-batches, the same on every worker.

    Raises:
        TrainingFailure: none of them has a label; one of several may be without.
    """
    num_labels = sum(batch.num_labels for batch in micro_batches)
    if not num_labels:
        raise TrainingFailure("failed", "no token of the batch has a label, so there is no loss")
    places = list(enumerate(micro_batches))
    own = places if optimizer is None else optimizer.workers.share(places)
    losses: list[Tensor] = []
    for place, batch in own:
        if key is not None:
            torch.manual_seed(keyed_generator("dropout", *key, place).initial_seed())
        loss = summed_loss(model, batch.to(device), divisor=num_labels)
        if optimizer is not None:
            optimizer.last_micro_batch = place == own[-1][0]
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    total = float(torch.stack(losses).sum())
    return total if optimizer is None else optimizer.workers.sum([total])[0]


def summed_loss(model: Any, batch: Batch, *, divisor: float = 1.0) -> Tensor:
    """Compute the cross-entropy summed over the labels of one micro-batch.

    Logits are computed for the labelled tokens only, and a chunk of them at a time
    (:mod:`grass_ray.training.chunked_loss`), unless the model's head cannot be run on its own.

    Args:
        model: a causal language model, possibly with adapters.
        batch: on the model's device.
        divisor: of the sum.

    Returns:
        A scalar in nats, float32, with a graph unless gradients are off.
    """
    # documents that share a row are told apart by their positions, and then no mask may say otherwise
    if batch.position_ids is None:
        told = {"attention_mask": batch.attention_mask}
    else:
        told = {"position_ids": batch.position_ids}
    inputs = {"input_ids": batch.input_ids, "use_cache": False, **told}
    if not splits(model):
        return _loss_of_all_logits(model, batch, inputs) / divisor
    labelled = batch.labelled_tokens()
    labels = batch.labels.flatten()[labelled]

    def loss(hidden: Tensor, head: Head) -> Tensor:
        own = hidden[:, -batch.labels.shape[1] :]  # virtual tokens come before the text
        return chunked_cross_entropy(own.flatten(0, 1)[labelled], labels, head, divisor=divisor)

    return with_head(model, loss, **inputs)


def _loss_of_all_logits(model: Any, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    virtual = leading_virtual_tokens(model)
    labels = batch.labels
    # the LM head is a large part of a small model: leave out positions where no row has a label
    if keeps_logits(model):
        labelled = batch.labelled_positions()
        inputs = {**inputs, "logits_to_keep": labelled + virtual}
        labels = labels[:, labelled]
        virtual = 0
    logits = model(**inputs).logits[:, virtual:].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def keeps_logits(model: Any) -> bool:
    """Return whether the model can compute logits at some positions only (``logits_to_keep``; most decoders can)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
