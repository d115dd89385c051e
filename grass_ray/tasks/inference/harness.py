"""The Hugging Face model of lm-eval, with faster inference that does not depend on the batch size.

:class:`ObservedLM` differs from ``HFLM`` only in how requests are processed: in batches of similar length that fit into
memory (:mod:`.batching`), tokenized once (:mod:`.token_cache`), without computing anything twice (:mod:`.likelihood`),
without finished rows (:mod:`.decoding`), and always with an attention mask. It calls a function as requests finish in
place of showing progress bars, and makes no request to the hub.

:func:`undisturbed` restores the model and the tokenizer afterwards::

    with undisturbed(model, tokenizer), quiet():
        lm = ObservedLM(model, tokenizer, batch_size=16, on_batch=print)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from grass_ray.config import ConfigError
from grass_ray.tasks.encoding import encode_pair, encode_prompt, without_end
from grass_ray.tasks.inference.batching import Batcher
from grass_ray.tasks.inference.decoding import Decoder
from grass_ray.tasks.inference.keys_values import new_cache
from grass_ray.tasks.inference.learned import Learned, summed_losses
from grass_ray.tasks.inference.likelihood import Score, Scorer, TokenRow, share_rows
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.tasks.scores import Workload


class ObservedLM(HFLM):  # type: ignore[misc]
    """``HFLM`` for a model that is already loaded.

    Args:
        model: causal language model of transformers, possibly with peft adapters.
        tokenizer: its tokenizer.
        batch_size: maximum number of requests per forward pass, or ``auto``.
        cache: folder that keeps tokenized texts; None keeps nothing.
        on_batch: called after each batch with its number of requests.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | Literal["auto"],
        cache: Path | None = None,
        on_batch: Callable[[int], None],
    ) -> None:
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of every model that is passed as an object
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        finally:
            logger.setLevel(level)
        self.on_batch = on_batch
        self.batcher = Batcher(batch_size, self.device.type)
        self._token_cache = TokenCache(tokenizer, cache)
        self._tokens: dict[str, list[int]] = {}
        self._counted = Workload()

    def take_workload(self) -> Workload:
        """Return the work done since the last call."""
        counted = replace(self._counted, halvings=self.batcher.halvings)
        self._counted, self.batcher.halvings = Workload(), 0
        return counted

    # -- tokens

    def _tokenize(self, texts: Sequence[str]) -> None:
        """Tokenize texts in advance, for :meth:`tok_encode`."""
        found = self._token_cache.encode(texts)
        self._tokens = {text: without_end(self.tokenizer, ids) for text, ids in found.items()}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, encoded like a prompt unless special tokens are specified."""
        if add_special_tokens is not None or kwargs:
            ids: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
            return ids
        known = self._tokens.get(string)
        return encode_prompt(self.tokenizer, string) if known is None else known

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as in training. White space before an option belongs to the option, as in lm-eval."""
        prompt, answer = encode_pair(self.tokenizer, context, continuation, self.tok_encode)
        start = min(len(self.tok_encode(context.rstrip())), len(prompt))
        return prompt[:start], prompt[start:] + answer

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask of several texts, both of shape (rows, tokens) and left-padded."""
        assert padding_side == "left", "generation continues on the right"
        rows = [self.tok_encode(text)[-(left_truncate_len or 0) :] for text in strings]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id))
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, tokens in enumerate(rows):
            ids[place, longest - len(tokens) :] = torch.tensor(tokens)
            mask[place, longest - len(tokens) :] = 1
        return ids, mask

    # -- options

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        """Return (log-likelihood, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        contexts = [context for context, _ in pairs]
        wholes = [context + continuation for context, continuation in pairs]
        self._tokenize([*contexts, *(context.rstrip() for context in contexts), *wholes])
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def score_pairs(self, pairs: Sequence[tuple[str, str]], *, with_space: bool) -> list[float]:
        """Return the log-likelihood in nats of each (context, continuation).

        Args:
            pairs: texts.
            with_space: whether white space at the end of a context belongs to the continuation, as it does for the
                options of a question.
        """
        wholes = [context + continuation for context, continuation in pairs]
        contexts = [context for context, _ in pairs]
        self._tokenize([*contexts, *(context.rstrip() for context in contexts), *wholes])
        encoded = [(pair, *self._encode(*pair, with_space)) for pair in pairs]
        return [value for value, _ in self._loglikelihood_tokens(encoded)]

    def count_tokens(self, context: str, continuation: str, *, with_space: bool) -> int:
        """Return the number of tokens of a continuation whose log-likelihood was computed last."""
        return len(self._encode(context, continuation, with_space)[1])

    def _encode(self, context: str, continuation: str, with_space: bool) -> tuple[list[int], list[int]]:
        if with_space:
            return self._encode_pair(context, continuation)
        return encode_pair(self.tokenizer, context, continuation, self.tok_encode)

    def score_learned(self, rows: Sequence[Learned]) -> list[float]:
        """Return the loss in nats summed over the learned tokens of each row."""

        def answer(batch: list[Learned]) -> list[float]:
            losses = summed_losses(self.model, batch)
            lengths = [len(ids) for ids, _ in batch]
            self._count(tokens=sum(lengths), padding_tokens=len(batch) * max(lengths) - sum(lengths), passes=1)
            self.on_batch(len(batch))
            return losses

        return self.batcher.run(rows, [len(ids) for ids, _ in rows], answer)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Score]:
        """Score (texts, context ids, continuation ids); see :mod:`grass_ray.tasks.inference.likelihood`."""
        rows = share_rows([(context, continuation) for _, context, continuation in requests], self.max_length)
        longest = self.max_length + 1  # the last token is only predicted
        cut = {texts[0] for texts, context, continuation in requests if len(context) + len(continuation) > longest}
        self._count(prompts_cut=len(cut))
        scorer = Scorer(self.model, rows)
        self._count(tokens=scorer.shared, passes=int(scorer.shared > 0))

        def answer(batch: list[TokenRow]) -> list[list[Score]]:
            scores = scorer.score(batch)
            lengths = [len(row.tokens) - scorer.shared for row in batch]
            self._count(tokens=sum(lengths), padding_tokens=len(batch) * max(lengths) - sum(lengths), passes=1)
            self.on_batch(sum(len(row.continuations) for row in batch))
            return scores

        found = self.batcher.run(rows, [len(row.tokens) for row in rows], answer)
        numbered = {
            number: score
            for row, scores in zip(rows, found, strict=True)
            for (number, _), score in zip(row.continuations, scores, strict=True)
        }
        return [numbered[number] for number in range(len(requests))]

    # -- texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate from each context until a stop text, the end token or the maximum length."""
        if not requests:
            return []
        contexts = [request.args[0] for request in requests]
        self._tokenize(contexts)
        room = max(request.args[1]["max_gen_toks"] for request in requests)
        lengths = [len(self.tok_encode(text)) for text in contexts]
        self._count(prompts_cut=sum(length > self.max_length - room for length in lengths))

        def answer(batch: list[Any]) -> list[str]:
            self.batch_size_per_gpu = len(batch)
            texts: list[str] = super(ObservedLM, self).generate_until(batch, disable_tqdm=True)
            self.on_batch(len(batch))
            return texts

        beams = max(request.args[1].get("num_beams", 1) for request in requests)
        in_groups = beams == 1 and bool(new_cache(self.model, sliding=False))
        return self.batcher.run(requests, lengths, answer, room=room, in_groups=in_groups)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Generate from ``context``, shape (rows, tokens), left-padded; its attention mask is in ``kwargs``."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        texts = [text for text in stop if text != eos]  # generate() itself stops at the token
        decoder = Decoder(self.model, self.tokenizer, stop=texts, num_beams=kwargs.get("num_beams", 1))
        tokens = decoder.generate(context, kwargs["attention_mask"], max_length - context.shape[1])
        self._count(tokens=decoder.tokens, padding_tokens=decoder.padding_tokens, passes=decoder.passes)
        return tokens

    def _count(self, **numbers: int) -> None:
        self._counted += Workload(**numbers)

    def get_model_info(self) -> dict[str, Any]:
        """Return nothing. The record describes the model, and lm-eval would send a request to the hub."""
        return {}


