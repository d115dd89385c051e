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
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from grass_ray.tasks.inference.keys_values import base_model, new_cache
from grass_ray.tasks.inference.lm_head import CHUNK_POSITIONS, splits, with_head

MIN_SHARED = 4  # shorter common beginnings are not worth a forward pass

Score = tuple[float, bool]
T = TypeVar("T")


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
        self.shared = 0
        self._cache: dict[str, Any] = {}
        if len(rows) > 1:
            self._share_beginning(rows)

    @torch.no_grad()
    def _share_beginning(self, rows: Sequence[TokenRow]) -> None:
        length = min(shared_length([row.tokens for row in rows]), *(row.start for row in rows))
        cache = new_cache(self._model, sliding=False)
        if length < MIN_SHARED or not cache:
            return
        ids = torch.tensor([rows[0].tokens[:length]], device=self._device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True, **cache}
        call_head(self._model, length, lambda states, head, chunk: None, inputs)
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
        inputs = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device), **options}
        wanted = [
            (place * longest + len(tokens) - len(continuation) + step, token)
            for place, (row, tokens) in enumerate(zip(rows, own, strict=True))
            for _, continuation in row.continuations
            for step, token in enumerate(continuation)
        ]
        found = iter(call_head(self._model, longest, lambda *parts: read_tokens(wanted, *parts), inputs))
        return [
            [_sum(itertools.islice(found, len(continuation))) for _, continuation in row.continuations] for row in rows
        ]


def call_head(
    model: Any, length: int, use: Callable[[Tensor, Callable[[Tensor], Tensor], int], T], inputs: dict[str, Any]
) -> T:
    """Call ``use`` with the hidden states of the last ``length`` positions, the head, and its chunk of positions.

    If the head cannot be run on its own, the logits stand in for the hidden states.
    """
    if splits(model):
        return with_head(model, lambda hidden, head: use(hidden[:, -length:], head, head.chunk), **inputs)
    return use(model(**inputs).logits[:, -length:], lambda logits: logits, CHUNK_POSITIONS)


def shared_length(rows: Sequence[list[int]]) -> int:
    """Return the length of the common beginning of all rows."""
    first, last = min(rows), max(rows)  # in lexicographic order, so all rows share what these two share
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


def _sum(tokens: Iterable[Score]) -> Score:
    """The score of a continuation from those of its tokens."""
    values, greedy = zip(*tokens, strict=True)
    return sum(values), all(greedy)


def read_tokens(
    wanted: Sequence[tuple[int, int]], states: Tensor, head: Callable[[Tensor], Tensor], chunk: int
) -> list[Score]:
    """The log-likelihood of each wanted (place in the flattened states, token), and whether it is the likeliest.

    A place at which several tokens are wanted, as several options begin there, goes through the head once.
    """
    device = states.device
    places, which = torch.unique(torch.tensor([place for place, _ in wanted], device=device), return_inverse=True)
    tokens = torch.tensor([token for _, token in wanted], device=device)
    chosen = states.flatten(0, 1)[places]
    values = torch.empty(len(wanted), dtype=torch.float32, device=device)
    greedy = torch.empty(len(wanted), dtype=torch.bool, device=device)
    for start in range(0, len(places), chunk):
        log_p = head(chosen[start : start + chunk]).float().log_softmax(-1)
        here = ((which >= start) & (which < start + chunk)).nonzero().squeeze(1)
        row, token = which[here] - start, tokens[here]
        values[here] = log_p[row, token]
        greedy[here] = log_p.argmax(-1)[row] == token
    return list(zip(values.tolist(), greedy.tolist(), strict=True))
