"""How two groups of runs compare question by question, by accuracy or by loss.

::

    comparison = compare_answers(collect_answers(runs_of_grass), collect_answers(runs_of_full))
    comparison.value, comparison.low, comparison.high, comparison.p_value, comparison.test
    by_loss = compare_answers(collect_answers(runs_of_grass, "loss"), collect_answers(runs_of_full, "loss"))

If both groups have at least two seeds, or one has and the other was not trained, they are compared by a two-level
t-test, whose p-value and interval cover both other training runs and other questions
(:func:`grass_ray.results.statistics.two_level`). With one seed nothing is known of other training runs, and the result
covers these runs alone (``covers_training`` is False). Of right and wrong answers it is then McNemar's exact test for
one task and one seed each, and where tasks or one side's seeds are averaged the paired sign-flip test, its
generalisation; their interval is a paired bootstrap over questions. Of losses, which are numbers that differ on almost
every question, it is the paired t-test over questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from grass_ray.results.record import LmEvalScore, RunRecord, TaskScore
from grass_ray.results.statistics import (
    benjamini_hochberg,
    holding_zero,
    mcnemar,
    paired_bootstrap,
    question_variance,
    sign_flip,
    two_level,
)
from grass_ray.tasks.lm_eval_scores import is_averaged

Key = TypeVar("Key")
Metric = Literal["accuracy", "loss", "lm_eval"]
METRICS: tuple[Metric, ...] = ("accuracy", "loss", "lm_eval")
Test = Literal["exact McNemar", "paired sign-flip", "paired t", "two-level t"]

LEVEL = 0.05  # of a test: how often a difference is reported where there is none

# (example id, how often that id came before): equal prompts share an id
Question = tuple[str, int]
_Pair = tuple[NDArray[np.float64], NDArray[np.float64]]  # both sides' values of the same questions of a task


class TaskAnswers(NamedTuple):
    """What every seed made of each question that all were asked, of shape (seeds, questions).

    Accuracies are 0 or 1; losses are in nats; metrics of lm-eval's own tasks are from 0 to 1.
    """

    questions: tuple[Question, ...]
    values: NDArray[np.float64]

    def at(self, questions: Sequence[Question]) -> NDArray[np.float64]:
        """The columns of these questions, of shape (seeds, questions)."""
        if tuple(questions) == self.questions:
            return self.values
        place = {question: column for column, question in enumerate(self.questions)}
        return self.values[:, [place[question] for question in questions]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the finished seeds of a group answered, by task. ``trained`` is False for the untrained base model."""

    tasks: Mapping[str, TaskAnswers]
    trained: bool
    metric: Metric = "accuracy"

    def only(self, tasks: Iterable[str]) -> Answers:
        """The answers of these tasks alone."""
        return replace(self, tasks={task: self.tasks[task] for task in tasks if task in self.tasks})

    def mean(self, task: str) -> dict[Question, float]:
        """The mean over seeds of each question of a task."""
        found = self.tasks.get(task)
        return {} if found is None else dict(zip(found.questions, found.values.mean(axis=0).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """First minus second, the mean over tasks: a difference, its 95 % limits, p-value and test.

    Of accuracies it is a share of the questions (-1 to 1), of losses nats.

    Attributes:
        p_adjusted: the p-value adjusted (Benjamini-Hochberg) over the comparisons of a table.
        seeds: how many trainings each side has, of the sides that vary with their training; none if the comparison
            covers these runs alone.
        questions: for each task how many, and the variance of the difference over them.
        detectable: the smallest true difference that it would have found with 80 % power at the unadjusted 5 % level
            (:mod:`grass_ray.results.power`).
    """

    value: float
    low: float
    high: float
    p_value: float
    test: Test
    p_adjusted: float | None = None
    seeds: tuple[int, ...] = ()
    questions: tuple[tuple[int, float], ...] = ()
    detectable: float | None = None

    @property
    def covers_training(self) -> bool:
        """Whether limits and p-value cover other training runs (seeds), too; else these runs alone."""
        return self.test == "two-level t"

    @property
    def limits(self) -> tuple[float, float]:
        """The 95 % limits."""
        return self.low, self.high

    @property
    def told_apart(self) -> bool:
        """Whether the two differ at the 5 % level, adjusted where there are several comparisons."""
        return (self.p_value if self.p_adjusted is None else self.p_adjusted) < LEVEL


def fact(comparison: Comparison | None, name: str) -> Any:
    """An attribute of a comparison; None if there is none."""
    return None if comparison is None else getattr(comparison, name)


def collect_answers(group: Sequence[RunRecord], metric: Metric = "accuracy") -> Answers:
    """The answers of the finished seeds of a group, in the first seed's order of questions.

    There are no losses unless every seed has finite ones on every task.
    """
    finished = [record for record in group if record.status == "finished" and record.is_tested]
    trained = any(record.config["training"]["steps"] for record in group)
    if metric == "lm_eval":
        return Answers(tasks=_of_lm_eval(finished), trained=trained, metric=metric)
    tasks = {}
    for task in finished[0].tasks if finished else ():
        scores = [record.tasks[task] for record in finished if task in record.tasks]
        if len(scores) < len(finished) or (metric == "accuracy" and scores[0].scoring == "loss"):
            continue
        values = [score.correct if metric == "accuracy" else score.losses or [] for score in scores]
        tasks[task] = _together([_by_question(*own) for own in zip(scores, values, strict=True)])
    if metric == "loss" and not all(task.questions and np.isfinite(task.values).all() for task in tasks.values()):
        tasks = {}
    return Answers(tasks=tasks, trained=trained, metric=metric)


def _of_lm_eval(finished: Sequence[RunRecord]) -> dict[str, TaskAnswers]:
    """The examples of lm-eval's own tasks that have a value in every seed."""
    tasks = {}
    for task in finished[0].lm_eval if finished else ():
        scores = [record.lm_eval[task] for record in finished if task in record.lm_eval]
        if len(scores) == len(finished) and all(map(is_averaged, scores)):
            tasks[task] = _together([_by_question(score, score.values or []) for score in scores])
    return tasks


def _together(seeds: Sequence[Mapping[Question, float]]) -> TaskAnswers:
    asked = tuple(question for question in seeds[0] if all(question in seed for seed in seeds[1:]))
    return TaskAnswers(asked, np.array([[seed[key] for key in asked] for seed in seeds], dtype=float))


def _by_question(score: TaskScore | LmEvalScore, values: Sequence[float]) -> dict[Question, float]:
    seen: defaultdict[str, int] = defaultdict(int)
    found = {}
    for example, value in zip(score.example_ids if values else (), values, strict=True):
        found[example, seen[example]] = value
        seen[example] += 1
    return found


def compare_answers(first: Answers, second: Answers) -> Comparison | None:
    """Compare over the questions that both were asked, by the same metric; None if they share none."""
    pairs: list[_Pair] = []
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
    seeds = [min(len(task[side]) for task in pairs) for side in (0, 1)]
    several = (
        _several_trainings(first, seeds[0])
        and _several_trainings(second, seeds[1])
        and (first.trained or second.trained)
    )
    vary = (first.trained, second.trained) if several else (False, False)
    low, high, p_value, test = _tested(pairs, first.metric, vary)
    return Comparison(
        value=_difference(pairs, first.metric),
        low=low,
        high=high,
        p_value=p_value,
        test=test,
        seeds=tuple(n for n, varies in zip(seeds, vary, strict=True) if varies),
        questions=tuple((own.shape[1], question_variance(own, other, vary=vary)) for own, other in pairs),
    )


def _tested(pairs: Sequence[_Pair], metric: Metric, vary: tuple[bool, bool]) -> tuple[float, float, float, Test]:
    """Limits, p-value and the test that they are of."""
    shares = _are_right_or_wrong(pairs, metric)
    if any(vary) or not shares:
        return *two_level(pairs, vary=vary, shares=shares), "two-level t" if any(vary) else "paired t"
    differences = [(own.mean(axis=0) - other.mean(axis=0)).tolist() for own, other in pairs]
    once = all(len(values) == 1 for values in pairs[0])
    test: Test = "exact McNemar" if len(pairs) == 1 and once else "paired sign-flip"
    if test == "exact McNemar":
        p_value = mcnemar(*((answers[0] == 1).tolist() for answers in pairs[0]))
    else:
        p_value = sign_flip(differences)
    return *holding_zero(paired_bootstrap(differences), p_value), p_value, test


def _are_right_or_wrong(pairs: Sequence[_Pair], metric: Metric) -> bool:
    if metric != "lm_eval":
        return metric == "accuracy"
    return all(np.isin(values, (0, 1)).all() for pair in pairs for values in pair)


def _difference(pairs: Sequence[_Pair], metric: Metric) -> float:
    if not _are_right_or_wrong(pairs, metric):
        return float(np.mean([own.mean() - other.mean() for own, other in pairs]))
    return float(sum((_share(own) - _share(other) for own, other in pairs), Fraction()) / len(pairs))


def _share(correct: NDArray[np.float64]) -> Fraction:
    return Fraction(int(correct.sum()), correct.size)


def _several_trainings(answers: Answers, seeds: int) -> bool:
    return seeds > 1 or not answers.trained


def adjust(found: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """The comparisons with their p-values adjusted over all of them."""
    adjusted = benjamini_hochberg([comparison.p_value for comparison in found.values()])
    return {key: replace(found[key], p_adjusted=value) for key, value in zip(found, adjusted, strict=True)}
