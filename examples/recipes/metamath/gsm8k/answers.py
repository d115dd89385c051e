"""Which number a text gives as its answer, behind the words that MetaMathQA and GSM8K write before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

# the first of these that a text has is looked for, at its last place
BEFORE = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def answer_of(text: str) -> Decimal | str | None:
    """The answer as a number if it is one, a fraction for example, else as text; None if the text gives none."""
    words = next((words for words in BEFORE if words in text), None)
    if words is None:
        return None
    line = text.rpartition(words)[2].strip().partition("\n")[0].strip(" .!?$%")
    above, bar, below = line.partition("/")
    try:
        return Decimal(above.strip()) / Decimal(below.strip()) if bar else Decimal(line)
    except (InvalidOperation, ZeroDivisionError):
        return line


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether what the model wrote gives the reference's answer."""
    given = answer_of(results[0])
    return {"exact_match": float(given is not None and given == answer_of(doc["answer"]))}
