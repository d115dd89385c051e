"""The leaderboard: records in, ranked tables out. Pure; nothing here asks MLflow or a model.

::

    tables = build_leaderboard(load_records(uri, "commonsense"))
    print(render(tables, "markdown"))                     # grass_ray.results.rendering

One table for each model, suite, hardware and worker count - and for each test, since answers to other questions, or
read by other rules, cannot be ranked together (:mod:`grass_ray.results.comparable`). One row for each method as
configured, over its seeds. Only rows whose every seed finished are ranked; failed, stopped and partly failed ones stay
below with their reason.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from grass_ray.paths import model_label
from grass_ray.results.budget import budget_line
from grass_ray.results.comparable import EVALUATION, Asked, comparable_groups, differences
from grass_ray.results.lost_rows import lost_rows
from grass_ray.results.pairing import Difference, collect_answers, compare_answers, scope_notes
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow as LeaderboardRow
from grass_ray.results.rows import build_rows, settings_key, training_rows
from grass_ray.results.statistics import benjamini_hochberg, mean_of_shares
from grass_ray.tasks.suites import TASKS

_MOST_DIFFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class LeaderboardTable:
    """Rows that may be compared, best first; ``notes`` say what a reader must know, ``budget`` who had which.

    ``test`` is what all of them were tested on; ``apart`` tells the table from another one of the same title.
    ``warnings`` are those of the notes that must not be missed: what cannot be compared, what was lost.
    """

    model: str
    suite: str
    hardware: str
    world_size: int
    tasks: tuple[str, ...]
    evaluation: Mapping[str, Any]
    rows: tuple[LeaderboardRow, ...]
    test: Asked
    notes: tuple[str, ...]
    budget: str | None = None
    apart: str = ""
    warnings: tuple[str, ...] = ()

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
        if self.evaluation["template"] not in (None, "clean"):
            parts.append(f"{self.evaluation['template']} template")
        if self.apart:
            parts.append(self.apart)
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
    groups = comparable_groups(records)
    labels = Counter(map(model_label, {record.config["model"]["name"] for _, own in groups for record in own}))
    return _told_apart([_with_short_name(_table(test, own), labels) for test, own in groups])


def _with_short_name(table: LeaderboardTable, labels: Mapping[str, int]) -> LeaderboardTable:
    """The model's folder by its last component, unless another folder has the same."""
    label = model_label(table.model)
    return replace(table, model=label) if labels[label] == 1 else table


def _told_apart(tables: Sequence[LeaderboardTable]) -> list[LeaderboardTable]:
    """Tables of one title get a part of their own, and a note of what keeps them apart."""
    alike: defaultdict[str, list[LeaderboardTable]] = defaultdict(list)
    for table in tables:
        alike[table.title].append(table)
    found = []
    for table in tables:
        others = alike[table.title]
        if len(others) == 1:
            found.append(table)
            continue
        words = differences([other.test for other in others]) or ["the settings of their source differ"]
        more = f" and {len(words) - _MOST_DIFFERENCES} more" if len(words) > _MOST_DIFFERENCES else ""
        note = (
            f"not to be compared with the other {'table' if len(others) == 2 else 'tables'} of this model and suite, "
            f"whose rows were not tested alike: {', '.join(words[:_MOST_DIFFERENCES])}{more}"
        )
        warnings, notes = (note, *table.warnings), (note, *table.notes)
        found.append(replace(table, apart=_apart(table, others), notes=notes, warnings=warnings))
    return found


def _apart(table: LeaderboardTable, others: Sequence[LeaderboardTable]) -> str:
    name = f"test {table.test.name}"
    if sum(other.test.name == table.test.name for other in others) > 1:
        name += f", base model {table.test.facts.get('base model', 'unknown')}"
    return name


