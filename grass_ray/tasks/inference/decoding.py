"""Greedy and beam-search decoding with transformers' ``generate``, a few tokens at a time.

A batch is as slow as its longest answer. So greedy decoding stops every :data:`TOKENS_AT_A_TIME` tokens and goes on
with the rows that are not finished, on their keys and values so far; what a row says does not depend on the others::

    decoder = Decoder(model, tokenizer, stop=["### Instruction:"])
    tokens = decoder.generate(prompts, attention_mask, max_new_tokens=256)       # (rows, prompt and answer)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from grass_ray.tasks.inference.keys_values import base_model, new_cache

TOKENS_AT_A_TIME = 16
ENDLESS = 2**31


class StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at one of several texts, whatever the other rows of its batch do.

    lm-eval's own rule ends a batch at once, which beam search turns into a dependence on the batch size. ``lengths``
    are the tokens of each row (rows,) when it ended; of greedy decoding only, where rows stay in their places.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.window = max(len(text.encode()) for text in stop) + 1  # a token is at least one byte of text
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """True for every row (rows,) whose newest tokens contain a stop text."""
        newest = input_ids[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(newest)
        ended = torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)
        lengths = torch.where(ended, input_ids.shape[1], ENDLESS)
        self.lengths = lengths if self.lengths is None else torch.minimum(self.lengths, lengths)
        return ended


class Decoder:
    """Decodes batches and counts what it takes.

    Args:
        model: a causal language model whose generation settings are plain (see ``undisturbed`` in the harness).
        tokenizer: its tokenizer, with a padding token.
        stop: texts that end a row; what follows is for the caller to cut.
        num_beams: 1 is greedy.

    Attributes:
        passes: forward passes so far.
        tokens: tokens of prompts and answers so far.
        padding_tokens: positions that were computed for neither.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = (), num_beams: int = 1
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop = stop
        self._num_beams = num_beams
        base = base_model(model)
        self._ends = torch.tensor(base.generation_config.eos_token_id, device=base.device).view(-1)
        self.passes = self.tokens = self.padding_tokens = 0

    @torch.no_grad()
    def generate(self, prompts: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
        """Prompts and answers.

        Args:
            prompts: (rows, tokens), left-padded.
            attention_mask: of the same shape.
            max_new_tokens: most tokens of an answer.

        Returns:
            (rows, tokens + ``max_new_tokens``); a row that ended early is filled up with the padding token.
        """
        rows, width = prompts.shape
        self.tokens += int(attention_mask.sum())
        self.padding_tokens += int((attention_mask == 0).sum())
        cache = new_cache(self._model) if self._num_beams == 1 else {}
        answers = torch.full((rows, max_new_tokens), int(self._tokenizer.pad_token_id), device=prompts.device)
        places = torch.arange(rows, device=prompts.device)
        ids, mask, done = prompts, attention_mask, 0
        while len(places) and done < max_new_tokens:
            count = min(TOKENS_AT_A_TIME, max_new_tokens - done) if cache else max_new_tokens
            ids, lengths = self._advance(ids, mask, cache, count, width)
            new = ids[:, width + done :]
            answers[places, done : done + new.shape[1]] = new
            self._count(new, lengths - width - done)
            if not cache:
                break
            done += new.shape[1]
            going = (lengths == ENDLESS).nonzero().squeeze(1)
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)[going]
            ids, places = ids[going], places[going]
            if len(going) < len(lengths):
                next(iter(cache.values())).batch_select_indices(going)
        return torch.cat([prompts, answers], dim=1)

    def _advance(
        self, ids: Tensor, mask: Tensor, cache: dict[str, Any], count: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Up to ``count`` more tokens: (all tokens of the rows, how many a row had when it ended, or ENDLESS)."""
        rule = StopAtText(self._stop, self._tokenizer, width) if self._stop else None
        tokens: Tensor = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            num_beams=self._num_beams,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([rule] if rule else []),
            **cache,
        )
        before = ids.shape[1]
        ends = torch.isin(tokens[:, before:], self._ends)
        first = torch.where(ends.any(1), ends.int().argmax(1) + before + 1, ENDLESS)
        if self._num_beams == 1 and rule is not None and rule.lengths is not None:
            first = torch.minimum(first, rule.lengths)
        return tokens, first

    def _count(self, new: Tensor, lengths: Tensor) -> None:
        """Take note of (rows, new tokens), of which each row has ``lengths`` before its end."""
        written = int(lengths.clamp(max=new.shape[1]).sum())
        self.passes += new.shape[1]
        self.tokens += written
        self.padding_tokens += new.numel() - written
