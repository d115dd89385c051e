"""Training batches: rows are tokenized once and shuffled by (seed, epoch); batches have an index for exact resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_ray.config import ConfigError, DataConfig
from grass_ray.layerwise.generators import keyed_generator
from grass_ray.tasks.encoding import encode_rows
from grass_ray.tasks.rows import AnyRow

IGNORED = -100
BUCKET_STEPS = 16  # rows of so many steps are sorted together
PACKED_TOKENS = 1024  # longer rows would spend more time on attention between documents, which is masked

Document = tuple[list[int], list[int]]  # token ids and labels before shifting


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right. All tensors have shape (rows, tokens) and dtype int64.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 for tokens, 0 for padding.
        labels: shifted, so position t holds token t + 1; ``IGNORED`` where no loss is computed.
        tokens: number of tokens without padding.
        position_ids: if the rows are packed, the position of each token in its document. A document starts at
            position 0 and must not attend to others (:mod:`grass_ray.training.packing`).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: int
    position_ids: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Number of tokens over which the loss is computed."""
        return int((self.labels != IGNORED).sum())

    def labelled_positions(self) -> Tensor:
        """Return the positions where at least one row has a label, ascending, shape (positions,)."""
        return (self.labels != IGNORED).any(dim=0).nonzero().squeeze(1)

    def labelled_tokens(self) -> Tensor:
        """Return the places of all labels in the flattened rows, ascending, shape (labels,)."""
        return (self.labels != IGNORED).flatten().nonzero().squeeze(1)

    def documents(self) -> Iterator[Tensor]:
        """Yield the token ids of each document without padding, shape (tokens,)."""
        for row, (ids, mask) in enumerate(zip(self.input_ids, self.attention_mask, strict=True)):
            ids = ids[: int(mask.sum())]
            if self.position_ids is None:
                yield ids
            else:
                starts = (self.position_ids[row, : len(ids)] == 0).nonzero().squeeze(1)
                yield from ids.tensor_split(starts[1:].tolist())

    def to(self, device: torch.device) -> Batch:
        """Return a copy of the batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            tokens=self.tokens,
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
        )


class Batches:
    """An endless sequence of training batches: ``batches[i]`` are the micro-batches of training step ``i``.

    Every row occurs once per epoch, in an order that depends only on the seed, the epoch and ``data.batching``:
    ``plain`` shuffles the rows; ``bucketed`` also gives the rows of a micro-batch similar lengths; ``packed`` takes the
    same rows per step as ``plain`` and concatenates them into as few rows as :data:`PACKED_TOKENS` allows.

    Args:
        rows: training rows.
        tokenizer: a tokenizer of transformers with a padding and an end token.
        data: template, masking, maximum length and batching.
        batch_size: number of rows per step.
        accumulation_steps: number of micro-batches per step.
        seed: seed of the shuffling.
        cache: folder that keeps tokenized texts for later runs.

    Raises:
        ConfigError: no row has a label within the maximum length, or the chat template refuses a conversation.
    """

    def __init__(
        self,
        rows: Sequence[AnyRow],
        tokenizer: Any,
        data: DataConfig,
        *,
        batch_size: int,
        accumulation_steps: int,
        seed: int,
        cache: Path | None = None,
    ) -> None:
        self._pad = tokenizer.pad_token_id
        self._batch_size = batch_size
        self._micro_size = batch_size // accumulation_steps
        self._batching = data.batching
        self.seed = seed
        self._epoch: tuple[int, list[int]] = (-1, [])
        found = encode_rows(rows, tokenizer, data, cache)
        self.empty_rows, self.refused_rows = found.empty, len(found.refused)
        self.truncated_rows = sum(row.is_cut for row in found.rows)
        self._rows = [(row.ids, _labels(row.ids, row.learned)) for row in found.rows if row.targets]
        self.dropped_rows = len(found.rows) - len(self._rows)
        if not self._rows:
            raise ConfigError(
                f"none of {len(rows)} training rows has an answer within {data.max_length_tokens} tokens; "
                "raise data.max_length_tokens"
                if self.dropped_rows or self.refused_rows
                else f"all of {len(rows)} training rows are empty"
            )

    def __getitem__(self, step: int) -> list[Batch]:
        """Return the micro-batches of training step ``step``, counted from 0."""
        first = step * self._batch_size
        chosen = [self._row(position) for position in range(first, first + self._batch_size)]
        return [
            self._collate(chosen[start : start + self._micro_size])
            for start in range(0, self._batch_size, self._micro_size)
        ]

    def summary(self) -> dict[str, int]:
        """Return how many rows are used, truncated, dropped, empty and refused by a chat template, for the record."""
        refused = {"train_rows_refused": self.refused_rows} if self.refused_rows else {}
        return {
            "train_rows_used": len(self._rows),
            "train_rows_truncated": self.truncated_rows,
            "train_rows_dropped": self.dropped_rows,
            "train_rows_empty": self.empty_rows,
            **refused,
        }

    def _row(self, position: int) -> Document:
        epoch, offset = divmod(position, len(self._rows))
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self._rows), generator=keyed_generator("epoch", self.seed, epoch)).tolist()
            self._epoch = (epoch, self._bucket(order, epoch) if self._batching == "bucketed" else order)
        return self._rows[self._epoch[1][offset]]

    def _bucket(self, order: list[int], epoch: int) -> list[int]:
        """Reorder an epoch so that the rows of each micro-batch have similar lengths.

        Rows are sorted by length within windows of :data:`BUCKET_STEPS` steps, and the micro-batches of a window are
        shuffled, so that an epoch stays mixed.
        """
        # the first rows of an epoch complete the last micro-batch of the epoch before
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
    """Return a batch with one document per row."""
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
    """Concatenate documents into as few rows of similar length as :data:`PACKED_TOKENS` allows.

    The longest document that is left is added to the shortest row. The padding at the end of a row counts as a document
    without labels.
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


def _labels(ids: list[int], learned: list[int]) -> list[int]:
    return [token if own else IGNORED for token, own in zip(ids, learned, strict=True)]
