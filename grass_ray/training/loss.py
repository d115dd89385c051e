"""The loss of a batch, and its gradients accumulated over micro-batches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from grass_ray.layerwise.generators import keyed_generator
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.training.adapters import leading_virtual_tokens
from grass_ray.training.batches import IGNORED, Batch


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
    """Compute the cross-entropy summed over the labels of one micro-batch.

    Args:
        model: a causal language model, possibly with adapters.
        batch: on the model's device.

    Returns:
        A scalar in nats, float32, with a graph unless gradients are off.
    """
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


def keeps_logits(model: Any) -> bool:
    """Return whether the model can compute logits at some positions only (``logits_to_keep``; most decoders can)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