def seed_groups(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Records of one configuration and one set of training rows together, by seed; of two with one seed the later one.

    A run that does not know its training rows stands with the most runs of its configuration.
    """
    configured: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: datetime.fromisoformat(record.finished_at)):
        configured[settings_key(record)].append(record)
    groups = []
    for own in configured.values():
        known = Counter(rows for record in own if (rows := training_rows(record)) is not None)
        most = max(known, key=known.__getitem__, default=None)
        by_rows: defaultdict[str | None, dict[int, RunRecord]] = defaultdict(dict)
        for record in own:
            by_rows[training_rows(record) or most][record.config["seed"]] = record
        groups += [[group[seed] for seed in sorted(group)] for group in by_rows.values()]
    return groups


def _table(test: Asked, records: Sequence[RunRecord]) -> LeaderboardTable:
    config = records[0].config
    groups = seed_groups(records)
    rows = [replace(row, test=test.name) for row in build_rows(groups)]
    evaluated = {task for row in rows if row.status == "finished" for task in row.tasks}
    rows = _clean([_incomplete(row, evaluated) for row in rows])
    rows, tests = _compare(rows, groups)
    lost = lost_rows(list(zip([row.label for row in rows], groups, strict=True)))
    return LeaderboardTable(
        model=config["model"]["name"],
        suite=config["data"]["suite"],
        hardware=records[0].hardware,
        world_size=records[0].world_size,
        tasks=tuple(config["data"]["tasks"]),
        evaluation={key: config["evaluation"].get(key) for key in EVALUATION}
        | {"template": config["data"].get("template")},
        rows=tuple(_ranked(_pareto(rows))),
        notes=(*lost, *_notes(rows, tests)),
        warnings=tuple(lost),
        budget=budget_line(rows, records),
        test=test,
    )


def _clean(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Clean averages over the same tasks in every row: those that are contaminated in none."""
    contaminated = {task for row in rows for task in row.contaminated}
    if not contaminated:
        return list(rows)
    scores = [[value for task, value in row.tasks.items() if task not in contaminated] for row in rows]
    return [
        replace(row, accuracy_clean=mean_of_shares(clean) if clean else None)
        for row, clean in zip(rows, scores, strict=True)
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
    tests = {str(found.test) for found in (*to_full.values(), *to_best.values())}
    adjusted, adjusted_to_best = _adjust(to_full), _adjust(to_best)
    compared = []
    for index, row in enumerate(rows):
        if index in to_full:
            row = replace(row, **_fields(to_full[index], "", "full"), p_adjusted=adjusted[index])
        if index in to_best:
            row = replace(
                row, **_fields(to_best[index], "_to_best", "best"), p_adjusted_to_best=adjusted_to_best[index]
            )
        compared.append(row)
    return compared, tests


def _differences(
    ranked: Sequence[int], groups: Sequence[Sequence[RunRecord]], *references: int | None
) -> list[dict[int, Difference]]:
    """For each reference row the differences of all other ranked rows to it; answers of one row at a time."""
    theirs = {index: collect_answers(groups[index]) for index in references if index is not None}
    found: dict[int, dict[int, Difference]] = {reference: {} for reference in theirs}
    for index in ranked:
        own = theirs.get(index) or collect_answers(groups[index])
        for reference in found:
            if index != reference and (difference := compare_answers(own, theirs[reference])) is not None:
                found[reference][index] = difference
    return [{} if reference is None else found[reference] for reference in references]


def _adjust(found: Mapping[int, Difference]) -> dict[int, float]:
    adjusted = benjamini_hochberg([difference.p_value for difference in found.values()])
    return dict(zip(found, adjusted, strict=True))


def _fields(found: Difference, suffix: str, name: str) -> dict[str, Any]:
    """What a row says about one difference."""
    key = f"difference_to_{name}"
    limits = {f"{key}_low": found.low, f"{key}_high": found.high}
    return {
        key: found.value,
        **limits,
        f"p_value{suffix}": found.p_value,
        f"covers_training{suffix}": found.covers_training,
    }


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
            "two-level t": "two-level t-test over seeds and questions",
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
        notes += scope_notes(covers for row in rows for covers in (row.covers_training, row.covers_training_to_best))
        notes.append("the best row is chosen on these same questions, which flatters it: vs best leans its way")
    notes += _contamination(rows)
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
