"""Training rows that teach nothing, or not all of their answer: looked for before training, and said in a line each.

::

    check_some_row_fits(config, tokenizer)              # ConfigError where no row would be left
    for line in find_lost_rows(config, tokenizer): print(line)
    for line in describe_lost_rows(record.data, max_length_tokens=256): print(line)      # of a run that was prepared
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grass_ray.config import ConfigError, HubSource, RunConfig
from grass_ray.tasks.sources import load_train_rows
from grass_ray.tasks.templates import render_prompt
from grass_ray.training.batches import Batches

MOST_ROWS = 20_000  # rows that are tokenised to count; of more, as many spread over all of them


def check_some_row_fits(config: RunConfig, tokenizer: Any) -> None:
    """Raise :class:`ConfigError` unless at least one training row has an answer within the cut-off."""
    if isinstance(config.data.source, HubSource):
        return
    rows = sorted(load_train_rows(config.data).rows, key=lambda row: len(render_prompt(row, config.data.template)))
    for row in rows:
        try:
            _batches(config, tokenizer, [row])
        except ConfigError:
            continue
        return
    _batches(config, tokenizer, rows)


def find_lost_rows(config: RunConfig, tokenizer: Any) -> list[str]:
    """What :func:`describe_lost_rows` will say of a run; nothing of rows that must be downloaded first."""
    if isinstance(config.data.source, HubSource):
        return []
    loaded = load_train_rows(config.data)
    rows = loaded.rows[:: len(loaded.rows) // MOST_ROWS + 1]
    data = {"train": loaded.provenance, **_batches(config, tokenizer, rows).summary()}
    return describe_lost_rows(data, config.data.max_length_tokens)


def describe_lost_rows(data: Mapping[str, Any], max_length_tokens: int) -> list[str]:
    """A line for each way in which rows were lost; ``data`` is that of a run or its record."""
    skipped = data.get("train", {}).get("rows_skipped", 0)
    dropped, empty = data.get("train_rows_dropped", 0), data.get("train_rows_empty", 0)
    # the longest of them were dropped as a whole
    cut = data.get("train_rows_truncated", 0) - dropped
    total = data.get("train_rows_used", 0) + dropped + empty
    lines = {
        f"skipped   {skipped} training rows: they could not be used": skipped,
        f"dropped   {dropped} of {total} training rows: no answer within {max_length_tokens} tokens; "
        "raise data.max_length_tokens": dropped,
        f"dropped   {empty} of {total} training rows: their output is empty": empty,
        f"cut       {cut} of {total} training rows at {max_length_tokens} tokens: the end of their answers is lost; "
        "raise data.max_length_tokens": cut,
    }
    return [line for line, count in lines.items() if count > 0]


def _batches(config: RunConfig, tokenizer: Any, rows: Any) -> Batches:
    return Batches(rows, tokenizer, config.data, batch_size=1, accumulation_steps=1, seed=0)
