"""Reading an answer out of a model's text, and saying whether it is right. Pure functions.

``published`` is what the LLM-Adapters evaluation does, its blind spots included: the last number of the text, the first
capital A-E (so "Answer: D" reads as "A"), the first label word. ``strict`` reads what stands after "answer is" or
"Answer:", or a text that is nothing but the answer::

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
_STATED = r"answer\s*(?:is|:)\s*:?\s*[\"'(*$]*\s*"
_STRICT_NUMBER = r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


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
    task = TASKS[doc["task"]]
    return {"acc": float(is_correct(extract_answer(results[0], task, doc["extraction"]), doc["answer"], task))}


def _published(output: str, task: Task) -> str | None:
    if task.answer == "number":
        numbers = re.findall(_NUMBER, output.replace(",", ""))
        return numbers[-1].rstrip(".") if numbers else None
    found = re.search("|".join(task.labels), output)
    return found.group() if found else None


def _strict(output: str, task: Task) -> str | None:
    if task.answer == "number":
        option, flags = f"({_STRICT_NUMBER})", re.IGNORECASE
    elif task.answer == "letter":
        option, flags = f"((?-i:[{''.join(task.labels)}]))\\b", re.IGNORECASE
    else:
        option, flags = rf"({'|'.join(task.labels)})\b", re.IGNORECASE
    found = re.search(_STATED + option, output, flags) or re.fullmatch(
        rf"[\s\"'(*$]*{option}[\s\"').*]*", output, flags
    )
    if not found:
        return None
    text = found.group(1)
    if task.answer == "number":
        return text.replace(",", "").replace("$", "")
    return text if task.answer == "letter" else text.lower()
