"""Rows to batches: tokenised once, shuffled by (seed, epoch), addressed by index so that a resume is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grass_ray.config import ConfigError, DataConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.tasks.rows import Row
from grass_ray.tasks.templates import render_prompt, render_response

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded. All of shape (rows, tokens); ``labels`` are shifted: position t holds token t+1.

    ``tokens`` counts what is not padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: int

    @property
    def num_labels(self) -> int:
        """Tokens the loss is taken over."""
        return int((self.labels != IGNORED).sum())

    def labelled_positions(self) -> Tensor:
        """Positions at which at least one row has a label, ascending, shape (positions,)."""
        return (self.labels != IGNORED).any(dim=0).nonzero().squeeze(1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), tokens=self.tokens
        )


class Batches:
    """The endless stream of training batches: ``batches[i]`` are the micro-batches of training step ``i``.

    Args:
        rows: training rows.
        tokenizer: a Hugging Face tokenizer with a padding and an end token.
        data: template, masking and cut-off.
        batch_size: rows a step.
        accumulation_steps: micro-batches a step.
        seed: of the shuffling.

    Raises:
        ConfigError: no row is left to learn from within the cut-off.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        data: DataConfig,
        *,
        batch_size: int,
        accumulation_steps: int,
        seed: int,
    ) -> None:
        self._pad = tokenizer.pad_token_id
        self._batch_size = batch_size
        self._micro_size = batch_size // accumulation_steps
        self.seed = seed
        self._epoch: tuple[int, list[int]] = (-1, [])
        encoded = [_encode(row, tokenizer, data) for row in rows]
        self.truncated_rows = sum(len(ids) > data.max_length_tokens for ids, _ in encoded)
        cut = [(ids[: data.max_length_tokens], labels[: data.max_length_tokens]) for ids, labels in encoded]
        self._rows = [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels[1:])]
        self.dropped_rows = len(cut) - len(self._rows)
        if not self._rows:
            raise ConfigError(
                f"none of {len(rows)} training rows has an answer within {data.max_length_tokens} tokens; "
                "raise data.max_length_tokens"
            )

    def __getitem__(self, step: int) -> list[Batch]:
        """The micro-batches of training step ``step``, from 0."""
        first = step * self._batch_size
        chosen = [self._row(position) for position in range(first, first + self._batch_size)]
        return [
            self._collate(chosen[start : start + self._micro_size])
            for start in range(0, self._batch_size, self._micro_size)
        ]

    def summary(self) -> dict[str, int]:
        """Counts for the record."""
        return {
            "train_rows_used": len(self._rows),
            "train_rows_truncated": self.truncated_rows,
            "train_rows_dropped": self.dropped_rows,
        }

    def _row(self, position: int) -> tuple[list[int], list[int]]:
        epoch, offset = divmod(position, len(self._rows))
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self._rows), generator=keyed_generator("epoch", self.seed, epoch))
            self._epoch = (epoch, order.tolist())
        return self._rows[self._epoch[1][offset]]

    def _collate(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self._pad)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED)
        for index, (ids, targets) in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            mask[index, : len(ids)] = 1
            labels[index, : len(ids) - 1] = torch.tensor(targets[1:])
        return Batch(input_ids, mask, labels, tokens=sum(len(ids) for ids, _ in rows))


def _encode(row: Row, tokenizer: Any, data: DataConfig) -> tuple[list[int], list[int]]:
    """Token ids and labels (unshifted) of a row: prompt, response, end token."""
    prompt = tokenizer(render_prompt(row, data.template))["input_ids"]
    response = tokenizer(render_response(row), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = prompt + response
    return ids, list(ids) if data.train_on_inputs else [IGNORED] * len(prompt) + response
