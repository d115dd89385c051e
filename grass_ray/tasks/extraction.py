"""Reading an answer out of a model's text, and saying whether it is right. Pure functions.

``published`` is what the LLM-Adapters evaluation does, its blind spots included: the last number of the text, the first
capital A-E (so "Answer: D" reads as "A"), the first label word. ``strict`` reads what stands after "answer is" or
"Answer:" (the first such place), after GSM8K's "####" or in a box, or a text that is nothing but the answer; it reads
fractions as numbers::

    extract_answer("The answer is (D).", TASKS["aqua"], "strict")     # "D"
    is_correct("D", "D", TASKS["aqua"])                               # True
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from grass_ray.tasks.rows import parse_number
from grass_ray.tasks.suites import TASKS, Task

ExtractionName = Literal["published", "strict"]

TOLERANCE = 0.001

_NUMBER = r"-?\d+\.?\d*"
_STATED = r"answer[\"'*]*\s*(?:is|:|=)\s*[:=]?\s*[\"'(*$]*\s*"
_ABOUT = r"(?:(?:approximately|about|exactly|equal to|therefore|thus)\s*)?"
_STRICT_NUMBER = (
    r"-?\$?-?(?:(?:\d{1,15}\s+)?\d{1,15}\s*/\s*\d{1,15}(?![\d/])"  # a fraction, before it a whole number
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
)


def extract_answer(output: str, task: Task, extraction: ExtractionName) -> str | None:
    """The answer that ``output`` gives, or None where it gives none."""
    if extraction == "published":
        return _published(output, task)
    return _strict(output, task)


def is_correct(extracted: str | None, answer: str, task: Task) -> bool:
    """Whether an extracted answer is the row's: numbers within 0.001, words exactly."""
    if extracted is None:
        return False
    if task.answer != "number":
        return extracted == answer
    given, wanted = parse_number(extracted), parse_number(answer)
    return given is not None and wanted is not None and abs(given - wanted) <= TOLERANCE


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: the score of one generated text."""
    task = TASKS.get(doc["task"]) or _own_task(doc)
    return {"acc": float(is_correct(extract_answer(results[0], task, doc["extraction"]), doc["answer"], task))}


def _own_task(doc: Mapping[str, Any]) -> Task:
    """A user's own task, of which the document says all that scoring needs."""
    name, labels = doc["task"], tuple(doc["labels"] or ())
    return Task(
        key=name,
        title=name,
        suite=name,
        folder=name,
        answer=doc["kind"],
        labels=labels,
        max_new_tokens=1,
        test_rows=None,
    )


def _published(output: str, task: Task) -> str | None:
    if task.answer == "number":
        numbers = re.findall(_NUMBER, output.replace(",", ""))
        return numbers[-1].rstrip(".") if numbers else None
    found = re.search("|".join(re.escape(label) for label in sorted(task.labels, key=len, reverse=True)), output)
    return found.group() if found else None


def _strict(output: str, task: Task) -> str | None:
    text = output.replace("\N{MINUS SIGN}", "-")
    if task.answer == "number":
        return _strict_number(text)
    if task.answer == "letter":
        return _strict_letter(text, task.labels)
    return _strict_label(text, task.labels)


def _strict_number(text: str) -> str | None:
    """The stated number, or that of a text which is a number and at most three words of unit."""
    if marked := re.search(rf"(?:####|\\boxed\{{)\s*({_STRICT_NUMBER})", text):
        return _plain(marked.group(1))
    stated = re.search(rf"{_STATED}{_ABOUT}({_STRICT_NUMBER})(?P<rest>[^\n]*)", text, re.IGNORECASE)
    if stated:
        # a stated equation ("3 + 4 = 7") means its result
        result = re.match(rf"[\s\d.,()+*/x$%^-]*=\s*({_STRICT_NUMBER})", stated.group("rest"))
        return _plain(result.group(1) if result else stated.group(1))
    alone = re.fullmatch(rf"[\s\"'(*=]*({_STRICT_NUMBER})\s*%?(?:[A-Za-z]+(?:\s+[A-Za-z]+){{0,2}})?[\s\"').*]*", text)
    return _plain(alone.group(1)) if alone else None


def _strict_letter(text: str, letters: Sequence[str]) -> str | None:
    """The stated option; small letters count where nothing else can be meant: in brackets or at the end."""
    either = "".join(letters) + "".join(letters).lower()
    option = rf"(?:option|choice)?\s*[\"'(*]*(?:(?-i:([{''.join(letters)}]))\b|([{either}])(?=\)|[.*\"']*\s*$))"
    found = re.search(_STATED + option, text, re.IGNORECASE | re.MULTILINE)
    found = found or re.fullmatch(rf"[\s\"'*]*{option}[\s\"').*]*", text, re.IGNORECASE)
    if found is None and len(re.findall(rf"(?<!\w)\(?[{''.join(letters)}]\)", text)) == 1:
        found = re.match(rf"\s*\(?([{''.join(letters)}])()\)", text)  # "(D) 42": one option, with its text
    return (found.group(1) or found.group(2)).upper() if found else None


def _strict_label(text: str, labels: Sequence[str]) -> str | None:
    """The stated label, or that of a text which is one or says it is the right one; case and "solution 2" are free."""
    names = {re.sub(r"\s", "", label).lower(): label for label in labels}
    forms = [re.sub(r"(?<=[a-z])(?=\d)", r"\\s?", re.escape(label)) for label in sorted(labels, key=len, reverse=True)]
    option = rf"({'|'.join(forms)})(?!\w)"
    found = (
        re.search(_STATED + option, text, re.IGNORECASE)
        or re.fullmatch(rf"[\s\"'(*]*{option}[\s\"').*]*", text, re.IGNORECASE)
        or re.search(rf"(?<!\w){option} is (?:the )?(?:correct|right|best)\b", text, re.IGNORECASE)
    )
    return names[re.sub(r"\s", "", found.group(1)).lower()] if found else None


def _plain(number: str) -> str:
    """A number as Python reads it; a fraction as a decimal number."""
    text = re.sub(r"[,$]", "", number).replace("--", "-")
    parts = re.fullmatch(r"(?:(-?\d+)\s+)?(-?\d+)\s*/\s*(\d+)", text)
    if parts is None:
        return re.sub(r"\s", "", text)
    whole, numerator, denominator = parts.groups(default="0")
    if not int(denominator):
        return numerator
    share = int(numerator) / int(denominator)
    return f"{int(whole) + (-share if whole.startswith('-') else share):.10g}"
