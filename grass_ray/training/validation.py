"""Training rows held out for model selection. They are neither trained on nor part of a test set.

A fixed seed selects them, so all methods, seeds and learning rates of a comparison are evaluated on the same rows::

    train, held_out = hold_out(rows, 64)
    answer_loss(run.state.model, Batches(held_out, ..., batch_size=1, accumulation_steps=1), device)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grass_ray.config import ConfigError
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.tasks.rows import AnyRow
from grass_ray.training.batches import Batches
from grass_ray.training.loss import summed_loss


def hold_out(rows: Sequence[AnyRow], count: int) -> tuple[list[AnyRow], list[AnyRow]]:
    """Split rows into training and held-out rows, both in the given order.

    Copies of a held-out row are removed from the training rows.

    Args:
        rows: all rows.
        count: number of rows to hold out.

    Returns:
        The training rows and the held-out rows.

    Raises:
        ConfigError: no row would be left for training.
    """
    distinct = list(dict.fromkeys(rows))
    if count >= len(distinct):
        raise ConfigError(
            f"data.validation_rows={count} of {len(distinct)} different training rows leaves nothing to train on; "
            f"give 1 to {len(distinct) - 1}"
        )
    order = torch.randperm(len(distinct), generator=keyed_generator("validation")).tolist()
    chosen = {distinct[index] for index in order[:count]}
    return [row for row in rows if row not in chosen], [row for row in distinct if row in chosen]


@torch.no_grad()
def answer_loss(model: Any, batches: Batches, device: torch.device) -> float:
    """Return the mean cross-entropy over all labels, in nats, without dropout.

    Args:
        model: the model, on ``device``.
        batches: the held-out rows with a batch size of 1, so that the value does not depend on padding.
        device: where the batches are moved to.
    """
    training = model.training
    model.eval()
    total, labels = 0.0, 0
    for step in range(batches.summary()["train_rows_used"]):
        (batch,) = batches[step]
        total += float(summed_loss(model, batch.to(device)))
        labels += batch.num_labels
    model.train(training)
    return total / labels
