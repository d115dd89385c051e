"""Two sweeps side by side: the same configuration in both, question by question.

::

    comparison = compare_sweeps(records, "quickstart", "20261122-115319-5b93")
    print(render_comparison(comparison, "markdown"))

A side is a sweep id or an experiment's name. Rows are matched by their whole configuration, then by method if each side
has one such row left; only rows that were tested on the same questions are matched
(:mod:`grass_ray.results.compare`). Differences are B minus A. :mod:`grass_ray.results.comparison_text` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from grass_ray.config import ConfigError
from grass_ray.results.compare import Asked, comparable_groups, differences, same_test_key
from grass_ray.results.leaderboard import seed_groups
from grass_ray.results.paired import Answers, Comparison, adjust, collect_answers, compare_answers, fact
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow, build_rows
from grass_ray.results.settings import settings

SHOWN_SETTINGS = 4
# what the JSON of a row says of its comparison, and under which name
_FACTS = {"difference": "value"} | {
    name: name for name in ("low", "high", "p_value", "p_adjusted", "test", "covers_training")
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One question that the two sides answered differently: means over each side's seeds, 0 to 1.

    Questions of lm-eval's own tasks have ``lm_eval/`` before the task's name.
    """

    task: str
    example_id: str
    first: float
    second: float


@dataclass(frozen=True, kw_only=True)
class BenchmarkPair:
    """One of lm-eval's own tasks on both sides, or the average over those whose metric is a share.

    Attributes:
        metric: the task's first metric; ``"average"`` of several tasks.
        first, second: means over seeds.
        is_share: whether each example has a value from 0 to 1.
        comparison: example by example; None if there is no value of single examples.
    """

    metric: str
    first: float
    second: float
    is_share: bool
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {"metric": self.metric, "first": self.first, "second": self.second}
        facts = {key: fact(self.comparison, name) for key, name in _FACTS.items()}
        return own | facts | {"difference": self.second - self.first}


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One configuration in both sweeps. Differences are second minus first, accuracies shares from 0 to 1, losses nats.

    ``only_first`` and ``only_second`` count questions that one side answered right more often. ``settings`` lists what
    differs where the configurations are not equal. Memory and speed are None where the hardware differs.
    ``lm_eval_tasks`` are those of lm-eval's own tasks that both sides have, and ``lm_eval`` is their average.
    """

    label: str
    model: str
    suite: str
    first: float | None
    second: float | None
    comparison: Comparison | None
    questions: int
    only_first: int
    only_second: int
    memory_ratio: float | None
    speed_ratio: float | None
    first_status: str
    second_status: str
    settings: list[str]
    changes: list[Change]
    first_loss: float | None
    second_loss: float | None
    by_loss: Comparison | None
    lm_eval: BenchmarkPair | None
    lm_eval_tasks: dict[str, BenchmarkPair] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with those of the comparisons at their places."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in ("comparison", "by_loss"):
                before = "loss_" if name == "by_loss" else ""
                found |= {f"{before}{key}": fact(getattr(self, name), part) for key, part in _FACTS.items()}
            elif name == "lm_eval":
                found[name] = None if self.lm_eval is None else self.lm_eval.to_dict()
            elif name == "lm_eval_tasks":
                found[name] = {task: own.to_dict() for task, own in self.lm_eval_tasks.items()}
            else:
                found[name] = value
        return found


@dataclass(frozen=True, kw_only=True)
class SweepComparison:
    """All matched rows, the labels of rows that only one side has, and why some of these cannot be compared."""

    first: str
    second: str
    rows: list[ComparisonRow]
    only_in_first: list[str]
    only_in_second: list[str]
    tested_otherwise: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.to_dict() for row in self.rows]
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"rows": rows}


def compare_sweeps(records: Sequence[RunRecord], first: str, second: str) -> SweepComparison:
    """Match the rows of two sweeps and compare them.

    Raises:
        ConfigError: a side that no record belongs to, or twice the same.
    """
    if first == second:
        raise ConfigError(f"--compare {first} {second}: name two different sweeps")
    chosen = [_choose(records, name) for name in (first, second)]
    tests: dict[int, Asked] = {}
    for test, group in comparable_groups([record for side in chosen for record in side], same_test_key):
        tests |= {id(record): test for record in group}
    ours, theirs = (_Side(side, tests) for side in chosen)
    pairs = _match(ours, theirs)
    rows = [_compare(ours, own, theirs, other) for own, other in pairs]
    rows = sorted(_adjusted(rows), key=_gain)
    return SweepComparison(
        first=first,
        second=second,
        rows=rows,
        only_in_first=ours.labels_without({own for own, _ in pairs}),
        only_in_second=theirs.labels_without({other for _, other in pairs}),
        tested_otherwise=_tested_otherwise(ours, theirs, pairs),
    )


def _adjusted(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows with p-values adjusted: of each metric over the rows, of single tasks of lm-eval over rows and tasks."""
    accuracy = adjust({at: row.comparison for at, row in enumerate(rows) if row.comparison is not None})
    loss = adjust({at: row.by_loss for at, row in enumerate(rows) if row.by_loss is not None})
    average = adjust(
        {at: row.lm_eval.comparison for at, row in enumerate(rows) if row.lm_eval and row.lm_eval.comparison}
    )
    tasks = adjust(
        {
            (at, task): own.comparison
            for at, row in enumerate(rows)
            for task, own in row.lm_eval_tasks.items()
            if own.comparison is not None
        }
    )
    return [
        replace(
            row,
            comparison=accuracy.get(at),
            by_loss=loss.get(at),
            lm_eval=None if row.lm_eval is None else replace(row.lm_eval, comparison=average.get(at)),
            lm_eval_tasks={
                task: replace(own, comparison=tasks.get((at, task))) for task, own in row.lm_eval_tasks.items()
            },
        )
        for at, row in enumerate(rows)
    ]


