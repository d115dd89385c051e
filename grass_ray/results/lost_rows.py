"""Rows of data that a run lost on the way: too long, broken, without an answer. A sentence for each kind.

::

    for note in lost_rows([("grass", records_of_its_seeds), ...]): print(note)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grass_ray.results.record import RunRecord


def lost_rows(groups: Sequence[tuple[str, Sequence[RunRecord]]]) -> list[str]:
    """What was lost, and whose; the rows are not named where it is all of those that were trained.

    Args:
        groups: each row's label with its runs.
    """
    found: dict[str, list[str]] = {}
    trained = set()
    for label, group in groups:
        for record in group:
            if record.config["training"]["steps"]:
                trained.add(label)
            for text in lost_by(record):
                labels = found.setdefault(text, [])
                if label not in labels:
                    labels.append(label)
    return [text if trained <= set(labels) else f"{', '.join(labels)}: {text}" for text, labels in found.items()]


def lost_by(record: RunRecord) -> list[str]:
    """What one run lost, a sentence for each kind of loss."""
    data, config = record.data, record.config["data"]
    texts = []
    dropped, used = _count(data, "train_rows_dropped"), _count(data, "train_rows_used")
    if dropped:
        longest = config.get("max_length_tokens")
        texts.append(
            f"{dropped} of {dropped + used} training rows were dropped: no answer within {longest} tokens "
            "(data.max_length_tokens)"
        )
    train = data.get("train")
    if isinstance(train, Mapping) and (skipped := _count(train, "rows_skipped")):
        texts.append(f"{skipped} broken training rows were skipped (data.broken_rows)")
    for task, score in record.tasks.items():
        if skipped := _count(score.protocol, "test_rows_skipped"):
            texts.append(f"{skipped} broken test rows of {task} were skipped (data.broken_rows)")
    return texts


def _count(values: Mapping[str, object], key: str) -> int:
    found = values.get(key)
    return found if isinstance(found, int) else 0