@contextmanager
def undisturbed(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Prepare a model for evaluation in the block; restore training modes, padding and generation settings after it.

    In the block the generation settings of the model (sampling, repetition penalties) have no effect, except its end
    tokens. A tokenizer without a padding token pads with its end token.

    Raises:
        ConfigError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-text token"
        )
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    modes = {module: module.training for module in model.modules()}
    settings = {module: module.generation_config for module in {model, base} if "generation_config" in vars(module)}
    padding_side, pad_token = tokenizer.padding_side, tokenizer.pad_token
    if pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for module, own in settings.items():
        module.generation_config = _plain_decoding(own, tokenizer)
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, own in settings.items():
            module.generation_config = own
        tokenizer.padding_side = padding_side
        tokenizer.pad_token = pad_token


def _plain_decoding(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    given = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [tokenizer.eos_token_id, *(token for token in given if token in tokenizer.all_special_ids)]
    return GenerationConfig(
        eos_token_id=list(dict.fromkeys(ends)), pad_token_id=tokenizer.pad_token_id, bos_token_id=own.bos_token_id
    )


@contextmanager
def quiet() -> Iterator[None]:
    """In the block, show no progress bars and no messages below warnings, and send no download counts."""
    bars, counts = datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    tqdm, logger = lm_eval.api.task.tqdm, logging.getLogger("lm_eval")
    level = logger.level
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = tqdm
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not bars:
            datasets.enable_progress_bars()
