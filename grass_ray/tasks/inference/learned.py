"""Loss of chosen tokens of whole rows: one forward pass per batch, however many turns a conversation has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grass_ray.tasks.inference.keys_values import base_model
from grass_ray.tasks.inference.likelihood import call_head, read_tokens

Learned = tuple[list[int], list[int]]  # token ids, and 1 for those whose loss counts


@torch.no_grad()
def summed_losses(model: Any, rows: Sequence[Learned]) -> list[float]:
    """Return the cross-entropy in nats summed over the chosen tokens of each row.

    Args:
        model: causal language model on one device, in evaluation mode.
        rows: token ids, and 1 for each token whose loss counts; the first token of a row has none.
    """
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, (tokens, _) in enumerate(rows):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        mask[place, : len(tokens)] = 1
    device = base_model(model).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    # the state at a position predicts the next token
    wanted = [
        (place * longest + step - 1, token)
        for place, (tokens, learned) in enumerate(rows)
        for step, token in enumerate(tokens)
        if step and learned[step]
    ]
    found = iter(call_head(model, longest, lambda *parts: read_tokens(wanted, *parts), inputs))
    return [-sum(next(found)[0] for own in learned[1:] if own) for _, learned in rows]
