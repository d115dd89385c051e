"""Rows to batches: tokenised once, shuffled by (seed, epoch), addressed by index so that a resume is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grass_ray.config import ConfigError, DataConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.tasks.encoding import encode_pair
from grass_ray.tasks.rows import Row
from grass_ray.tasks.templates import render_prompt, render_response

IGNORED = -100
BUCKET_STEPS = 16  # steps whose rows are sorted together
PACKED_TOKENS = 1024  # longer rows would compute more attention between documents, only to mask it

Document = tuple[list[int], list[int]]  # token ids, and labels that are not yet shifted


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded. All of shape (rows, tokens); ``labels`` are shifted: position t holds token t+1.

    ``tokens`` counts what is not padding. With ``position_ids`` the rows hold several documents, each of which begins
    at position 0 and must not see the others (:mod:`grass_ray.training.packing`).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: int
    position_ids: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Tokens the loss is taken over."""
        return int((self.labels != IGNORED).sum())

    def labelled_positions(self) -> Tensor:
        """Positions at which at least one row has a label, ascending, shape (positions,)."""
        return (self.labels != IGNORED).any(dim=0).nonzero().squeeze(1)

    def documents(self) -> Iterator[Tensor]:
        """The token ids of each document, without padding."""
        for row, (ids, mask) in enumerate(zip(self.input_ids, self.attention_mask, strict=True)):
            ids = ids[: int(mask.sum())]
            if self.position_ids is None:
                yield ids
            else:
                starts = (self.position_ids[row, : len(ids)] == 0).nonzero().squeeze(1)
                yield from ids.tensor_split(starts[1:].tolist())

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            tokens=self.tokens,
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
        )


class Batches:
    """The endless stream of training batches: ``batches[i]`` are the micro-batches of training step ``i``.

    Every row comes once an epoch, in an order that (seed, epoch) and ``data.batching`` decide alone. ``plain`` shuffles
    the rows; ``bucketed`` shuffles them, but gives a micro-batch rows of about one length; ``packed`` takes the same
    rows a step as ``plain``, one after another in as few rows as :data:`PACKED_TOKENS` allow, kept apart.

    Args:
        rows: training rows.
        tokenizer: a Hugging Face tokenizer with a padding and an end token.
        data: template, masking, cut-off and batching.
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
        self._batching = data.batching
        self.seed = seed
        self._epoch: tuple[int, list[int]] = (-1, [])
        teaching = [row for row in rows if render_response(row)]
        self.empty_rows = len(rows) - len(teaching)
        encoded = [_encode(row, tokenizer, data) for row in teaching]
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
            "train_rows_empty": self.empty_rows,
        }

    def _row(self, position: int) -> Document:
        epoch, offset = divmod(position, len(self._rows))
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self._rows), generator=keyed_generator("epoch", self.seed, epoch)).tolist()
            self._epoch = (epoch, self._bucket(order, epoch) if self._batching == "bucketed" else order)
        return self._rows[self._epoch[1][offset]]

    def _bucket(self, order: list[int], epoch: int) -> list[int]:
        """Rows of about one length side by side in every micro-batch, micro-batches in random order.

        Rows are sorted by length within windows of :data:`BUCKET_STEPS` steps, so that an epoch stays mixed.
        """
        # the last micro-batch of an epoch is filled up with the first rows of the next
        ahead = -epoch * len(self._rows) % self._micro_size
        bucketed, order = order[:ahead], order[ahead:]
        generator = keyed_generator("buckets", self.seed, epoch)
        for window in _split(order, BUCKET_STEPS * self._batch_size):
            window.sort(key=lambda row: len(self._rows[row][0]))
            whole = _split(window, self._micro_size)
            rest = whole.pop() if len(whole[-1]) < self._micro_size else []
            shuffled = torch.randperm(len(whole), generator=generator).tolist()
            bucketed += [row for place in shuffled for row in whole[place]] + rest
        return bucketed

    def _collate(self, rows: list[Document]) -> Batch:
        return pack(rows, self._pad) if self._batching == "packed" else pad(rows, self._pad)


def _split(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def pad(documents: Sequence[Document], pad_token: int) -> Batch:
    """One document a row."""
    length = max(len(ids) for ids, _ in documents)
    input_ids = torch.full((len(documents), length), pad_token)
    mask = torch.zeros((len(documents), length), dtype=torch.long)
    labels = torch.full((len(documents), length), IGNORED)
    for index, (ids, targets) in enumerate(documents):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        mask[index, : len(ids)] = 1
        labels[index, : len(ids) - 1] = torch.tensor(targets[1:])
    return Batch(input_ids, mask, labels, tokens=sum(len(ids) for ids, _ in documents))


def pack(documents: Sequence[Document], pad_token: int) -> Batch:
    """Documents one after another in as few rows of about one length as :data:`PACKED_TOKENS` allow.

    The longest that is left goes to the shortest row. Padding at a row's end is a document without labels.
    """
    total = sum(len(ids) for ids, _ in documents)
    rows: list[list[Document]] = [[] for _ in range(min(-(-total // PACKED_TOKENS), len(documents)))]
    filled = [0] * len(rows)
    for document in sorted(documents, key=lambda document: -len(document[0])):
        shortest = filled.index(min(filled))
        rows[shortest].append(document)
        filled[shortest] += len(document[0])
    shape = (len(rows), max(filled))
    input_ids, labels = torch.full(shape, pad_token), torch.full(shape, IGNORED)
    mask, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for index, (row, used) in enumerate(zip(rows, filled, strict=True)):
        mask[index, :used] = 1
        positions[index, used:] = torch.arange(shape[1] - used)
        start = 0
        for ids, targets in row:
            end = start + len(ids)
            input_ids[index, start:end] = torch.tensor(ids)
            labels[index, start : end - 1] = torch.tensor(targets[1:])
            positions[index, start:end] = torch.arange(len(ids))
            start = end
    return Batch(input_ids, mask, labels, tokens=total, position_ids=positions)


def _encode(row: Row, tokenizer: Any, data: DataConfig) -> Document:
    """Token ids and labels (unshifted) of a row: prompt, response, end token."""
    prompt, answer = encode_pair(tokenizer, render_prompt(row, data.template), render_response(row))
    response = [*answer, tokenizer.eos_token_id]
    ids = prompt + response
    return ids, list(ids) if data.train_on_inputs else [IGNORED] * len(prompt) + response
