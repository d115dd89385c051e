"""Log-likelihoods of continuations of contexts, without computing anything twice.

lm-eval asks for the log-likelihood of each option after its prompt. Options that differ only in their last token share
one row. The tokens with which all rows begin (the template, for example) are processed once. The output layer, a fifth
of a small model, only runs at the positions of options::

    rows = share_rows([(context_ids, continuation_ids), ...], max_length=2048)
    scorer = Scorer(model, rows)
    scores = scorer.score(rows[:16])        # per row and continuation: (log-likelihood, whether it is greedy)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grass_ray.tasks.inference.keys_values import accepts, base_model, has_virtual_tokens, new_cache

MIN_SHARED = 4  # shorter common beginnings are not worth a forward pass

Score = tuple[float, bool]


@dataclass
class TokenRow:
    """A row that the model processes.

    Attributes:
        tokens: token ids.
        continuations: number and token ids of each request that ends one token after the row.
    """

    tokens: list[int]
    continuations: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def start(self) -> int:
        """First position whose prediction is needed."""
        return len(self.tokens) - max(len(ids) for _, ids in self.continuations)


def share_rows(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[TokenRow]:
    """Make one row for all requests (context, continuation) that only differ in their last token.

    Longer ones than ``max_length`` tokens are truncated on the left, as in lm-eval.
    """
    rows: dict[tuple[int, ...], TokenRow] = {}
    for number, (context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(max_length + 1) :][:-1]
        rows.setdefault(tuple(tokens), TokenRow(tokens)).continuations.append((number, continuation))
    return list(rows.values())


class Scorer:
    """Scores batches of rows of one task.

    Args:
        model: causal language model on one device, in evaluation mode.
        rows: all rows that will be scored. Their common beginning is processed once.
    """

    def __init__(self, model: Any, rows: Sequence[TokenRow]) -> None:
        self._model = model
        self._device = base_model(model).device
        # positions to keep do not count virtual tokens; all logits are computed then, and cut afterwards
        self._keeps_logits = accepts(model, "logits_to_keep") and not has_virtual_tokens(model)
        self.shared = 0
        self._cache: dict[str, Any] = {}
        if len(rows) > 1:
            self._share_beginning(rows)

    @torch.no_grad()
    def _share_beginning(self, rows: Sequence[TokenRow]) -> None:
        length = min(_shared_length([row.tokens for row in rows]), *(row.start for row in rows))
        cache = new_cache(self._model, sliding=False)
        if length < MIN_SHARED or not cache:
            return
        ids = torch.tensor([rows[0].tokens[:length]], device=self._device)
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options, **cache)
        self.shared, self._cache = length, cache

    @torch.no_grad()
    def score(self, rows: Sequence[TokenRow]) -> list[list[Score]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of the continuations of each row."""
        own = [row.tokens[self.shared :] for row in rows]
        longest = max(len(tokens) for tokens in own)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.zeros((len(rows), self.shared + longest), dtype=torch.long)
        for place, tokens in enumerate(own):
            ids[place, : len(tokens)] = torch.tensor(tokens)
            mask[place, : self.shared + len(tokens)] = 1
        options: dict[str, Any] = {"use_cache": False}
        for name, cache in copy.deepcopy(self._cache).items():
            cache.batch_repeat_interleave(len(rows))
            options = {"use_cache": True, name: cache}
        first = min(row.start for row in rows) - self.shared
        if self._keeps_logits:
            options["logits_to_keep"] = torch.arange(first, longest, device=self._device)
        logits = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device), **options).logits
        logits = logits[:, -(longest - first) :]
        return [
            _read(logits[place], len(row.tokens) - self.shared - first, row.continuations)
            for place, row in enumerate(rows)
        ]


def _shared_length(rows: Sequence[list[int]]) -> int:
    """Return the length of the common beginning of all rows."""
    first, last = min(rows), max(rows)  # in lexicographic order, so all rows share what these two share
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


def _read(logits: Tensor, end: int, continuations: Sequence[tuple[int, list[int]]]) -> list[Score]:
    """Score continuations that end at position ``end`` of the logits of a row, shape (positions, vocabulary)."""
    longest = max(len(ids) for _, ids in continuations)
    logp = logits[end - longest : end].float().log_softmax(-1)
    greedy = logp.argmax(-1)
    scores = []
    for _, ids in continuations:
        wanted = torch.tensor(ids, device=logits.device)
        value = logp[-len(ids) :].gather(1, wanted[:, None]).sum()
        scores.append((float(value), bool((greedy[-len(ids) :] == wanted).all())))
    return scores
