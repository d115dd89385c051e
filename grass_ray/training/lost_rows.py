"""Report training rows that are skipped, dropped or truncated.

::

    check_some_row_fits(config, tokenizer)              # ConfigError if no row would be left
    for line in find_lost_rows(config, tokenizer): print(line)                           # before a run
    for line in describe_lost_rows(record.data, max_length_tokens=256): print(line)      # after a run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grass_ray.config import ConfigError, DatasetSource, RunConfig
from grass_ray.tasks.encoding import size_of
from grass_ray.tasks.rows import AnyRow
from grass_ray.tasks.sources import load_train_rows

if TYPE_CHECKING:
    from grass_ray.training.batches import Batches

MOST_ROWS = 20_000  # larger data sets are sampled at regular intervals, so that counting stays fast


def check_some_row_fits(config: RunConfig, tokenizer: Any) -> None:
    """Raise :class:`ConfigError` unless a training row has its answer within the maximum length.

    Conversations must also be accepted by the chat template, and rows be left beside those held out for validation.

    Rows on the Hub are not checked, because they would have to be downloaded.
    """
    if config.data.source.downloads:
        return
    loaded = load_train_rows(config.data).rows
    if config.data.validation_rows is not None:
        from grass_ray.training.validation import hold_out  # loads torch, which tables of records do not need

        hold_out(loaded, config.data.validation_rows)
    if isinstance(config.data.source, DatasetSource):  # every row may be one that the chat template refuses
        _batches(config, tokenizer, _sampled(loaded))
        return
    rows = sorted(loaded, key=lambda row: size_of(row, config.data))
    for row in rows:
        try:
            _batches(config, tokenizer, [row])
        except ConfigError:
            continue
        return
    _batches(config, tokenizer, rows)


def find_lost_rows(config: RunConfig, tokenizer: Any) -> list[str]:
    """Return what :func:`describe_lost_rows` will return for a run; empty for rows on the Hub."""
    if config.data.source.downloads:
        return []
    loaded = load_train_rows(config.data)
    data = {"train": loaded.provenance, **_batches(config, tokenizer, _sampled(loaded.rows)).summary()}
    return describe_lost_rows(data, config.data.max_length_tokens)


def describe_lost_rows(data: Mapping[str, Any], max_length_tokens: int) -> list[str]:
    """Return one line for each way in which rows were lost.

    Args:
        data: the counts of a run, as its record has them.
        max_length_tokens: the maximum length of a row in the run.
    """
    skipped = data.get("train", {}).get("rows_skipped", 0)
    dropped, empty = data.get("train_rows_dropped", 0), data.get("train_rows_empty", 0)
    # truncated rows without any label left are counted as dropped
    cut = data.get("train_rows_truncated", 0) - dropped
    total = data.get("train_rows_used", 0) + dropped + empty
    refused = data.get("train_rows_refused", 0)
    total += refused
    lines = {
        f"skipped   {skipped} training rows: they could not be used": skipped,
        f"dropped   {dropped} of {total} training rows: no answer within {max_length_tokens} tokens; "
        "raise data.max_length_tokens": dropped,
        f"dropped   {empty} of {total} training rows: their output is empty": empty,
        f"dropped   {refused} of {total} training rows: the chat template refuses them": refused,
        f"cut       {cut} of {total} training rows at {max_length_tokens} tokens: the end of their answers is lost; "
        "raise data.max_length_tokens": cut,
    }
    return [line for line, count in lines.items() if count > 0]


def _sampled(rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
    return rows[:: len(rows) // MOST_ROWS + 1]


def _batches(config: RunConfig, tokenizer: Any, rows: Any) -> Batches:
    from grass_ray.training.batches import Batches  # loads torch, which tables of records do not need

    return Batches(rows, tokenizer, config.data, batch_size=1, accumulation_steps=1, seed=0)
