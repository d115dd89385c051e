"""Map records of the original datasets to rows in the published wording. Pure functions.

Each function takes a record as published by the authors of the dataset::

    MAPPINGS["boolq"]({"question": "is the sky blue", "passage": "...", "answer": True})

They raise :class:`~grass_ray.tasks.rows.RowError` if a record has another form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grass_ray.tasks.rows import Row, RowError

Record = Mapping[str, Any]

_CALCULATION = re.compile(r"<<[^<>]*>>")


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RowError(f"no text {key!r}; it has {', '.join(map(repr, record)) or 'no keys'}")
    return value


def _options(instruction: str, word: str, options: Sequence[str], index: int, gap: str = " ", end: str = "\n\n") -> Row:
    """A choice among numbered options: ``Answer1: ... Answer2: ...`` and the form of the answer."""
    if not 0 <= index < len(options):
        raise RowError(f"the correct option is number {index + 1} of {len(options)}")
    labels = [f"{word}{number}" for number in range(1, len(options) + 1)]
    listing = gap.join(f"{label.capitalize()}: {text}" for label, text in zip(labels, options, strict=True))
    return Row(
        instruction=f"{instruction}\n\n{listing}{end}Answer format: {'/'.join(labels)}",
        input="",
        output=f"the correct answer is {labels[index]}",
        answer=labels[index],
    )


def _index(given: object, base: int) -> int:
    """An index from a number or its text; hidden test labels are empty."""
    try:
        return int(str(given)) - base
    except ValueError:
        raise RowError(f"the label {given!r} is not a number; hidden test labels cannot be scored") from None


def boolq(record: Record) -> Row:
    """google/boolq: question, passage (not shown in this protocol), answer (bool)."""
    if not isinstance(record.get("answer"), bool):
        raise RowError(f"'answer' is {record.get('answer')!r}, not true or false")
    label = "true" if record["answer"] else "false"
    question = _text(record, "question").rstrip(" ?")
    return Row(
        instruction=f"Please answer the following question with true or false, question: {question}?\n\n"
        "Answer format: true/false",
        input="",
        output=f"the correct answer is {label}",
        answer=label,
    )


def piqa(record: Record) -> Row:
    """PIQA: goal, sol1, sol2, label (0 or 1)."""
    instruction = f"Please choose the correct solution to the question: {_text(record, 'goal')}"
    options = (_text(record, "sol1"), _text(record, "sol2"))
    return _options(instruction, "solution", options, _index(record.get("label"), 0), gap="\n\n")


def siqa(record: Record) -> Row:
    """Social IQa: context, question, answerA, answerB, answerC, label ("1" to "3")."""
    instruction = (
        f"Please choose the correct answer to the question: {_text(record, 'context')} {_text(record, 'question')}"
    )
    options = tuple(_text(record, f"answer{letter}") for letter in "ABC")
    return _options(instruction, "answer", options, _index(record.get("label"), 1))


def hellaswag(record: Record) -> Row:
    """HellaSwag: activity_label, ctx, endings, label ("0" to "3")."""
    instruction = (
        "Please choose the correct ending to complete the given sentence: "
        f"{_text(record, 'activity_label')}: {_text(record, 'ctx')}"
    )
    return _options(instruction, "ending", list(record.get("endings") or ()), _index(record.get("label"), 0))


def winogrande(record: Record) -> Row:
    """WinoGrande: sentence with a blank, option1, option2, answer ("1" or "2")."""
    instruction = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{_text(record, 'sentence')}"
    )
    options = (_text(record, "option1"), _text(record, "option2"))
    return _options(instruction, "option", options, _index(record.get("answer"), 1), end=" ")


def _lettered(record: Record, question_key: str) -> Row:
    choices = record.get("choices")
    if not isinstance(choices, Mapping) or not isinstance(choices.get("label"), Sequence):
        raise RowError("no 'choices' with 'text' and 'label'")
    letters, texts = list(choices["label"]), list(choices.get("text") or ())
    key = _text(record, "answerKey").strip()
    if key not in letters or len(letters) != len(texts):
        raise RowError(f"answerKey {key!r} is not among the labels {letters} of {len(texts)} choices")
    instruction = f"Please choose the correct answer to the question: {_text(record, question_key)}"
    return _options(instruction, "answer", texts, letters.index(key))


def arc(record: Record) -> Row:
    """ARC: question, choices {text, label}, answerKey (a letter, or a digit in some questions)."""
    return _lettered(record, "question")


def openbookqa(record: Record) -> Row:
    """OpenBookQA (main): question_stem, choices {text, label}, answerKey."""
    return _lettered(record, "question_stem")


def gsm8k(record: Record) -> Row:
    """GSM8K: question, answer (worked steps with calculator marks, then ``#### 72``)."""
    steps, mark, result = _text(record, "answer").rpartition("####")
    number = result.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise RowError("'answer' does not end in '#### ' and a number")
    worked = _CALCULATION.sub("", steps).strip()
    return Row(
        instruction=_text(record, "question").strip(),
        input="",
        output=f"{worked}\nThe answer is {number}.".strip(),
        answer=number,
    )


def aqua(record: Record) -> Row:
    """AQuA-RAT (raw): question, options (``A)21`` and so on), rationale, correct (a letter)."""
    options = [re.sub(r"^\s*([A-E])\s*\)\s*", r"(\1) ", str(option)) for option in record.get("options") or ()]
    letter = _text(record, "correct").strip()
    if not any(option.startswith(f"({letter}) ") for option in options):
        raise RowError(f"the correct option {letter!r} is not among {options}")
    return Row(
        instruction=f"{_text(record, 'question').strip()} Answer Choices: {' '.join(options)}",
        input="",
        output=f"{_text(record, 'rationale').strip()}\nThe answer is ({letter}).",
        answer=letter,
    )


MAPPINGS: Mapping[str, Callable[[Record], Row]] = {
    "boolq": boolq,
    "piqa": piqa,
    "siqa": siqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
    "openbookqa": openbookqa,
    "gsm8k": gsm8k,
    "aqua": aqua,
}
