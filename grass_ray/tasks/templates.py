"""Prompt templates: how a row becomes the prompt and the response.

Both templates have the Alpaca form (a sentence, ``### Instruction:``, ``### Response:``). ``clean`` has no superfluous
white space; ``published`` keeps that of the LLM-Adapters evaluation (16-space indents, a trailing space after the first
sentence, a prompt that ends in an indent), for comparison with published numbers::

    text = render_prompt(row, "clean") + render_response(row)
"""

from __future__ import annotations

from typing import Literal

from grass_ray.tasks.rows import Row
from grass_ray.tasks.suites import Task

TemplateName = Literal["clean", "published"]

_INDENT = " " * 16
_PUBLISHED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"
)
_PUBLISHED_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Input:\n{_INDENT}{{input}}\n\n"
    f"{_INDENT}### Response:\n{_INDENT}"
)
_CLEAN = "Write a response that completes the instruction.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
_CLEAN_WITH_INPUT = (
    "Write a response that completes the instruction.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def render_prompt(row: Row, template: TemplateName) -> str:
    """Return the text before the response. ``clean`` strips the instruction, ``published`` does not."""
    if template == "published":
        form = _PUBLISHED_WITH_INPUT if row.input else _PUBLISHED
        return form.format(instruction=row.instruction, input=row.input)
    form = _CLEAN_WITH_INPUT if row.input.strip() else _CLEAN
    return form.format(instruction=row.instruction.strip(), input=row.input.strip())


def render_response(row: Row) -> str:
    """Return the text to learn, stripped and without an end token."""
    return row.output.strip()


def render_answer(task: Task, answer: str) -> str:
    """Return the response that states an answer, in the words of the training data."""
    if task.answer == "labels":
        return f"the correct answer is {answer}"
    return f"The answer is ({answer})." if task.answer == "letter" else f"The answer is {answer}."
