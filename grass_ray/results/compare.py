"""Which runs may be compared with each other, and how two groups of runs compare question by question.

::

    for test, records in comparable_groups(records):      # one table each
        print(test.name, len(records))
    comparison = compare_answers(collect_answers(runs_of_grass), collect_answers(runs_of_full))
    comparison.value, comparison.low, comparison.high, comparison.p_value, comparison.test

What a run was asked for is in its configuration; what it was asked is in its scores: the questions, the file they came
from, and how answers were extracted and judged. A run that was not tested (failed, stopped, searched) stands with the
runs of its configuration.

If both groups have at least two seeds, or one has and the other was not trained, they are compared by a two-level
t-test, whose p-value and interval cover both other training runs and other questions
(:func:`grass_ray.results.statistics.two_level`). With one seed nothing is known of other training runs, and the result
covers these runs alone (``covers_training`` is False): McNemar's exact test for one task and one seed each; the paired
sign-flip test, its generalisation, where tasks or one side's seeds are averaged. Their interval is a paired bootstrap
over questions.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from grass_ray.results.record import RunRecord, TaskScore
from grass_ray.results.statistics import (
    benjamini_hochberg,
    holding_zero,
    mcnemar,
    paired_bootstrap,
    sign_flip,
    two_level,
)

# What decides how answers are read, from the configuration.
EVALUATION = ("limit", "scoring", "extraction", "num_beams")
# What a source says of the test itself; where its files are is no matter, and their hashes are in the scores.
_OF_THE_TEST = ("seed", "test_rows", "instruction", "answer", "labels")
# What a score's protocol says that changes neither question nor verdict: places, counts, and what ids say already.
_SAME_TEST = frozenset(
    {"batch_size", "test_file", "test_rows", "test_rows_skipped", "broken_rows", "limit", "limit_seed"}
    | {"chance", "lm_eval"}
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a table's runs were tested on. ``name`` is equal for equal tests, whatever the model and the machine."""

    name: str
    facts: Mapping[str, str]


def table_key(record: RunRecord) -> list[Any]:
    """What must be equal in the configurations of two runs that are ranked together, as plain values."""
    config = record.config
    data = config["data"]
    source = {key: value for key, value in data.get("source", {}).items() if key in _OF_THE_TEST}
    protocol = [config["evaluation"].get(key) for key in EVALUATION]
    tasks = sorted(data["tasks"])
    place = [record.hardware, record.world_size]
    return [config["model"]["name"], data["suite"], *place, tasks, protocol, data.get("template"), source]


def same_test_key(record: RunRecord) -> list[Any]:
    """As :func:`table_key` without the machine, which changes no question."""
    model, suite, _, _, *rest = table_key(record)
    return [model, suite, *rest]


def comparable_groups(records: Iterable[RunRecord], key: Any = table_key) -> list[tuple[Asked, list[RunRecord]]]:
    """The records of each table in their order, by ``key`` and then by what they were actually tested on.

    Two runs share a table where nothing that both recorded differs: the questions and their file, the rules, the base
    model's weights.
    """
    tables: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        tables[json.dumps(key(record), sort_keys=True)].append(record)
    return [group for name in sorted(tables) for group in _split(tables[name])]


def _split(records: Sequence[RunRecord]) -> list[tuple[Asked, list[RunRecord]]]:
    """One group for each test. Records that say most come first; others join a group that they do not contradict."""
    groups: list[tuple[dict[str, str], list[int]]] = []
    said = [_facts(record) for record in records]
    for place in sorted(range(len(records)), key=lambda place: (-len(said[place]), place)):
        own, source = said[place], records[place].config["data"].get("source")
        fitting = [group for group in groups if _agree(group[0], own)]
        if not fitting:
            groups.append((dict(own), [place]))
            continue

        def likeness(group: tuple[dict[str, str], list[int]], source: Any = source) -> tuple[bool, int]:
            return any(records[other].config["data"].get("source") == source for other in group[1]), len(group[1])

        facts, members = max(fitting, key=likeness)
        facts |= {key: value for key, value in own.items() if key not in facts}
        members.append(place)
    wanted = same_test_key(records[0])[1:]
    return [
        (Asked(name=_name(wanted, facts), facts=facts), [records[place] for place in sorted(members)])
        for facts, members in sorted(groups, key=lambda group: min(group[1]))
    ]


