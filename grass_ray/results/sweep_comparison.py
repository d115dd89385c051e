"""Two sweeps side by side: the same configuration in both, question by question.

::

    comparison = compare_sweeps(records, "quickstart", "20261122-115319-5b93")
    print(render_comparison(comparison, "markdown"))

A side is a sweep id or an experiment's name. Rows are matched by their whole configuration, then by method if each side
has one such row left; only rows that were tested on the same questions are matched
(:mod:`grass_ray.results.compare`). Differences are B minus A.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from grass_ray.config import ConfigError
from grass_ray.results.compare import Asked, comparable_groups, differences, same_test_key
from grass_ray.results.formats import limits, nats, nats_more, p_text, percent, points, scope, times
from grass_ray.results.leaderboard import seed_groups
from grass_ray.results.notes import scope_notes
from grass_ray.results.paired import Answers, Comparison, adjust, collect_answers, compare_answers, fact
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow, build_rows
from grass_ray.results.settings import settings

_SHOWN_SETTINGS = 4
# what the JSON of a row says of its comparison, and under which name
_FACTS = {"difference": "value"} | {
    name: name for name in ("low", "high", "p_value", "p_adjusted", "test", "covers_training")
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One question that the two sides answered differently: accuracies over each side's seeds, 0 to 1."""

    task: str
    example_id: str
    first: float
    second: float


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One configuration in both sweeps. Differences are second minus first, accuracies shares from 0 to 1, losses nats.

    ``only_first`` and ``only_second`` count questions that one side answered right more often. ``settings`` lists what
    differs where the configurations are not equal. Memory and speed are None where the hardware differs.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with those of the comparisons at their places."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in ("comparison", "by_loss"):
                before = "loss_" if name == "by_loss" else ""
                found |= {f"{before}{key}": fact(getattr(self, name), part) for key, part in _FACTS.items()}
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
    adjusted = adjust({index: row.comparison for index, row in enumerate(rows) if row.comparison is not None})
    by_loss = adjust({index: row.by_loss for index, row in enumerate(rows) if row.by_loss is not None})
    rows = [replace(row, comparison=adjusted.get(index), by_loss=by_loss.get(index)) for index, row in enumerate(rows)]
    rows.sort(key=_gain)
    return SweepComparison(
        first=first,
        second=second,
        rows=rows,
        only_in_first=ours.labels_without({own for own, _ in pairs}),
        only_in_second=theirs.labels_without({other for _, other in pairs}),
        tested_otherwise=_tested_otherwise(ours, theirs, pairs),
    )


def _gain(row: ComparisonRow) -> tuple[bool, float, str]:
    """What gained most first, by accuracy or else by loss; what cannot be compared last."""
    gain = row.by_loss.value if row.by_loss is not None else 0.0
    if row.comparison is not None:
        gain = -row.comparison.value
    return row.comparison is None and row.by_loss is None, gain, row.label


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
            words = differences(tests)[:_SHOWN_SETTINGS] or ["other tasks, limits or rules were asked for"]
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
    changes, questions = _changes(*answers)
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
        questions=questions or _changes(*losses)[1],
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


# ------------------------------------------------------------------------------------------------------------ as text


_COLUMNS: tuple[tuple[str, Callable[[ComparisonRow], str]], ...] = (
    ("method", lambda row: row.label),
    ("A %", lambda row: percent(row.first)),
    ("B %", lambda row: percent(row.second)),
    ("B - A", lambda row: points(fact(row.comparison, "value"))),
    ("95 %", lambda row: limits(fact(row.comparison, "low"), fact(row.comparison, "high"), points)),
    ("p", lambda row: p_text(fact(row.comparison, "p_adjusted"))),
    ("loss A", lambda row: nats(row.first_loss)),
    ("loss B", lambda row: nats(row.second_loss)),
    ("loss B - A", lambda row: nats_more(fact(row.by_loss, "value"))),
    ("loss 95 %", lambda row: limits(fact(row.by_loss, "low"), fact(row.by_loss, "high"), nats_more)),
    ("p loss", lambda row: p_text(fact(row.by_loss, "p_adjusted"))),
    ("p for", lambda row: scope(fact(row.comparison or row.by_loss, "covers_training"))),
    ("only A", lambda row: str(row.only_first)),
    ("only B", lambda row: str(row.only_second)),
    ("asked", lambda row: str(row.questions)),
    ("memory", lambda row: times(row.memory_ratio)),
    ("speed", lambda row: times(row.speed_ratio)),
)


def comparison_header(comparison: SweepComparison) -> list[str]:
    """The names of the table's columns; those of losses only if both sides have some."""
    losses = any(row.by_loss is not None for row in comparison.rows)
    return [name for name, _ in _COLUMNS if losses or "loss" not in name]


def comparison_cells(comparison: SweepComparison) -> list[list[str]]:
    """The table's cells as text, one list per row, in the order of :func:`comparison_header`."""
    shown = comparison_header(comparison)
    several = len({(row.model, row.suite) for row in comparison.rows}) > 1
    return [
        [
            f"{cell(row)}, {row.model} on {row.suite}" if several and name == "method" else cell(row)
            for name, cell in _COLUMNS
            if name in shown
        ]
        for row in comparison.rows
    ]


def comparison_notes(comparison: SweepComparison) -> list[str]:
    """What a reader must know, one sentence each."""
    notes = [f"A: {comparison.first}; B: {comparison.second}; only A, only B: questions that side alone got right"]
    compared = [row.comparison for row in comparison.rows if row.comparison is not None]
    losses = [row.by_loss for row in comparison.rows if row.by_loss is not None]
    for name, found in (("p", compared), ("p loss", losses)):
        if tests := sorted({one.test for one in found}):
            notes.append(f"{name}: {' or '.join(tests)} on the same questions, Benjamini-Hochberg over this table")
    notes += scope_notes(one.covers_training for one in compared + losses)
    for row in comparison.rows:
        if row.settings:
            more = len(row.settings) - _SHOWN_SETTINGS
            shown = ", ".join(row.settings[:_SHOWN_SETTINGS]) + (f" and {more} more" if more > 0 else "")
            notes.append(f"{row.label} is not configured alike: {shown}")
        if (row.first_status, row.second_status) != ("finished", "finished"):
            notes.append(f"{row.label}: A {row.first_status}, B {row.second_status}".replace("_", " "))
    for name, labels in (("A", comparison.only_in_first), ("B", comparison.only_in_second)):
        if labels:
            notes.append(f"only in {name}: {', '.join(labels)}")
    return notes + comparison.tested_otherwise


def comparison_csv(comparison: SweepComparison) -> str:
    """One line per question that the two sides answered differently."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "model", "suite", "task", "example_id", "first", "second"])
    for row in comparison.rows:
        writer.writerows(
            [row.label, row.model, row.suite, change.task, change.example_id, change.first, change.second]
            for change in row.changes
        )
    return out.getvalue().rstrip("\n")
