"""What a model forgets: its loss on a text that has nothing to do with the task, before and after training.

The loss is the mean over all tokens of the passages but the first of each, in nats, with at most
:data:`MOST_TOKENS` tokens of each passage. Before training it is that of the base model, without an adapter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from grass_ray.config import RunConfig
from grass_ray.optim.sharded import reshard
from grass_ray.tasks.encoding import encode_prompt
from grass_ray.tasks.inference.batching import Batcher
from grass_ray.tasks.inference.keys_values import base_model
from grass_ray.tasks.inference.learned import Learned, summed_losses
from grass_ray.tasks.unrelated import Unrelated, load_unrelated
from grass_ray.training.models import describe_model
from grass_ray.training.report import FORGETTING

MOST_TOKENS = 768


class Forgetting:
    """The loss of a run on an unrelated text. Made before training, when the model still is the base model.

    Collective: make it and call :meth:`metrics` on every rank if the model is sharded.

    Args:
        config: the run, with a text in ``evaluation.forgetting``.
        model: the base model, possibly with an adapter, which is left out.
        tokenizer: its tokenizer.
    """

    def __init__(self, config: RunConfig, model: Any, tokenizer: Any) -> None:
        assert config.evaluation.forgetting is not None
        self._text = load_unrelated(config.evaluation.forgetting)
        self._tokenizer = tokenizer
        adapter = config.method.adapter
        positions = describe_model(config.model).max_positions
        virtual = 0 if adapter is None else adapter.virtual_tokens
        self._positions = None if positions is None else positions - virtual
        # the model inside peft's: with prompts switched off, peft's model keeps a forward that was made before
        with without_adapter(model):
            self._before = self._measure(base_model(model))

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the text is from, for the record."""
        return self._text.provenance

    def metrics(self, model: Any) -> dict[str, float]:
        """Measure the trained model, and return both losses and their difference by MLflow key."""
        after = self._measure(model)
        return {
            f"{FORGETTING}/loss_before": self._before,
            f"{FORGETTING}/loss_after": after,
            FORGETTING: after - self._before,
        }

    def _measure(self, model: Any) -> float:
        loss = loss_on(model, self._tokenizer, self._text, positions=self._positions)
        reshard(model)
        return loss


def loss_on(model: Any, tokenizer: Any, text: Unrelated, *, positions: int | None) -> float:
    """Return the mean loss per token in nats; the model is left in the mode it was in.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: the passages.
        positions: the longest sequence of the model in tokens; None if it is not limited.
    """
    most = min(MOST_TOKENS, positions or MOST_TOKENS)
    rows: list[Learned] = []
    for passage in text.passages:
        ids = encode_prompt(tokenizer, passage)[:most]
        if len(ids) > 1:
            rows.append((ids, [1] * len(ids)))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batcher = Batcher("auto", next(model.parameters()).device.type)
        losses = batcher.run(rows, [len(ids) for ids, _ in rows], lambda batch: summed_losses(model, batch))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return sum(losses) / sum(len(ids) - 1 for ids, _ in rows)


def without_adapter(model: Any) -> AbstractContextManager[None]:
    """The base model inside the block, if the model has an adapter."""
    disabled: AbstractContextManager[None] = getattr(model, "disable_adapter", nullcontext)()
    return disabled
