"""Loss of the right answer to each question, by log-likelihood. Importing this module loads no torch.

A question with options has two: the negative log-likelihood of the response that states the right option, and the
negative logarithm of its share among all options (what a softmax over their log-likelihoods gives it). A question for a
number has the first alone, for the reference response of its row: with the worked solution, if the data have one.
White space between prompt and option counts as part of the option, as in lm-eval; all options of a question begin with
it. It is no part of a reference response: no run trains it, and after training it may cost more than all the rest.

Accuracy counts a question as right or wrong; the loss also says by how much, and so tells methods apart with fewer
questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from grass_ray.tasks.questions import Question, options_of
from grass_ray.tasks.suites import Task
from grass_ray.tasks.templates import render_answer, render_response

if TYPE_CHECKING:
    from grass_ray.tasks.inference.harness import ObservedLM


REFERENCE_RULES = 2  # version of what a reference response is; results of different versions are not ranked together


class AnswerLoss(NamedTuple):
    """Loss of the right answer to one question: fields of :class:`~grass_ray.tasks.scores.Example`."""

    answer_nats: float
    answer_tokens: int
    option_nats: float | None


def responses(task: Task, question: Question) -> list[str]:
    """The responses whose log-likelihood is needed: those of all options, or the reference response alone."""
    if task.answer == "number":
        return [render_response(question.row) or render_answer(task, question.row.answer)]
    return [render_answer(task, option) for option in options_of(task, question.row)]


def measure_losses(lm: ObservedLM, task: Task, questions: Sequence[Question]) -> list[AnswerLoss]:
    """Measure the loss of the right answer to each question of a task."""
    asked = [responses(task, question) for question in questions]
    pairs = [(question.text, text) for question, texts in zip(questions, asked, strict=True) for text in texts]
    likelihoods = iter(lm.score_pairs(pairs, with_space=task.answer != "number"))
    return [
        loss_among(lm, task, question, [next(likelihoods) for _ in texts])
        for question, texts in zip(questions, asked, strict=True)
    ]


def loss_among(lm: ObservedLM, task: Task, question: Question, likelihoods: Sequence[float]) -> AnswerLoss:
    """The loss, given the log-likelihood in nats of each of :func:`responses`."""
    texts = responses(task, question)
    if task.answer == "number":
        return AnswerLoss(-likelihoods[0], lm.count_tokens(question.text, texts[0], with_space=False), None)
    right = options_of(task, question.row).index(question.row.answer)
    most = max(likelihoods)
    whole = most + math.log(sum(math.exp(value - most) for value in likelihoods))
    tokens = lm.count_tokens(question.text, texts[right], with_space=True)
    return AnswerLoss(-likelihoods[right], tokens, whole - likelihoods[right])
