"""Questions: rows of a test set as a model is asked. Importing this module loads no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any, TypeVar

from grass_ray.config import EvaluationConfig
from grass_ray.tasks.rows import Row
from grass_ray.tasks.suites import TASKS, Task
from grass_ray.tasks.templates import TemplateName, render_answer, render_prompt

# fixed, so every run evaluates the same subset, and smaller limits are subsets of larger ones
LIMIT_SEED = 20_240_531

Asked = TypeVar("Asked")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row as it is asked: its id, the text of the prompt, and the row."""

    id: str
    text: str
    row: Row


def ask(task: Task, rows: Sequence[Row], template: TemplateName) -> list[Question]:
    """Make a question of each row.

    Its id is 16 hexadecimal digits of a hash of the task, the prompt and, for a repeated prompt, its number.
    """
    seen: dict[str, int] = {}
    questions = []
    for row in rows:
        text = render_prompt(row, template)
        repetition = seen[text] = seen.get(text, 0) + 1
        name = f"{task.key}\n{text}" + (f"\n#{repetition}" if repetition > 1 else "")
        questions.append(Question(id=hashlib.sha256(name.encode()).hexdigest()[:16], text=text, row=row))
    return questions


def select_examples(questions: Sequence[Asked], limit: int | None) -> list[Asked]:
    """Select ``limit`` random questions, in their order; all if ``limit`` is None.

    The seed is fixed, so every run selects the same questions, and smaller limits are subsets of larger ones.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    order = list(range(len(questions)))
    Random(LIMIT_SEED).shuffle(order)
    return [questions[index] for index in sorted(order[:limit])]


def options_of(task: Task, row: Row) -> tuple[str, ...]:
    """Return the options of a question: those that its "Answer format" line names, else all labels of the task."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", row.instruction)
    named = tuple(found.group(1).split("/")) if found else ()
    return named if row.answer in named and set(named) <= set(task.labels) else task.labels


def chance(task: Task, rows: Sequence[Row]) -> float:
    """Return the expected accuracy of guessing: the mean of 1/options over the questions; 0 for numbers."""
    return 0.0 if task.answer == "number" else fmean(1 / len(options_of(task, row)) for row in rows)


def make_document(task: Task, question: Question, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Make the document that lm-eval gets for a question."""
    document: dict[str, Any] = {
        "task": task.key,
        "prompt": question.text,
        "answer": question.row.answer,
        "extraction": evaluation.extraction,
    }
    if task.key not in TASKS:  # built-in tasks are looked up by their key
        document |= {"kind": task.answer, "labels": list(task.labels)}
    if evaluation.scoring == "loglikelihood":
        options = options_of(task, question.row)
        document["choices"] = [render_answer(task, option) for option in options]
        document["gold"] = options.index(question.row.answer)
    return document


def estimate_cost(document: Mapping[str, Any], max_new_tokens: int) -> int:
    """Estimate how long a question takes, in characters that the model processes."""
    if "choices" in document:
        return sum(len(document["prompt"]) + len(choice) for choice in document["choices"])
    return len(document["prompt"]) + 4 * max_new_tokens  # a token is about four characters of English
