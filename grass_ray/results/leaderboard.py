"""The leaderboard: records in, ranked tables out. Pure; nothing here asks MLflow or a model.

::

    tables = build_leaderboard(load_records(uri, "commonsense"))
    print(render(tables, "markdown"))                     # grass_ray.results.rendering

One table for each model, suite, hardware and number of workers, and for each test: answers to other questions, or
judged by other rules, cannot be ranked together (:mod:`grass_ray.results.compare`). One row for each method with its
settings, over its seeds. Only rows of which every seed finished are ranked; the others stand below with the reason.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from grass_ray.paths import model_label
from grass_ray.results.benchmarks import compare_with_base
from grass_ray.results.compare import EVALUATION, Asked, comparable_groups, differences
from grass_ray.results.formats import NOT_TOLD
from grass_ray.results.notes import budget_line, comparison_notes, lost_rows
from grass_ray.results.paired import METRICS, Comparison, Metric, adjust, collect_answers, compare_answers
from grass_ray.results.power import SeedSpread, Spread, with_detectable
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow as LeaderboardRow
from grass_ray.results.rows import build_rows, ranked_by
from grass_ray.results.settings import settings_key, training_rows
from grass_ray.results.statistics import mean_of_shares

_MOST_DIFFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class LeaderboardTable:
    """Rows that may be compared, best first.

    ``notes`` are what a reader must know, and ``warnings`` those of them that must not be missed: what cannot be
    compared, and which rows of data were lost. ``budget`` says who trained how much. ``test`` is what all rows were
    tested on; ``apart`` tells the table from another one of the same title. ``spreads`` are the variances that
    differences between its trained rows are made of.
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
    spreads: Mapping[Metric, Spread] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Model, suite, hardware and how it was evaluated."""
        # a CPU is named with all of its cores, which several workers may share; a GPU is one of theirs
        machine = self.hardware if self.world_size == 1 else f"{self.hardware}, {self.world_size} workers"
        parts = [str(self.evaluation["scoring"])]
        if self.metric == "accuracy":
            parts.append(f"{self.evaluation['extraction']} extraction")
        if self.evaluation["num_beams"] not in (None, 1):
            parts.append(f"{self.evaluation['num_beams']} beams")
        if self.evaluation["limit"] is not None:
            parts.append(f"a sample of {self.evaluation['limit']} examples a task")
        if self.evaluation["template"] not in (None, "clean"):
            parts.append(f"{self.evaluation['template']} template")
        if self.metric == "lm_eval":
            parts = [f"trained on {self.suite}"] if any(row.trained for row in self.rows) else ["untrained"]
        if self.apart:
            parts.append(self.apart)
        return f"{self.subject}, {machine} ({', '.join(parts)})"

    @property
    def subject(self) -> str:
        """The model and what it is evaluated on."""
        return f"{self.model} on {'the tasks of lm-eval' if self.metric == 'lm_eval' else self.suite}"

    @property
    def metric(self) -> Metric:
        """What rows are ranked by: accuracy, or loss if no accuracy is measured."""
        return ranked_by(self.evaluation["scoring"])

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """lm-eval's own tasks that some row was evaluated on."""
        return tuple(dict.fromkeys(task for row in self.rows for task in row.lm_eval_tasks))

    @property
    def pareto_note(self) -> str:
        """What the star beside a method says."""
        better = {"accuracy": "more accuracy", "loss": "a lower loss", "lm_eval": "a higher average of lm-eval"}
        return f"* no other row has both {better[self.metric]} and less peak memory"

    @property
    def best_of_each_method(self) -> tuple[LeaderboardRow, ...]:
        """The highest row of each method, in the table's order."""
        first: dict[str, LeaderboardRow] = {}
        for row in self.rows:
            first.setdefault(row.method, row)
        return tuple(first.values())

    @property
    def all_notes(self) -> list[str]:
        """What a reader must know, one sentence each; the budget first."""
        notes = [self.budget] if self.budget else []
        notes += self.notes
        if any(row.told_apart is False for row in self.rows):
            notes.append(
                f"{NOT_TOLD}: not told apart from the first row at the 5 % level, so the order among them says "
                "nothing; other ranks are told from the first row, not from each other"
            )
        if any(row.pareto for row in self.rows):
            notes.append(self.pareto_note)
        if any(row.accuracy_std is not None for row in self.rows):
            notes.append("±: standard deviation over seeds; the 95 % interval is over the questions")
        return notes

    @property
    def reasons(self) -> list[str]:
        """What became of the rows that are not ranked; rows that ended alike together."""
        ends: dict[str, list[str]] = {}
        for row in self.rows:
            if row.rank is None:
                reason = " ".join((row.failure or "").split())
                end = row.status.replace("_", " ") + (f" - {reason}" if reason else "")
                ends.setdefault(end, []).append(row.label)
        lines = []
        for end, labels in ends.items():
            more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
            lines.append(f"{', '.join(labels[:8])}{more}: {end}")
        return lines


