"""Greedy and beam-search decoding with ``generate`` of transformers, a few tokens at a time.

A batch takes as long as its longest answer. So greedy decoding stops every :data:`TOKENS_AT_A_TIME` tokens and
continues with the unfinished rows and their keys and values. Prompts are read in groups of similar length, which need
little padding, and the tokens with which all of them begin are read once; then all rows are answered together, since a
pass over one token costs much the same for many rows. The answer of a row does not depend on other rows::

    decoder = Decoder(model, tokenizer, stop=["### Instruction:"])
    tokens = decoder.generate(prompts, attention_mask, max_new_tokens=256)       # (rows, prompt and answer)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from grass_ray.tasks.inference.batching import pass_tokens, similar_groups
from grass_ray.tasks.inference.keys_values import base_model, joined, new_cache
from grass_ray.tasks.inference.likelihood import MIN_SHARED, call_head, shared_length

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
        rows = len(prompts)
        answers = torch.full((rows, max_new_tokens), int(self._tokenizer.pad_token_id), device=prompts.device)
        places = torch.arange(rows, device=prompts.device)
        ids, mask, done, width = prompts, attention_mask, 0, prompts.shape[1]
        cache = new_cache(self._model, sliding=False) if self._num_beams == 1 else {}
        if cache:
            places = attention_mask.sum(1).argsort(descending=True, stable=True)
            ids, mask, lengths, cache = self._read(prompts[places], attention_mask[places], next(iter(cache)))
            width, done = ids.shape[1] - 1, 1
            answers[places, 0] = ids[:, -1]
            ids, mask, places = self._go_on(ids, mask, places, lengths, cache)
        else:
            self.tokens += int(attention_mask.sum())
            self.padding_tokens += int((attention_mask == 0).sum())
            cache = new_cache(self._model) if self._num_beams == 1 else {}
        while len(places) and done < max_new_tokens:
            count = min(TOKENS_AT_A_TIME, max_new_tokens - done) if cache else max_new_tokens
            ids, lengths = self._advance(ids, mask, cache, count, width)
            new = ids[:, width + done :]
            answers[places, done : done + new.shape[1]] = new
            self._count(new, lengths - width - done)
            if not cache:
                break
            done += new.shape[1]
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
            ids, mask, places = self._go_on(ids, mask, places, lengths, cache)
        return torch.cat([prompts, answers], dim=1)

    def _go_on(
        self, ids: Tensor, mask: Tensor, places: Tensor, lengths: Tensor, cache: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leave out the rows that have ended, in the cache as well."""
        going = (lengths == ENDLESS).nonzero().squeeze(1)
        if len(going) < len(lengths):
            next(iter(cache.values())).batch_select_indices(going)
        return ids[going], mask[going], places[going]

    def _read(self, prompts: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Read prompts, longest first, and generate the first token of each answer.

        Returns:
            All tokens, left-padded; their mask; the length at which each row ended, or ENDLESS; and the cache of all
            but the last token, under its ``name``.
        """
        rows = [prompt[own.bool()] for prompt, own in zip(prompts, mask, strict=True)]
        shared, beginning = self._share_beginning(rows, name)
        pad = int(self._tokenizer.pad_token_id)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        caches: list[Any] = []
        lengths = [len(row) - shared for row in rows]
        start = 0
        for count in similar_groups(lengths, pass_tokens(prompts.device.type)):
            own, width = rows[start : start + count], lengths[start]
            # the padding is behind the shared beginning, whose keys are those of all rows
            ids = torch.stack(
                [
                    torch.cat([row[:shared], row.new_full((width - len(row) + shared,), pad), row[shared:]])
                    for row in own
                ]
            )
            seen = torch.ones_like(ids)
            for place, row in enumerate(own):
                seen[place, shared : shared + width - (len(row) - shared)] = 0
            cache = copy.deepcopy(beginning)
            if shared:
                cache.batch_repeat_interleave(count)
            ids, ends = self._advance(ids, seen, {name: cache}, 1, shared + width)
            self._count(ids[:, -1:], ends - shared - width)
            self.tokens += int(seen[:, shared:].sum())
            self.padding_tokens += int((seen == 0).sum())
            parts.append((ids, torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1), ends))
            caches.append(cache)
            start += count
        longest = max(ids.shape[1] for ids, _, _ in parts)
        return (
            torch.cat([functional.pad(ids, (longest - ids.shape[1], 0), value=pad) for ids, _, _ in parts]),
            torch.cat([functional.pad(seen, (longest - seen.shape[1], 0)) for _, seen, _ in parts]),
            torch.cat([ends for _, _, ends in parts]),
            {name: joined(caches)},
        )

    def _share_beginning(self, rows: Sequence[Tensor], name: str) -> tuple[int, Any]:
        """Read what all prompts begin with, if that is worth a pass; its length, and its cache."""
        cache = new_cache(self._model, sliding=False)[name]
        length = min(shared_length([row.tolist() for row in rows]), *(len(row) - 1 for row in rows), ENDLESS)
        if length < MIN_SHARED or length * (len(rows) - 1) <= pass_tokens(rows[0].device.type):
            return 0, cache
        ids = rows[0][None, :length]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True, name: cache}
        call_head(self._model, 1, lambda states, head, chunk: None, inputs)
        self.tokens += length
        self.passes += 1
        return length, cache

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
