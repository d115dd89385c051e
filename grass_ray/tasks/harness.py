"""lm-eval's Hugging Face model, made quiet, observable and independent of the batch size.

:class:`ObservedLM` is ``lm_eval``'s ``HFLM`` with three differences: it shows no progress bars but calls a function as
requests finish; stop strings end each row by itself (lm-eval's own rule ends a batch at once, which beam search turns
into a dependence on the batch size); and it never asks the hub about the model.

:func:`undisturbed` leaves the model and tokenizer as they were found::

    with undisturbed(model, tokenizer), quiet():
        lm = ObservedLM(model, tokenizer, batch_size=16, on_batch=print)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from grass_ray.config import ConfigError


class StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at one of several texts, whatever the other rows of its batch do."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.window = max(len(text.encode()) for text in stop) + 1  # a token is at least one byte of text

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """True for every row (rows,) whose newest tokens contain a stop text."""
        newest = input_ids[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(newest)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


class ObservedLM(HFLM):  # type: ignore[misc]
    """HFLM on a model that is already loaded; ``on_batch`` gets the number of requests each forward pass finished."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        on_batch: Callable[[int], None],
    ) -> None:
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of every model that is passed as an object
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        finally:
            logger.setLevel(level)
        self.on_batch = on_batch

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate without a progress bar."""
        outputs: list[str] = super().generate_until(requests, disable_tqdm=True)
        return outputs

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score without a progress bar."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Generate from ``context`` (rows, tokens), left-padded, with its attention mask in ``kwargs``."""
        kwargs.pop("temperature", None)  # decoding is greedy or beam search
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        if texts := [text for text in stop if text != eos]:  # generate() itself stops at the token
            kwargs["stopping_criteria"] = StoppingCriteriaList([StopAtText(texts, self.tokenizer, context.shape[1])])
        tokens: Tensor = self.model.generate(input_ids=context, max_length=max_length, use_cache=True, **kwargs)
        self.on_batch(context.shape[0])
        return tokens

    def _model_call(self, inps: Tensor, **kwargs: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, **kwargs)
        self.on_batch(inps.shape[0])
        return logits

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