def _agree(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether nothing differs. A missing fact is unknown; it is a difference if both recorded how they tested."""
    for key in first.keys() | second.keys():
        told = all(f"{key.split()[0]} test sha256" in facts for facts in (first, second))
        if first.get(key) != second.get(key) and (told or (key in first and key in second)):
            return False
    return True


def _facts(record: RunRecord) -> dict[str, str]:
    """Facts about a record's test, each a short text; of a run that was not tested only the base model's weights."""
    facts = {} if record.model_sha256 is None else {"base model": f"sha256 {record.model_sha256[:12]}"}
    for task, score in record.tasks.items():
        if not score.num_examples:
            continue
        facts |= {f"{task} questions": str(score.num_examples), f"{task} ids": _digest(sorted(score.example_ids))}
        facts |= {f"{task} {key.replace('_', ' ')}": value for key, value in _rules(score)}
    return facts


def _rules(score: TaskScore) -> list[tuple[str, str]]:
    rules = {"scoring": score.scoring, "extraction": score.extraction}
    rules |= {key: value for key, value in score.protocol.items() if key not in _SAME_TEST and value is not None}
    return [(key, value[:12] if key.endswith("sha256") else json.dumps(value)) for key, value in rules.items()]


def _name(wanted: Sequence[Any], facts: Mapping[str, str]) -> str:
    return _digest([wanted, {key: value for key, value in facts.items() if key != "base model"}])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def differences(tests: Sequence[Asked]) -> list[str]:
    """What differs between tests, a few words each, in the order of the first test's facts."""
    keys = dict.fromkeys(key for test in tests for key in test.facts)
    found = []
    for key in keys:
        known = [test for test in tests if key in test.facts or f"{key.split()[0]} test sha256" in test.facts]
        values = list(dict.fromkeys(test.facts.get(key, "not recorded") for test in known))
        if len(values) > 1:
            found.append(f"{key.replace(' ids', ': other questions')} ({' / '.join(values)})")
    return found


# ------------------------------------------------------------------------------------------------- question by question

Test = Literal["exact McNemar", "paired sign-flip", "two-level t"]

# (example id, how often that id came before): equal prompts share an id
Question = tuple[str, int]


class TaskAnswers(NamedTuple):
    """Whether each question that every seed was asked was answered right: 0 or 1, of shape (seeds, questions)."""

    questions: tuple[Question, ...]
    correct: NDArray[np.float64]

    def at(self, questions: Sequence[Question]) -> NDArray[np.float64]:
        """The columns of these questions, of shape (seeds, questions)."""
        if tuple(questions) == self.questions:
            return self.correct
        place = {question: column for column, question in enumerate(self.questions)}
        return self.correct[:, [place[question] for question in questions]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the finished seeds of a group answered, by task. ``trained`` is False for the untrained base model."""

    tasks: Mapping[str, TaskAnswers]
    trained: bool

    def mean(self, task: str) -> dict[Question, float]:
        """For each question of a task the share of seeds that answered it right."""
        found = self.tasks.get(task)
        return {} if found is None else dict(zip(found.questions, found.correct.mean(axis=0).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """First minus second: the mean over tasks of the share of questions (-1 to 1), its 95 % limits, p-value and test.

    ``p_adjusted`` is the p-value adjusted (Benjamini-Hochberg) over the comparisons of a table.
    """

    value: float
    low: float
    high: float
    p_value: float
    test: Test
    p_adjusted: float | None = None

    @property
    def covers_training(self) -> bool:
        """Whether limits and p-value cover other training runs (seeds), too; else these runs alone."""
        return self.test == "two-level t"

    @property
    def limits(self) -> tuple[float, float]:
        """The 95 % limits."""
        return self.low, self.high


def fact(comparison: Comparison | None, name: str) -> Any:
    """An attribute of a comparison; None if there is none."""
    return None if comparison is None else getattr(comparison, name)


def collect_answers(group: Sequence[RunRecord]) -> Answers:
    """The answers of the finished seeds of a group, in the first seed's order of questions."""
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


def compare_answers(first: Answers, second: Answers) -> Comparison | None:
    """Compare over the questions that both were asked; None if they share none."""
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
        return Comparison(value=value, low=low, high=high, p_value=p_value, test="two-level t")
    differences = [(own.mean(axis=0) - other.mean(axis=0)).tolist() for own, other in pairs]
    test: Test = "exact McNemar" if len(pairs) == 1 and max(seeds) == 1 else "paired sign-flip"
    if test == "exact McNemar":
        p_value = mcnemar(*((answers[0] == 1).tolist() for answers in pairs[0]))
    else:
        p_value = sign_flip(differences)
    low, high = holding_zero(paired_bootstrap(differences), p_value)
    return Comparison(value=value, low=low, high=high, p_value=p_value, test=test)


def _share(correct: NDArray[np.float64]) -> Fraction:
    return Fraction(int(correct.sum()), correct.size)


def _several_trainings(answers: Answers, seeds: int) -> bool:
    return seeds > 1 or not answers.trained


def adjust(found: Mapping[int, Comparison]) -> dict[int, Comparison]:
    """The comparisons with their p-values adjusted over all of them."""
    adjusted = benjamini_hochberg([comparison.p_value for comparison in found.values()])
    return {key: replace(found[key], p_adjusted=value) for key, value in zip(found, adjusted, strict=True)}