def build_leaderboard(records: Iterable[RunRecord]) -> list[LeaderboardTable]:
    """Group, aggregate, compare and rank records. Of two runs of one configuration and seed the later one counts."""
    groups = comparable_groups(records)
    labels = Counter(map(model_label, {record.config["model"]["name"] for _, own in groups for record in own}))
    return _told_apart([_with_short_name(_table(test, own), labels) for test, own in groups])


def _with_short_name(table: LeaderboardTable, labels: Mapping[str, int]) -> LeaderboardTable:
    """Name a model's folder by its last component, unless another folder has the same."""
    label = model_label(table.model)
    return replace(table, model=label) if labels[label] == 1 else table


def _told_apart(tables: Sequence[LeaderboardTable]) -> list[LeaderboardTable]:
    """Make the titles of tables different, with a note of what tells tables of one title apart."""
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
    """Group records by configuration and training rows, one record per seed: the later one of two.

    A run whose training rows are unknown is put into the largest group of its configuration.
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
    evaluated = {task for row in rows if row.status == "finished" for task in row.scored}
    rows = _clean([_incomplete(row, evaluated) for row in rows])
    spreads: dict[Metric, Spread] = {}
    for metric in METRICS:
        rows, spread = _compare(rows, groups, metric)
        spreads |= {} if spread is None else {metric: spread}
    rows = compare_with_base(rows, groups)
    lost = lost_rows(list(zip([row.label for row in rows], groups, strict=True)))
    return LeaderboardTable(
        model=config["model"]["name"],
        suite=config["data"]["suite"],
        hardware=records[0].hardware,
        world_size=records[0].world_size,
        tasks=tuple(config["data"]["tasks"]),
        evaluation={key: config["evaluation"].get(key) for key in EVALUATION}
        | {"template": config["data"].get("template"), "limit": _limit(records)},
        rows=tuple(_ranked(_pareto(rows))),
        notes=(*lost, *comparison_notes(rows)),
        warnings=tuple(lost),
        budget=budget_line(rows, records),
        test=test,
        spreads=spreads,
    )


def _limit(records: Sequence[RunRecord]) -> int | None:
    """The number of examples that every task was limited to; None if no task has so many."""
    limit: int | None = records[0].config["evaluation"].get("limit")
    sizes = [score.num_examples for record in records for score in record.tasks.values()]
    return None if limit is not None and sizes and max(sizes) < limit else limit


def _clean(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Average every row over the same tasks: those that are contaminated in no row."""
    contaminated = {task for row in rows for task in row.contaminated}
    if not contaminated:
        return list(rows)
    scores = [[value for task, value in row.tasks.items() if task not in contaminated] for row in rows]
    return [
        replace(row, accuracy_clean=mean_of_shares(clean) if clean else None)
        for row, clean in zip(rows, scores, strict=True)
    ]