def _gain(row: ComparisonRow) -> tuple[bool, float, str]:
    """What gained most first, by accuracy or else by loss or lm-eval's tasks; what cannot be compared last."""
    gains = [
        *([] if row.comparison is None else [row.comparison.value]),
        *([] if row.by_loss is None else [-row.by_loss.value]),
        *([] if row.lm_eval is None else [row.lm_eval.second - row.lm_eval.first]),
    ]
    return not gains, -gains[0] if gains else 0.0, row.label


def _choose(records: Sequence[RunRecord], name: str) -> list[RunRecord]:
    chosen = [record for record in records if name in (record.sweep_id, record.sweep)]
    if not chosen:
        known = sorted({record.sweep for record in records} | {record.sweep_id for record in records})
        raise ConfigError(f"no run belongs to the sweep or experiment {name!r}; available: {', '.join(known) or '-'}")
    return chosen


class _Side:
    """One sweep's rows with the runs behind them."""

    def __init__(self, records: Sequence[RunRecord], tests: Mapping[int, Asked]) -> None:
        alike: dict[int, list[RunRecord]] = {}
        for record in records:
            alike.setdefault(id(tests[id(record)]), []).append(record)
        self.groups = [group for own in alike.values() for group in seed_groups(own)]
        self.tests = [tests[id(group[0])] for group in self.groups]
        self.rows: list[LeaderboardRow] = build_rows(self.groups)

    def key(self, index: int, *, whole: bool) -> str:
        """What matched rows share: the test, and the whole configuration or the method."""
        own = sorted(settings(self.groups[index][0]).items()) if whole else []
        return json.dumps([id(self.tests[index]), self.rows[index].method, own])

    def labels_without(self, matched: set[int]) -> list[str]:
        return [row.label for index, row in enumerate(self.rows) if index not in matched]


def _match(first: _Side, second: _Side) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for whole in (True, False):
        left, right = (
            _by_key(side, {pair[place] for pair in pairs}, whole) for place, side in ((0, first), (1, second))
        )
        pairs += [
            (left[key][0], right[key][0])
            for key in left.keys() & right.keys()
            if len(left[key]) == len(right[key]) == 1
        ]
    return sorted(pairs)


