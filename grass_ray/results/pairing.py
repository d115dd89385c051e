"""Two groups of runs compared question by question.

::

    difference = compare_groups(runs_of_grass, runs_of_full)
    difference.value, difference.low, difference.high, difference.p_value, difference.test

One task and one seed each: McNemar's exact test. Where several tasks or seeds are averaged: each question's
difference is the mean over seeds, the statistic the mean over tasks, and the p-value that of the paired sign-flip
test, McNemar's generalisation. The interval is a paired bootstrap over questions in both cases. Training varies too,
which no test over questions sees: the spread over seeds is shown apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from grass_ray.results.record import RunRecord
from grass_ray.results.statistics import mcnemar, paired_bootstrap, sign_flip

Test = Literal["exact McNemar", "paired sign-flip"]

# task -> (example id, how often that id came before: equal prompts share an id) -> accuracy over seeds, 0 to 1
Answers = Mapping[str, Mapping[tuple[str, int], float]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First minus second: the mean over tasks of the share of questions, its 95 % limits, p-value and test."""

    value: float
    low: float
    high: float
    p_value: float
    test: Test


def mean_answers(group: Sequence[RunRecord]) -> Answers:
    """How right each question was answered over the finished seeds of a group."""
    collected: defaultdict[str, defaultdict[tuple[str, int], list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in group:
        if record.status != "finished":
            continue
        for task, score in record.tasks.items():
            seen: defaultdict[str, int] = defaultdict(int)
            for example, correct in zip(score.example_ids, score.correct, strict=True):
                collected[task][example, seen[example]].append(correct)
                seen[example] += 1
    return {
        task: {key: sum(values) / len(values) for key, values in questions.items()}
        for task, questions in collected.items()
    }


def compare_answers(first: Answers, second: Answers) -> Difference | None:
    """The difference over the questions both were asked; None where there is none in common."""
    pairs = {
        task: [(first[task][key], second[task][key]) for key in first[task] if key in second[task]]
        for task in sorted(first.keys() & second.keys())
    }
    differences = [[own - other for own, other in found] for found in pairs.values() if found]
    if not differences:
        return None
    whole = all(value in (0.0, 1.0) for found in pairs.values() for pair in found for value in pair)
    test: Test = "exact McNemar" if len(differences) == 1 and whole else "paired sign-flip"
    low, high = paired_bootstrap(differences)
    return Difference(
        value=fmean(fmean(task) for task in differences),
        low=low,
        high=high,
        p_value=_mcnemar(next(found for found in pairs.values() if found))
        if test == "exact McNemar"
        else sign_flip(differences),
        test=test,
    )


def compare_groups(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> Difference | None:
    """Compare the finished runs of two groups; None where they share no question."""
    return compare_answers(mean_answers(first), mean_answers(second))


def _mcnemar(pairs: Sequence[tuple[float, float]]) -> float:
    return mcnemar([own == 1.0 for own, _ in pairs], [other == 1.0 for _, other in pairs])