def _incomplete(row: LeaderboardRow, evaluated: set[str]) -> LeaderboardRow:
    """Do not rank a row that was evaluated on fewer tasks than the others."""
    missing = sorted(evaluated - row.scored)
    if row.status != "finished" or not missing or not row.scored:
        return row
    return replace(row, status="partial", failure=f"not evaluated on {', '.join(missing)}")


# ------------------------------------------------------------------------------------------- comparing and ranking


def _compare(
    rows: Sequence[LeaderboardRow], groups: Sequence[Sequence[RunRecord]], metric: Metric
) -> tuple[list[LeaderboardRow], Spread | None]:
    """Compare each ranked row with the best ``full`` row and with the best row by a metric, question by question.

    Also returns the spread of trained rows, as the comparisons show it.
    """
    ranked = [index for index, row in enumerate(rows) if row.is_ranked and math.isfinite(row.badness(metric))]
    if len(ranked) < 2:
        return list(rows), None

    def place(index: int) -> tuple[float, str]:
        return rows[index].badness(metric), rows[index].label

    best = min(ranked, key=place)
    full = min((index for index in ranked if rows[index].method == "full"), key=place, default=None)
    (to_full, to_best), seeds = _comparisons(ranked, groups, metric, full, best)
    trained = [found[index] for found in (to_full, to_best) for index in found if rows[index].trained]
    name = "" if metric == "accuracy" else f"{metric}_"
    compared = []
    for index, row in enumerate(rows):
        found: dict[str, Any] = {f"{name}to_full": to_full.get(index), f"{name}to_best": to_best.get(index)}
        compared.append(replace(row, **found))
    return compared, seeds.spread(trained)


def _comparisons(
    ranked: Sequence[int], groups: Sequence[Sequence[RunRecord]], metric: Metric, *references: int | None
) -> tuple[list[dict[int, Comparison]], SeedSpread]:
    """For each reference row the comparisons of all other ranked rows with it; answers of one row at a time."""
    theirs = {index: collect_answers(groups[index], metric) for index in references if index is not None}
    found: dict[int, dict[int, Comparison]] = {reference: {} for reference in theirs}
    seeds = SeedSpread()
    for index in ranked:
        own = theirs.get(index) or collect_answers(groups[index], metric)
        seeds.add(own)
        for reference in found:
            if index != reference and (comparison := compare_answers(own, theirs[reference])) is not None:
                found[reference][index] = comparison
    adjusted = {reference: adjust(with_detectable(own, seeds)) for reference, own in found.items()}
    return [{} if reference is None else adjusted[reference] for reference in references], seeds


def _pareto(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Mark the ranked rows on the Pareto front: no other row is both better and has less peak memory."""
    points = {
        index: (row.badness(row.ranked_by), row.peak_allocated_gib)
        for index, row in enumerate(rows)
        if row.is_ranked and row.peak_allocated_gib is not None
    }
    front: set[int] = set()
    best_before, previous = math.inf, (math.inf, math.inf)
    # from the least memory on, the better first: a point is on the front when it beats all before it
    for index, (badness, gib) in sorted(points.items(), key=lambda item: (item[1][1], item[1][0])):
        if badness < best_before or (badness, gib) == previous:
            front.add(index)
            best_before, previous = badness, (badness, gib)
    return [replace(row, pareto=index in front) for index, row in enumerate(rows)]


def _ranked(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Best first, equals sharing a rank; then rows that are not ranked, partly finished before failed."""
    ranked = sorted((row for row in rows if row.is_ranked), key=lambda row: (row.badness(row.ranked_by), row.label))
    ranks: dict[float, int] = {}
    for place, row in enumerate(ranked, start=1):
        ranks.setdefault(row.badness(row.ranked_by), place)
    below = sorted((row for row in rows if not row.is_ranked), key=lambda row: (-len(row.seeds), row.label))
    return [replace(row, rank=ranks[row.badness(row.ranked_by)]) for row in ranked] + below