def _tested_otherwise(first: _Side, second: _Side, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Methods that both sides have and that were not matched because their tests differ, and what differs."""
    lone = [
        {side.rows[index].method: side.tests[index] for index in range(len(side.groups)) if index not in matched}
        for side, matched in ((first, {own for own, _ in pairs}), (second, {other for _, other in pairs}))
    ]
    found = []
    for method in lone[0].keys() & lone[1].keys():
        tests = [side[method] for side in lone]
        if tests[0] is not tests[1]:
            words = differences(tests)[:SHOWN_SETTINGS] or ["other tasks, limits or rules were asked for"]
            found.append(f"{method} was not tested alike in A and B: {', '.join(words)}")
    return sorted(found)


def _by_key(side: _Side, taken: set[int], whole: bool) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index in range(len(side.groups)):
        if index not in taken:
            found.setdefault(side.key(index, whole=whole), []).append(index)
    return found


def _compare(first: _Side, own: int, second: _Side, other: int) -> ComparisonRow:
    left, right = first.rows[own], second.rows[other]
    answers = collect_answers(first.groups[own]), collect_answers(second.groups[other])
    losses = collect_answers(first.groups[own], "loss"), collect_answers(second.groups[other], "loss")
    benchmarks = collect_answers(first.groups[own], "lm_eval"), collect_answers(second.groups[other], "lm_eval")
    changes, questions = _changes(*answers)
    asked = _changes(*benchmarks)
    changes += [replace(change, task=f"lm_eval/{change.task}") for change in asked[0]]
    tasks = _benchmarks(left, right, *benchmarks)
    same_machine = left.hardware == right.hardware
    before, after = settings(first.groups[own][0]), settings(second.groups[other][0])
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return ComparisonRow(
        label=left.label if not differing else left.method,
        model=left.model,
        suite=left.suite,
        first=left.accuracy,
        second=right.accuracy,
        comparison=compare_answers(answers[1], answers[0]),
        questions=(questions or _changes(*losses)[1]) + asked[1],
        only_first=sum(change.first > change.second for change in changes),
        only_second=sum(change.first < change.second for change in changes),
        memory_ratio=_ratio(right.peak_allocated_gib, left.peak_allocated_gib) if same_machine else None,
        speed_ratio=_ratio(right.tokens_per_second, left.tokens_per_second) if same_machine else None,
        first_status=left.status,
        second_status=right.status,
        settings=[f"{key}: {before.get(key, '-')} -> {after.get(key, '-')}" for key in differing],
        changes=changes,
        first_loss=left.loss,
        second_loss=right.loss,
        by_loss=compare_answers(losses[1], losses[0]),
        lm_eval=_average(tasks, *benchmarks),
        lm_eval_tasks=tasks,
    )


def _benchmarks(
    left: LeaderboardRow, right: LeaderboardRow, first: Answers, second: Answers
) -> dict[str, BenchmarkPair]:
    """The tasks of lm-eval that both sides have."""
    found = {}
    for task, own in left.lm_eval_tasks.items():
        if (other := right.lm_eval_tasks.get(task)) is not None:
            found[task] = BenchmarkPair(
                metric=own.metric,
                first=own.value,
                second=other.value,
                is_share=own.is_share and other.is_share,
                comparison=compare_answers(second.only([task]), first.only([task])),
            )
    return found


def _average(tasks: Mapping[str, BenchmarkPair], first: Answers, second: Answers) -> BenchmarkPair | None:
    """The average over the tasks that both sides have and whose metric is a share; None if there are none."""
    shares = {task: own for task, own in tasks.items() if own.is_share}
    if not shares:
        return None
    return BenchmarkPair(
        metric="average",
        first=fmean(own.first for own in shares.values()),
        second=fmean(own.second for own in shares.values()),
        is_share=True,
        comparison=compare_answers(second.only(shares), first.only(shares)),
    )


def _changes(first: Answers, second: Answers) -> tuple[list[Change], int]:
    """The questions that were answered differently, and the number of questions that both were asked."""
    changes, questions = [], 0
    for task in first.tasks:
        theirs = second.mean(task)
        for key, value in first.mean(task).items():
            rival = theirs.get(key)
            questions += rival is not None
            if rival is not None and rival != value:
                changes.append(Change(task=task, example_id=key[0], first=value, second=rival))
    return changes, questions


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None
