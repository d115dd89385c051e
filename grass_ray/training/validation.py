"""Training rows held out for choosing settings: never trained on, never test questions.

The rows are chosen by a fixed seed, so that every method, seed and learning rate of a comparison is judged by the same
ones::

    train, held_out = hold_out(rows, 64)
    answer_loss(run.state.model, Batches(held_out, ..., batch_size=1, accumulation_steps=1), device)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grass_ray.config import ConfigError
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.tasks.rows import Row
from grass_ray.training.batches import Batches
from grass_ray.training.loss import summed_loss


def hold_out(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Split off ``count`` rows: (rows to train on, held-out rows), both in their order.

    A row that stands in the data twice would be trained on and judged by; copies of held-out rows are left out of both.

    Raises:
        ConfigError: nothing would be left to train on.
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
    """Mean cross-entropy in nats over the labels of ``batches``, which hold one row a step, without dropout.

    One row at a time: the value depends neither on a batch size nor on padding.
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
