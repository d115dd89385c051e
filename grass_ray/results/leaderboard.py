"""The leaderboard: records in, ranked tables out. Pure; nothing here asks MLflow or a model.

::

    tables = build_leaderboard(load_records(uri, "commonsense"))
    print(render(tables, "markdown"))                     # grass_ray.results.rendering

One table for each model, suite, hardware and worker count - and for each set of tasks and way of evaluating, since
other numbers cannot be ranked together. One row for each method as configured, over its seeds. Only rows whose every
seed finished are ranked; failed, stopped and partly failed ones stay below with their reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import fmean
from typing import Any

from grass_ray.paths import model_label
from grass_ray.results.budget import budget_line
from grass_ray.results.pairing import Difference, compare_answers, mean_answers
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow as LeaderboardRow
from grass_ray.results.rows import build_rows, settings_key
from grass_ray.results.statistics import benjamini_hochberg
from grass_ray.tasks.suites import TASKS

# What decides whether two accuracies may be ranked together; rows that differ here go to different tables.
_EVALUATION = ("limit", "scoring", "extraction", "num_beams")


@dataclass(frozen=True, kw_only=True)
class LeaderboardTable:
    """Rows that may be compared, best first; ``notes`` say what a reader must know, ``budget`` who had which."""

    model: str
    suite: str
    hardware: str
    world_size: int
    tasks: tuple[str, ...]
    evaluation: Mapping[str, Any]
    rows: tuple[LeaderboardRow, ...]
    notes: tuple[str, ...]
    budget: str | None = None

    @property
    def title(self) -> str:
        """Model, suite, hardware and how it was evaluated."""
        # a CPU is named with all of its cores, which several workers may share; a GPU is one of theirs
        machine = self.hardware if self.world_size == 1 else f"{self.hardware}, {self.world_size} workers"
        parts = [str(self.evaluation["scoring"]), f"{self.evaluation['extraction']} extraction"]
        if self.evaluation["num_beams"] not in (None, 1):
            parts.append(f"{self.evaluation['num_beams']} beams")
        if self.evaluation["limit"] is not None:
            parts.append(f"a sample of {self.evaluation['limit']} examples a task")
        return f"{self.model} on {self.suite}, {machine} ({', '.join(parts)})"

    @property
    def best_of_each_method(self) -> tuple[LeaderboardRow, ...]:
        """The highest row of each method, in the table's order."""
        first: dict[str, LeaderboardRow] = {}
        for row in self.rows:
            first.setdefault(row.method, row)
        return tuple(first.values())


def build_leaderboard(records: Iterable[RunRecord]) -> list[LeaderboardTable]:
    """Group, aggregate, compare and rank. Of two runs of one configuration and seed the later one counts."""
    tables: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        tables[json.dumps(table_key(record))].append(record)
    models = {record.config["model"]["name"] for records in tables.values() for record in records}
    labels = Counter(map(model_label, models))
    return [_with_short_name(_table(tables[key]), labels) for key in sorted(tables)]


def _with_short_name(table: LeaderboardTable, labels: Mapping[str, int]) -> LeaderboardTable:
    """The model's folder by its last component, unless another folder has the same."""
    label = model_label(table.model)
    return replace(table, model=label) if labels[label] == 1 else table


def table_key(record: RunRecord) -> list[Any]:
    """What two runs must share to be ranked together, as plain values."""
    config = record.config
    protocol = [config["evaluation"].get(key) for key in _EVALUATION]
    tasks = sorted(config["data"]["tasks"])
    return [config["model"]["name"], config["data"]["suite"], record.hardware, record.world_size, tasks, protocol]


