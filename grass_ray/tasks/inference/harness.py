"""lm-eval's Hugging Face model, made quick, quiet, observable and independent of the batch size.

:class:`ObservedLM` is ``lm_eval``'s ``HFLM`` in everything but how requests go through the model: sorted by length into
batches that fit into memory (:mod:`.scheduling`), tokenised once (:mod:`.token_cache`), nothing computed twice and the
attention mask always given (:mod:`.likelihood`), finished rows dropped (:mod:`.decoding`). It shows no progress bars
but calls a function as requests finish, and it never asks the hub about the model.

:func:`undisturbed` leaves the model and tokenizer as they were found::

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
from grass_ray.tasks.inference.batching import Scheduler
from grass_ray.tasks.inference.decoding import Decoder
from grass_ray.tasks.inference.likelihood import Row, Score, Scorer, share_rows
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.tasks.scores import Workload


class ObservedLM(HFLM):  # type: ignore[misc]
    """HFLM on a model that is already loaded.

    Args:
        model: a causal language model of transformers, possibly with peft adapters.
        tokenizer: its tokenizer.
        batch_size: requests a forward pass, or ``auto``.
        cache: a folder that keeps tokenised texts; None keeps nothing.
        on_batch: gets the number of requests that each batch has finished.
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
        self.scheduler = Scheduler(batch_size, self.device.type)
        self._token_cache = TokenCache(tokenizer, cache)
        self._tokens: dict[str, list[int]] = {}
        self._counted = Workload()

    def take_workload(self) -> Workload:
        """What went through the model since the last call."""
        counted = replace(self._counted, halvings=self.scheduler.halvings)
        self._counted, self.scheduler.halvings = Workload(), 0
        return counted

    # -- tokens

    def _tokenise(self, texts: Sequence[str]) -> None:
        """Have the tokens of texts at hand."""
        found = self._token_cache.encode(texts)
        self._tokens = {text: without_end(self.tokenizer, ids) for text, ids in found.items()}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text as of a prompt, unless told which special tokens to add."""
        if add_special_tokens is not None or kwargs:
            ids: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
            return ids
        known = self._tokens.get(string)
        return encode_prompt(self.tokenizer, string) if known is None else known

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode the two as training does. White space before an option counts to the option, as lm-eval has it."""
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
        """Token ids and attention mask of several texts, both (rows, tokens) and padded at the left."""
        assert padding_side == "left", "generation goes on at the right"
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
        """(log-likelihood, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        contexts = [context for context, _ in pairs]
        wholes = [context + continuation for context, continuation in pairs]
        self._tokenise([*contexts, *(context.rstrip() for context in contexts), *wholes])
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Score]:
        """Score (texts, context ids, continuation ids); see :mod:`grass_ray.tasks.inference.likelihood`."""
        rows = share_rows([(context, continuation) for _, context, continuation in requests], self.max_length)
        most = self.max_length + 1  # the last token is only predicted
        cut = {texts[0] for texts, context, continuation in requests if len(context) + len(continuation) > most}
        self._count(prompts_cut=len(cut))
        scorer = Scorer(self.model, rows)
        self._count(tokens=scorer.shared, passes=int(scorer.shared > 0))

        def answer(batch: list[Row]) -> list[list[Score]]:
            scores = scorer.score(batch)
            lengths = [len(row.tokens) - scorer.shared for row in batch]
            self._count(tokens=sum(lengths), padding_tokens=len(batch) * max(lengths) - sum(lengths), passes=1)
            self.on_batch(sum(len(row.continuations) for row in batch))
            return scores

        found = self.scheduler.run(rows, [len(row.tokens) for row in rows], answer)
        numbered = {
            number: score
            for row, scores in zip(rows, found, strict=True)
            for (number, _), score in zip(row.continuations, scores, strict=True)
        }
        return [numbered[number] for number in range(len(requests))]

    # -- texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate from each context, until a stop text, the end token or the longest answer."""
        if not requests:
            return []
        contexts = [request.args[0] for request in requests]
        self._tokenise(contexts)
        room = max(request.args[1]["max_gen_toks"] for request in requests)
        lengths = [len(self.tok_encode(text)) for text in contexts]
        self._count(prompts_cut=sum(length > self.max_length - room for length in lengths))

        def answer(batch: list[Any]) -> list[str]:
            self.batch_size_per_gpu = len(batch)
            texts: list[str] = super(ObservedLM, self).generate_until(batch, disable_tqdm=True)
            self.on_batch(len(batch))
            return texts

        return self.scheduler.run(requests, lengths, answer, room=room)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Generate from ``context`` (rows, tokens), left-padded, with its attention mask in ``kwargs``."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        texts = [text for text in stop if text != eos]  # generate() itself stops at the token
        decoder = Decoder(self.model, self.tokenizer, stop=texts, num_beams=kwargs.get("num_beams", 1))
        tokens = decoder.generate(context, kwargs["attention_mask"], max_length - context.shape[1])
        self._count(tokens=decoder.tokens, padding_tokens=decoder.padding_tokens, passes=decoder.passes)
        return tokens

    def _count(self, **numbers: int) -> None:
        self._counted += Workload(**numbers)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the run record says what the model is, and lm-eval would ask the hub."""
        return {}


@contextmanager
def undisturbed(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Evaluate inside, find everything as before outside: training modes, padding, generation settings.

    Inside, decoding depends on nothing but the arguments: a model's own generation settings (sampling, repetition
    penalties) are put aside, its end-of-text tokens are kept. A tokenizer without padding token pads with end-of-text.
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
    """No progress bars, no messages below warnings, no count of downloads sent anywhere."""
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
