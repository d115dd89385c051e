"""The Hugging Face model of lm-eval for its own tasks: texts become tokens as in ``lm_eval --model hf``.

:class:`HarnessLM` tokenizes and generates as ``HFLM`` does, so that numbers are those that lm-eval itself computes,
and batches requests by what fits into memory, as :class:`~grass_ray.tasks.inference.harness.ObservedLM` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from grass_ray.tasks.inference.harness import ObservedLM
from grass_ray.tasks.inference.likelihood import Score


class HarnessLM(ObservedLM):
    """``HFLM`` for a model that is already loaded.

    Args:
        model, tokenizer, batch_size, on_batch: as of ``ObservedLM``.
        on_requests: called with the number of requests before they are answered.
        shard: (index, count) of this worker, if several share the requests; lm-eval collects what they answered, and
            returns results on the first.
    """

    def __init__(
        self,
        *arguments: Any,
        on_requests: Callable[[int], None],
        shard: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.on_requests = on_requests
        if shard is not None:
            self._rank, self._world_size = shard

    # as of HFLM, which is where lm-eval's own numbers come from
    tok_encode = HFLM.tok_encode
    tok_batch_encode = HFLM.tok_batch_encode
    _encode_pair = HFLM._encode_pair
    _model_generate = HFLM._model_generate

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        """Return (log-likelihood, whether greedy decoding gives it) of each (context, continuation)."""
        self.on_requests(len(requests))
        scores: list[Score] = HFLM.loglikelihood(self, requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text."""
        self.on_requests(len(requests))
        values: list[float] = HFLM.loglikelihood_rolling(self, requests, disable_tqdm=True)
        return values

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate from each context as its task says."""
        self.on_requests(len(requests))
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        room = max((request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests), default=0)

        def answer(batch: list[Any]) -> list[str]:
            self.batch_size_per_gpu = len(batch)
            texts: list[str] = HFLM.generate_until(self, batch, disable_tqdm=True)
            self.on_batch(len(batch))
            return texts

        return self.batcher.run(requests, lengths, answer, room=room)

    # -- several workers

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the values of all workers."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def barrier(self) -> None:
        """Wait for the other workers."""
        if self.world_size > 1:
            dist.barrier()
