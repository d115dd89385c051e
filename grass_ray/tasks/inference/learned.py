"""Loss of chosen tokens of whole rows: one forward pass per batch, however many turns a conversation has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional

from grass_ray.tasks.inference.keys_values import accepts, base_model, has_virtual_tokens

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
    mask, counts = torch.zeros_like(ids), torch.zeros_like(ids)
    for place, (tokens, learned) in enumerate(rows):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        mask[place, : len(tokens)] = 1
        counts[place, : len(tokens) - 1] = torch.tensor(learned[1:])
    targets = ids.roll(-1, dims=1)
    device = base_model(model).device
    needed = counts.any(dim=0).nonzero().squeeze(1)
    options: dict[str, Any] = {"use_cache": False}
    keeps = accepts(model, "logits_to_keep") and not has_virtual_tokens(model)
    if keeps:
        options["logits_to_keep"] = needed.to(device)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).logits
    logits = logits if keeps else logits[:, -longest:][:, needed.to(device)]  # virtual tokens stand before the row
    return [
        float((functional.cross_entropy(row.float(), target.to(device), reduction="none") * count.to(device)).sum())
        for row, target, count in zip(logits, targets[:, needed], counts[:, needed], strict=True)
    ]
