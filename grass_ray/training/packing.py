"""Check before training that a model keeps the documents of a packed row apart.

Documents in a row are marked by position ids that restart at 0. Most decoders of transformers derive attention
boundaries and positions from them. Some do not (recurrent layers, attention biased by the distance in the row) and
would silently let a document attend to the previous one::

    check_packing(model)        # ConfigError unless a document has the same logits alone and after another document
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from grass_ray.config import AdapterConfig, ConfigError

# largest difference of logits that rounding explains, relative to the largest logit
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ADVICE = "use data.batching=bucketed, or plain"


def check_packed_adapter(adapter: AdapterConfig | None) -> None:
    """Raise :class:`ConfigError` if the adapter adds virtual tokens in front of each row."""
    if adapter is not None and not adapter.can("pack"):
        raise ConfigError(
            f"data.batching=packed puts several documents into a row, but {adapter.kind} tuning has virtual tokens "
            f"before a row, not before each document; {ADVICE}"
        )


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raise :class:`ConfigError` unless ``model`` keeps the documents of a row apart. Two short forward passes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ConfigError(f"data.batching=packed needs a model that takes position ids, and {name} does not; {ADVICE}")
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(23, device=base.device) * 7 % vocabulary).unsqueeze(0)
    first, second = 9, 14
    positions = torch.cat([torch.arange(first), torch.arange(second)]).to(base.device).unsqueeze(0)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, first:].float()
        alone = model(input_ids=ids[:, first:], use_cache=False).logits[0].float()
    finally:
        for module, mode in modes.items():
            module.training = mode
    difference = float((packed - alone).abs().max() / alone.abs().max())
    if not difference <= TOLERANCES.get(base.dtype, TOLERANCES[torch.bfloat16]):
        attention = getattr(base.config, "_attn_implementation", "unknown")
        raise ConfigError(
            f"data.batching=packed keeps documents apart by position ids, but {name} with {attention} attention gives "
            f"a document other logits behind another document than alone (by {difference:.1g} of the largest); {ADVICE}"
        )
