"""Rows of data that the runs of a table lost on the way, a sentence for each way and whose they were.

::

    for note in lost_rows([("grass", records_of_its_seeds), ...]): print(note)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grass_ray.results.record import RunRecord
from grass_ray.training.lost_rows import describe_lost_rows


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
    """What one run lost, as the terminal said it, and the test rows that were not asked."""
    train = record.data.get("train")
    data = {**record.data, "train": train if isinstance(train, Mapping) else {}}
    texts = [
        " ".join(line.split()) for line in describe_lost_rows(data, record.config["data"].get("max_length_tokens", 0))
    ]
    for task, score in record.tasks.items():
        if skipped := score.protocol.get("test_rows_skipped"):
            texts.append(f"skipped {skipped} test rows of {task}: they could not be used")
    return texts
