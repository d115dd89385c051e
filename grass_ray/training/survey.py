"""Look at a data set as a model will get it: how long its rows are, and what is learned.

::

    survey = survey_data(config, tokenizer)
    survey.lengths, survey.examples[0].segments        # [("### User: ...", False), ("The cat is red.", True)]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from grass_ray.config import DatasetSource, RunConfig
from grass_ray.tasks.conversations import find_template, says_what_is_learned
from grass_ray.tasks.encoding import EncodedRow, encode_rows, is_chat
from grass_ray.tasks.sources import load_test_rows, load_train_rows
from grass_ray.training.lost_rows import MOST_ROWS

BINS = 8


@dataclass(frozen=True, kw_only=True)
class RenderedExample:
    """A row as text; ``segments`` alternate between what is learned and what is not."""

    which: str
    tokens: int
    learned: int
    segments: list[tuple[str, bool]]


@dataclass(frozen=True, kw_only=True)
class DataSurvey:
    """What is known of a data set before training.

    Attributes:
        description: file, shape, and what is held out.
        rendering: how rows become text, and how it is known what is learned.
        lengths: number of tokens of each row before truncation; a sample of large data sets.
        learned: number of tokens of each row over which the loss is computed, after truncation.
        limit: ``data.max_length_tokens``.
        duplicates: rows that are equal to an earlier one.
        numbers: values that were numbers and are learned as text.
        test_rows: number of held-out rows.
        examples: rendered rows.
    """

    description: str
    rendering: str
    lengths: list[int]
    learned: list[int]
    limit: int
    duplicates: int
    numbers: int
    test_rows: int
    examples: list[RenderedExample]

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """First length, last length and number of rows of equally wide ranges."""
        low, high = min(self.lengths), max(self.lengths)
        width = (high - low) // BINS + 1
        starts = range(low, high + 1, width)
        return [(start, start + width - 1, sum(start <= n < start + width for n in self.lengths)) for start in starts]

    @property
    def median_length(self) -> float:
        """The median number of tokens."""
        return median(self.lengths)


def survey_data(config: RunConfig, tokenizer: Any) -> DataSurvey:
    """Encode the training rows of a data set, or a sample of them.

    Raises:
        ConfigError: rows are missing or broken.
    """
    data, source = config.data, config.data.source
    assert isinstance(source, DatasetSource)
    loaded = load_train_rows(data)
    rows = encode_rows(loaded.rows[:: len(loaded.rows) // MOST_ROWS + 1], tokenizer, data).rows
    by_length = sorted(rows, key=lambda row: row.length)
    chosen = {"the first": rows[0], "of median length": by_length[len(rows) // 2], "the longest": by_length[-1]}
    files = loaded.provenance["files"]
    return DataSurvey(
        description=loaded.provenance["description"],
        rendering=_rendering(rows, config, tokenizer),
        lengths=[row.length for row in rows],
        learned=[row.targets for row in rows],
        limit=data.max_length_tokens,
        duplicates=sum(file["duplicates"] for file in files),
        numbers=sum(file.get("numbers_as_text", 0) for file in files),
        test_rows=len(load_test_rows(data.tasks[0], data).rows),
        examples=[_render(which, row, tokenizer) for which, row in chosen.items()],
    )


def _rendering(rows: list[EncodedRow], config: RunConfig, tokenizer: Any) -> str:
    data, source = config.data, config.data.source
    assert isinstance(source, DatasetSource)
    if not any(is_chat(row.row, data, tokenizer) for row in rows):
        return "as it stands, with the end token; no chat template"
    own = source.chat_template or "the tokenizer's own"
    if data.train_on_inputs:
        return f"chat template: {own}; every token is learned (data.train_on_inputs)"
    marked = says_what_is_learned(find_template(source, tokenizer))
    how = "marked by the template" if marked else "the text behind each generation prompt"
    return f"chat template: {own}; the assistant's turns are learned ({how})"


def _render(which: str, row: EncodedRow, tokenizer: Any) -> RenderedExample:
    pairs = zip(row.ids, [0, *row.learned[1:]], strict=True)  # the first token is never predicted
    runs = [(bool(own), [token for token, _ in run]) for own, run in groupby(pairs, key=lambda pair: pair[1])]
    segments = [(tokenizer.decode(ids), own) for own, ids in runs]
    return RenderedExample(which=which, tokens=row.length, learned=row.targets, segments=segments)