def seed_groups(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Records of one configuration together, by seed; of two with one seed the later one."""
    groups: defaultdict[str, dict[int, RunRecord]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: datetime.fromisoformat(record.finished_at)):
        groups[settings_key(record)][record.config["seed"]] = record
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def _table(records: Sequence[RunRecord]) -> LeaderboardTable:
    model, suite, hardware, world_size, _, protocol = table_key(records[0])
    groups = seed_groups(records)
    rows = build_rows(groups)
    evaluated = {task for row in rows if row.status == "finished" for task in row.tasks}
    rows = _clean([_incomplete(row, evaluated) for row in rows])
    rows, tests = _compare(rows, groups)
    return LeaderboardTable(
        model=model,
        suite=suite,
        hardware=hardware,
        world_size=world_size,
        tasks=tuple(records[0].config["data"]["tasks"]),
        evaluation=dict(zip(_EVALUATION, protocol, strict=True)),
        rows=tuple(_ranked(_pareto(rows))),
        notes=tuple(_notes(rows, tests)),
        budget=budget_line(rows, records),
    )


def _clean(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Clean averages over the same tasks in every row: those that are contaminated in none."""
    contaminated = {task for row in rows for task in row.contaminated}
    if not contaminated:
        return list(rows)
    scores = [[value for task, value in row.tasks.items() if task not in contaminated] for row in rows]
    return [
        replace(row, accuracy_clean=fmean(clean) if clean else None) for row, clean in zip(rows, scores, strict=True)
    ]


def _incomplete(row: LeaderboardRow, evaluated: set[str]) -> LeaderboardRow:
    """An average over fewer tasks than the other rows' is no rival of theirs."""
    missing = sorted(evaluated - row.tasks.keys())
    if row.status != "finished" or not missing or not row.tasks:
        return row
    return replace(row, status="partial", failure=f"not evaluated on {', '.join(missing)}")


# ------------------------------------------------------------------------------------------- comparing and ranking


def _compare(
    rows: Sequence[LeaderboardRow], groups: Sequence[Sequence[RunRecord]]
) -> tuple[list[LeaderboardRow], set[str]]:
    """Differences to the best ``full`` row and to the best row, per question; and the names of the tests used."""
    ranked = [index for index, row in enumerate(rows) if row.is_ranked]
    if len(ranked) < 2:
        return list(rows), set()

    def place(index: int) -> tuple[float, str]:
        return -(rows[index].accuracy or 0.0), rows[index].label

    best = min(ranked, key=place)
    full = min((index for index in ranked if rows[index].method == "full"), key=place, default=None)
    to_full, to_best = _differences(ranked, groups, full, best)
    tests = {str(found.test) for found in (*to_full.values(), *to_best.values()) if found is not None}
    adjusted, adjusted_to_best = _adjust(to_full), _adjust(to_best)
    compared = []
    for index, row in enumerate(rows):
        if index in to_full:
            row = replace(row, **_fields(rows, index, full, to_full, "full"), p_adjusted=adjusted.get(index))
        if index in to_best:
            row = replace(
                row, **_fields(rows, index, best, to_best, "best"), p_adjusted_to_best=adjusted_to_best.get(index)
            )
        compared.append(row)
    return compared, tests


def _differences(
    ranked: Sequence[int], groups: Sequence[Sequence[RunRecord]], *references: int | None
) -> list[dict[int, Difference | None]]:
    """For each reference row the differences of all other ranked rows to it; answers of one row at a time."""
    theirs = {index: mean_answers(groups[index]) for index in references if index is not None}
    found: dict[int, dict[int, Difference | None]] = {reference: {} for reference in theirs}
    for index in ranked:
        own = theirs.get(index) or mean_answers(groups[index])
        for reference in found:
            if index != reference:
                found[reference][index] = compare_answers(own, theirs[reference])
    return [{} if reference is None else found[reference] for reference in references]


def _adjust(differences: Mapping[int, Difference | None]) -> dict[int, float]:
    found = {index: difference.p_value for index, difference in differences.items() if difference is not None}
    return dict(zip(found, benjamini_hochberg(list(found.values())), strict=True))


def _fields(
    rows: Sequence[LeaderboardRow],
    index: int,
    reference: int | None,
    differences: Mapping[int, Difference | None],
    name: str,
) -> dict[str, Any]:
    """What a row says about one difference; where no question is common, only how far the accuracies are apart."""
    found = differences[index]
    key = f"difference_to_{name}"
    if found is None:
        assert reference is not None
        return {key: (rows[index].accuracy or 0.0) - (rows[reference].accuracy or 0.0)}
    p_value = "p_value" if name == "full" else "p_value_to_best"
    return {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high, p_value: found.p_value}


def _pareto(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Mark ranked rows that no other beats in accuracy without more peak memory, or in memory without less accuracy."""
    points = {
        index: (-row.accuracy, row.peak_allocated_gib)
        for index, row in enumerate(rows)
        if row.is_ranked and row.accuracy is not None and row.peak_allocated_gib is not None
    }
    front: set[int] = set()
    best_before, previous = math.inf, (math.inf, math.inf)
    # from the least memory on, the more accurate first: a point is on the front when it beats all before it
    for index, (loss, gib) in sorted(points.items(), key=lambda item: (item[1][1], item[1][0])):
        if loss < best_before or (loss, gib) == previous:
            front.add(index)
            best_before, previous = loss, (loss, gib)
    return [replace(row, pareto=index in front) for index, row in enumerate(rows)]


def _ranked(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Best first, equal accuracies sharing a rank, then what is not ranked: partly finished before failed."""
    ranked = sorted((row for row in rows if row.is_ranked), key=lambda row: (-(row.accuracy or 0.0), row.label))
    ranks: dict[float | None, int] = {}
    for place, row in enumerate(ranked, start=1):
        ranks.setdefault(row.accuracy, place)
    below = sorted((row for row in rows if not row.is_ranked), key=lambda row: (-len(row.seeds), row.label))
    return [replace(row, rank=ranks[row.accuracy]) for row in ranked] + below


def _notes(rows: Sequence[LeaderboardRow], tests: set[str]) -> list[str]:
    notes = []
    if tests:
        named = {
            "exact McNemar": "exact McNemar",
            "paired sign-flip": "paired sign-flip test of the average over tasks and seeds (McNemar's, generalised)",
        }
        against = (
            "against full and against the best row"
            if any(row.p_value is not None for row in rows)
            else ("against the best row")
        )
        notes.append(
            f"p: {' or '.join(named[test] for test in sorted(tests))} {against}, on the same questions, "
            "Benjamini-Hochberg over this table"
        )
        notes.append("the best row is chosen on these same questions, which flatters it: vs best leans its way")
    notes += _contamination(rows)
    if sum(row.is_ranked for row in rows) > 1 and all(len(row.seeds) <= 1 for row in rows):
        notes.append("one seed a row: differences between trainings are not covered by the intervals")
    return notes


def _contamination(rows: Sequence[LeaderboardRow]) -> list[str]:
    """What must be said of rows that trained on test questions: which tasks, and the average without them."""
    found: defaultdict[tuple[str, ...], list[LeaderboardRow]] = defaultdict(list)
    for row in rows:
        if row.contaminated:
            found[tuple(row.contaminated)].append(row)
    trained = [row for row in rows if row.trained and row.tasks]
    notes = []
    for tasks, those in found.items():
        titles = ", ".join(TASKS[task].title for task in tasks)
        who = "" if len(those) == len(trained) else f" of {', '.join(row.label for row in those)}"
        clean = [f"{row.label} {100 * row.accuracy_clean:.1f}" for row in those if row.accuracy_clean is not None]
        without = f"; average without them: {', '.join(clean)}" if clean else ""
        notes.append(f"the training data{who} contains test questions of {titles}{without}")
    return notes
