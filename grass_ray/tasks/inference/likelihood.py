"""How likely a model finds continuations of contexts, without computing anything twice.

What lm-eval asks for is the log-likelihood of every option after its prompt. Options that differ in their last token
share one row; the tokens that all rows begin with (the template, the question's first words) go through the model once;
the output layer, a fifth of a small model, runs where options stand and nowhere else::

    rows = share_rows([(context_ids, continuation_ids), ...], max_length=2048)
    scorer = Scorer(model, rows)
    scores = scorer.score(rows[:16])        # for each row: one (log-likelihood, greedy) a continuation
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grass_ray.tasks.inference.keys_values import accepts, base_model, has_virtual_tokens, new_cache

MIN_SHARED = 4  # shorter beginnings are not worth a pass of their own

Score = tuple[float, bool]


@dataclass
class Row:
    """What goes through the model: ``tokens``, and the continuations that end one token after it.

    ``continuations`` are (number of the request, its token ids): tokens of the row, and one more.
    """

    tokens: list[int]
    continuations: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def start(self) -> int:
        """The first position whose prediction counts."""
        return len(self.tokens) - max(len(ids) for _, ids in self.continuations)


def share_rows(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """One row for all requests (context, continuation) that are the same but for their last token.

    What exceeds ``max_length`` tokens is cut off at the left, as lm-eval does.
    """
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(max_length + 1) :][:-1]
        rows.setdefault(tuple(tokens), Row(tokens)).continuations.append((number, continuation))
    return list(rows.values())


class Scorer:
    """Scores batches of ``rows`` of one task.

    Args:
        model: a causal language model on one device, in evaluation mode.
        rows: all rows that will be scored: what they begin with is computed once.
    """

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        self._model = model
        self._device = base_model(model).device
        # virtual tokens stand before a row's own: then all of it comes out, and is cut afterwards
        self._keeps_logits = accepts(model, "logits_to_keep") and not has_virtual_tokens(model)
        self.shared = 0
        self._cache: dict[str, Any] = {}
        if len(rows) > 1:
            self._share_beginning(rows)

    @torch.no_grad()
    def _share_beginning(self, rows: Sequence[Row]) -> None:
        length = min(_shared_length([row.tokens for row in rows]), *(row.start for row in rows))
        cache = new_cache(self._model, sliding=False)
        if length < MIN_SHARED or not cache:
            return
        ids = torch.tensor([rows[0].tokens[:length]], device=self._device)
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options, **cache)
        self.shared, self._cache = length, cache

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[list[Score]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of the continuations of each row."""
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
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # in dictionary order: what these two share, all share
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


def _read(logits: Tensor, end: int, continuations: Sequence[tuple[int, list[int]]]) -> list[Score]:
    """The scores of continuations that end at position ``end`` of a row's logits (positions, vocabulary)."""
    longest = max(len(ids) for _, ids in continuations)
    logp = logits[end - longest : end].float().log_softmax(-1)
    greedy = logp.argmax(-1)
    scores = []
    for _, ids in continuations:
        wanted = torch.tensor(ids, device=logits.device)
        value = logp[-len(ids) :].gather(1, wanted[:, None]).sum()
        scores.append((float(value), bool((greedy[-len(ids) :] == wanted).all())))
    return scores
