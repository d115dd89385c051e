"""Text that has nothing to do with a task, to measure what a model forgets while it learns the task.

::

    text = load_unrelated("generated")                 # short passages made by the project
    text = load_unrelated("wikipedia.jsonl")           # or a text file, or a data set with a column text
    text.passages[0], text.provenance
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from grass_ray.config import ConfigError, DatasetColumns
from grass_ray.tasks.dataset_files import is_data_file, is_local, read_dataset, splits_of
from grass_ray.tasks.dataset_shapes import Shaper
from grass_ray.tasks.row_files import read_text, refuse_broken
from grass_ray.tasks.rows import RowError, TextRow

GENERATED = "generated"
MOST_PASSAGES = 100
TEXT_FILES = (".txt", ".md")
_SEED = 20_240_531  # fixed, so that all runs read the same passages

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Leo", "Olga")
_PLACES = ("the village", "the harbour", "the old market", "the river", "the railway station", "the library")
_WEATHER = (
    "It had rained all night",
    "The sun was already warm",
    "A cold wind came from the north",
    "Fog lay over the fields",
)
_WORK = ("repairs clocks", "teaches music", "bakes bread", "drives the bus", "keeps bees", "paints houses")
_FINDS = ("a small brass key", "an old photograph", "a letter without a stamp", "a grey kitten", "a map of the coast")
_GIVERS = ("the baker", "a fisherman", "the teacher", "a stranger in a long coat", "the woman from the post office")
_ENDS = (
    "By the evening everybody in the street had heard of it.",
    "Nobody ever found out where it had come from.",
    "The next morning it was on the kitchen table again.",
    "It was the beginning of a long friendship.",
)


@dataclass(frozen=True, kw_only=True)
class Unrelated:
    """Passages of a text, and where they are from as plain JSON values."""

    passages: tuple[str, ...]
    provenance: dict[str, Any]


def load_unrelated(name: str) -> Unrelated:
    """Load the first passages of a text, at most :data:`MOST_PASSAGES`.

    Args:
        name: ``generated``, a text file whose passages are separated by empty lines, or a data set with a column
            ``text`` (its split ``train``, if there are several).

    Raises:
        ConfigError: there is no such text, or it cannot be used.
    """
    if name == GENERATED:
        passages, source = generate_passages(), "generated"
    elif Path(name).suffix.lower() in TEXT_FILES:
        path = Path(os.path.expanduser(name))
        passages = tuple(part.strip() for part in read_text(path).split("\n\n") if part.strip())
        source = str(path)
        _check_utf8(passages, source)
    else:
        passages, source = _of_dataset(name)
    passages = passages[:MOST_PASSAGES]
    if not passages:
        raise ConfigError(f"evaluation.forgetting={name} holds no text")
    digest = hashlib.sha256("\0".join(passages).encode()).hexdigest()
    return Unrelated(passages=passages, provenance={"name": source, "sha256": digest, "passages": len(passages)})


def is_unrelated_file(name: str) -> bool:
    """Whether a name is meant as a file."""
    return is_data_file(name) or Path(name).suffix.lower() in TEXT_FILES


def _check_utf8(passages: tuple[str, ...], where: str) -> None:
    for number, passage in enumerate(passages, start=1):
        try:
            passage.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: passage {number} is not UTF-8 text") from None


def _of_dataset(name: str) -> tuple[tuple[str, ...], str]:
    if is_local(name) and not os.path.exists(os.path.expanduser(name)):
        raise ConfigError(
            f"there is no text evaluation.forgetting={name}; give {GENERATED}, a text file ({', '.join(TEXT_FILES)}), "
            "or a data set with a column text"
        )
    splits = splits_of(name, None, None)
    found = read_dataset(name, split="train" if "train" in splits else next(iter(splits), None))
    shaper = Shaper("text", DatasetColumns(), "clean")
    rows, mistakes = [], []
    for number, record in found.records[:MOST_PASSAGES]:
        try:
            row = shaper.shape(record, "")
        except RowError as mistake:
            mistakes.append(f"row {number}: {mistake}")
        else:
            assert isinstance(row, TextRow)
            rows.append(row.text)
    refuse_broken(mistakes, len(rows), found.name, "refuse")
    return tuple(text for text in rows if text.strip()), found.name


@lru_cache(maxsize=1)
def generate_passages() -> tuple[str, ...]:
    """Return short stories of everyday life in plain English, the same ones always."""
    random = Random(_SEED)
    return tuple(_story(random) for _ in range(MOST_PASSAGES))


def _story(random: Random) -> str:
    name, friend = random.sample(_NAMES, 2)
    place, other = random.sample(_PLACES, 2)
    found, giver = random.choice(_FINDS), random.choice(_GIVERS)
    year, street = random.randint(1890, 2015), random.randint(2, 90)
    middle = (
        f"{friend}, who {random.choice(_WORK)}, was the first to see it.",
        f"It had belonged to {giver}, people said, and nobody had missed it for {random.randint(2, 30)} years.",
        f'"Where did you get that?" asked {friend}. "{giver.capitalize()} gave it to me," said {name}.',
        f"{name} put it into a box and carried it home to number {street}.",
        f"They walked from {place} to {other} and talked about it for an hour.",
    )
    return " ".join(
        (
            f"{random.choice(_WEATHER)} when {name} went to {place} in the spring of {year}.",
            f"On the way back, near {other}, there was {found} lying in the grass.",
            *random.sample(middle, 3),
            random.choice(_ENDS),
        )
    )
