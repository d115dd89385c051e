"""Greedy and beam-search decoding with ``generate`` of transformers, a few tokens at a time.

A batch takes as long as its longest answer. So greedy decoding stops every :data:`TOKENS_AT_A_TIME` tokens and
continues with the unfinished rows and their keys and values. The answer of a row does not depend on other rows::

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
    """Stopping criterion that ends each row at one of several texts, independently of other rows.

    The criterion of lm-eval ends all rows of a batch at once, so with beam search results depend on the batch size.

    Attributes:
        lengths: number of tokens of each row when it ended, shape (rows,). Only valid for greedy decoding, in which
            rows keep their order.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.window = max(len(text.encode()) for text in stop) + 1  # a token is at least one byte of text
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return for each row whether its newest tokens contain a stop text, shape (rows,)."""
        newest = input_ids[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(newest)
        ended = torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)
        lengths = torch.where(ended, input_ids.shape[1], ENDLESS)
        self.lengths = lengths if self.lengths is None else torch.minimum(self.lengths, lengths)
        return ended


class Decoder:
    """Decodes batches, and counts the work.

    Args:
        model: causal language model with default generation settings (see ``undisturbed`` in the harness).
        tokenizer: its tokenizer, with a padding token.
        stop: texts that end a row. The caller removes what follows them.
        num_beams: number of beams; 1 is greedy decoding.

    Attributes:
        passes: number of forward passes.
        tokens: number of tokens of prompts and answers.
        padding_tokens: number of other positions that were processed.
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
        """Generate an answer for each prompt.

        Args:
            prompts: token ids, shape (rows, tokens), left-padded.
            attention_mask: of the same shape.
            max_new_tokens: maximum number of tokens of an answer.

        Returns:
            Prompts and answers, shape (rows, tokens + ``max_new_tokens``), right-padded.
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
        """Generate up to ``count`` tokens. Returns all tokens, and the length at which each row ended, or ENDLESS."""
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
        """Count new tokens, shape (rows, tokens), of which each row has ``lengths`` before its end."""
        written = int(lengths.clamp(max=new.shape[1]).sum())
        self.passes += new.shape[1]
        self.tokens += written
        self.padding_tokens += new.numel() - written
