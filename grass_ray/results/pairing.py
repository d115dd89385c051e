"""Two groups of runs compared question by question.

::

    difference = compare_groups(runs_of_grass, runs_of_full)
    difference.value, difference.low, difference.high, difference.p_value, difference.test

Where both sides have at least two seeds, or one has and the other was not trained: a two-level t-test, whose p-value
and interval cover both other trainings and other questions (:func:`grass_ray.results.statistics.two_level`).

With one seed nothing is known of other trainings, and what is said is of these trainings alone
(``covers_training`` is False). One task and one seed each: McNemar's exact test. Where tasks or one side's seeds are
averaged: the paired sign-flip test, McNemar's generalisation. The interval is a paired bootstrap over questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from grass_ray.results.record import RunRecord
from grass_ray.results.statistics import holding_zero, mcnemar, paired_bootstrap, sign_flip, two_level

Test = Literal["exact McNemar", "paired sign-flip", "two-level t"]

# (example id, how often that id came before): equal prompts share an id
Question = tuple[str, int]


def scope(covers_training: bool | None) -> str:
    """What a p-value speaks of, in two words."""
    return "-" if covers_training is None else "any seed" if covers_training else "these runs"


def scope_notes(found: Iterable[bool | None]) -> list[str]:
    """What these words mean, a sentence each."""
    covered, notes = set(found), []
    if True in covered:
        notes.append("p for any seed: p-value and interval of the difference cover other seeds and other questions")
    if False in covered:
        notes.append(
            "p for these runs: one seed on a side, so p-value and interval of the difference cover other questions "
            "alone and say nothing of other seeds"
        )
    return notes


class TaskAnswers(NamedTuple):
    """The answers to the questions that every seed was asked: 0 or 1, seeds by questions."""

    questions: tuple[Question, ...]
    correct: NDArray[np.float64]

    def at(self, questions: Sequence[Question]) -> NDArray[np.float64]:
        """The columns of these questions."""
        if tuple(questions) == self.questions:
            return self.correct
        place = {question: column for column, question in enumerate(self.questions)}
        return self.correct[:, [place[question] for question in questions]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the finished seeds of a group answered, task by task; ``trained`` tells whether trainings differ."""

    tasks: Mapping[str, TaskAnswers]
    trained: bool

    def mean(self, task: str) -> dict[Question, float]:
        """How right each question of a task was answered over the seeds, 0 to 1."""
        found = self.tasks.get(task)
        return {} if found is None else dict(zip(found.questions, found.correct.mean(axis=0).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First minus second: the mean over tasks of the share of questions, its 95 % limits, p-value and test."""

    value: float
    low: float
    high: float
    p_value: float
    test: Test

    @property
    def covers_training(self) -> bool:
        """Whether limits and p-value speak of the methods; else of these trainings alone."""
        return self.test == "two-level t"


def collect_answers(group: Sequence[RunRecord]) -> Answers:
    """The answers of the finished seeds of a group, in the first one's order of questions."""
    finished = [record for record in group if record.status == "finished" and record.tasks]
    tasks = {}
    for task in finished[0].tasks if finished else ():
        scores = [record.tasks[task] for record in finished if task in record.tasks]
        if len(scores) < len(finished):
            continue
        seeds = [_by_question(score.example_ids, score.correct) for score in scores]
        asked = tuple(question for question in seeds[0] if all(question in seed for seed in seeds[1:]))
        tasks[task] = TaskAnswers(asked, np.array([[seed[key] for key in asked] for seed in seeds], dtype=float))
    return Answers(tasks=tasks, trained=any(record.config["training"]["steps"] for record in group))


def _by_question(ids: Sequence[str], correct: Sequence[bool]) -> dict[Question, bool]:
    seen: defaultdict[str, int] = defaultdict(int)
    found = {}
    for example, right in zip(ids, correct, strict=True):
        found[example, seen[example]] = right
        seen[example] += 1
    return found


def compare_answers(first: Answers, second: Answers) -> Difference | None:
    """The difference over the questions both were asked; None where there is none in common."""
    pairs = []
    for task in sorted(first.tasks.keys() & second.tasks.keys()):
        own, other = first.tasks[task], second.tasks[task]
        common: Sequence[Question] = own.questions
        if own.questions != other.questions:
            theirs = set(other.questions)
            common = [question for question in own.questions if question in theirs]
        if common:
            pairs.append((own.at(common), other.at(common)))
    if not pairs:
        return None
    value = float(sum((_share(own) - _share(other) for own, other in pairs), Fraction()) / len(pairs))
    seeds = [min(len(task[side]) for task in pairs) for side in (0, 1)]
    if (
        _several_trainings(first, seeds[0])
        and _several_trainings(second, seeds[1])
        and (first.trained or second.trained)
    ):
        low, high, p_value = two_level(pairs, vary=(first.trained, second.trained))
        return Difference(value=value, low=low, high=high, p_value=p_value, test="two-level t")
    differences = [(own.mean(axis=0) - other.mean(axis=0)).tolist() for own, other in pairs]
    test: Test = "exact McNemar" if len(pairs) == 1 and max(seeds) == 1 else "paired sign-flip"
    if test == "exact McNemar":
        p_value = mcnemar(*((answers[0] == 1).tolist() for answers in pairs[0]))
    else:
        p_value = sign_flip(differences)
    low, high = holding_zero(paired_bootstrap(differences), p_value)
    return Difference(value=value, low=low, high=high, p_value=p_value, test=test)


def _share(correct: NDArray[np.float64]) -> Fraction:
    return Fraction(int(correct.sum()), correct.size)


def _several_trainings(answers: Answers, seeds: int) -> bool:
    return seeds > 1 or not answers.trained


def compare_groups(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> Difference | None:
    """Compare the finished runs of two groups; None where they share no question."""
    return compare_answers(collect_answers(first), collect_answers(second))
