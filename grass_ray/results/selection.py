"""Which runs and rows are shown: several stores merged, filters, sorting.

::

    records = merge_records([load_records(first), load_records(second)])
    chosen = Selection(models=("tiny",), methods=("full", "grass"), sort="peak_allocated_gib")
    tables = chosen.tables(build_leaderboard(chosen.records(records)))

Model, suite, task and seed choose runs before anything is computed. Method and status choose rows afterwards: ranks,
differences and p-values stay those of the whole table, so that hiding rows changes no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from grass_ray.config import ConfigError
from grass_ray.methods import unknown
from grass_ray.paths import model_label
from grass_ray.results.column import Column
from grass_ray.results.columns import column_of, sort_keys
from grass_ray.results.leaderboard import LeaderboardTable
from grass_ray.results.record import RunRecord
from grass_ray.results.rows import LeaderboardRow
from grass_ray.tasks.suites import SUITES, TASKS

STATUSES = ("finished", "partial", "failed", "out_of_memory", "stopped")


def merge_records(stores: Iterable[Sequence[RunRecord]]) -> list[RunRecord]:
    """The records of several stores, oldest first. Of a run id that is in more than one the latest counts."""
    merged: dict[str, RunRecord] = {}
    for record in (record for records in stores for record in records):
        known = merged.get(record.run_id)
        if known is None or _finished(record) > _finished(known):
            merged[record.run_id] = record
    return sorted(merged.values(), key=lambda record: datetime.fromisoformat(record.started_at))


def _finished(record: RunRecord) -> datetime:
    return datetime.fromisoformat(record.finished_at)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to show. An empty filter shows everything.

    Raises :class:`ConfigError` on a status that does not exist; :meth:`records` on other names.
    """

    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    statuses: tuple[str, ...] = ()
    sort: str | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        """Check the names that can be checked without records."""
        mistakes = [unknown("status", name, list(STATUSES)) for name in self.statuses if name not in STATUSES]
        if self.reverse and self.sort is None:
            mistakes.append("--reverse turns the order of --sort COLUMN around; give --sort, too")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def records(self, records: Iterable[RunRecord]) -> list[RunRecord]:
        """The runs of the chosen models, suites and seeds, with the chosen tasks alone.

        Raises :class:`ConfigError` on a suite or task that is neither built in nor of a run, a column that does not
        exist, or a model that no run has.
        """
        records = list(records)
        self._check_names(records)
        models = {record.config["model"]["name"] for record in records}
        known = models | {model_label(name) for name in models}
        if strangers := [name for name in self.models if name not in known]:
            raise ConfigError("; ".join(unknown("model", name, sorted(models)) for name in strangers))
        chosen = []
        for record in records:
            config = record.config
            name = config["model"]["name"]
            if self.models and name not in self.models and model_label(name) not in self.models:
                continue
            if self.suites and config["data"]["suite"] not in self.suites:
                continue
            if self.seeds and config["seed"] not in self.seeds and config["training"]["steps"]:
                continue  # the untrained model has no seed worth choosing
            if self.tasks and not set(self.tasks) & set(config["data"]["tasks"]):
                continue
            chosen.append(self._with_tasks(record))
        return chosen

    def _check_names(self, records: Sequence[RunRecord]) -> None:
        """Check names against the built-in ones and those of the runs: only runs know a user's own tasks."""
        suites = list(dict.fromkeys([*SUITES, *(record.config["data"]["suite"] for record in records)]))
        tasks = list(dict.fromkeys([*TASKS, *(task for record in records for task in record.config["data"]["tasks"])]))
        mistakes = [unknown("suite", name, suites) for name in self.suites if name not in suites]
        mistakes += [unknown("task", name, tasks) for name in self.tasks if name not in tasks]
        if self.sort is not None and self.sort not in (known := [*sort_keys(), *tasks]):
            mistakes.append(unknown("column", self.sort, known))
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    def _with_tasks(self, record: RunRecord) -> RunRecord:
        """The record as if it had been evaluated on the chosen tasks alone."""
        if not self.tasks:
            return record
        data = record.config["data"]
        kept = [task for task in data["tasks"] if task in self.tasks]
        scores = {task: score for task, score in record.tasks.items() if task in self.tasks}
        config = {**record.config, "data": {**data, "tasks": kept}}
        return record.model_copy(update={"config": config, "tasks": scores})

    def tables(self, tables: Iterable[LeaderboardTable]) -> list[LeaderboardTable]:
        """The tables with the chosen methods' and statuses' rows, in the chosen order; empty tables left out.

        Raises :class:`ConfigError` when a method was named that no table has.
        """
        tables = list(tables)
        methods = {row.method for table in tables for row in table.rows}
        if strangers := [name for name in self.methods if name not in methods]:
            raise ConfigError("; ".join(unknown("method", name, sorted(methods)) for name in strangers))
        shown = [self._table(table) for table in tables]
        return [table for table in shown if table.rows]

    def _table(self, table: LeaderboardTable) -> LeaderboardTable:
        rows = [
            row
            for row in table.rows
            if (not self.methods or row.method in self.methods) and (not self.statuses or row.status in self.statuses)
        ]
        notes = list(table.notes)
        if hidden := len(table.rows) - len(rows):
            notes.append(
                f"{hidden} of {len(table.rows)} rows are hidden by --method or --status; ranks, differences and "
                "p-values are those of the whole table"
            )
        if self.sort is not None:
            rows = self._sorted(rows, column_of(self.sort, table.metric))
            notes.append(f"sorted by {self.sort}{', reversed' if self.reverse else ''}")
        return replace(table, rows=tuple(rows), notes=tuple(notes))

    def _sorted(self, rows: Sequence[LeaderboardRow], column: Column) -> list[LeaderboardRow]:
        """Sorted with what is best first, rows without the value last either way."""
        values = [(column.value(row), row) for row in rows]
        known = [(value, row) for value, row in values if value is not None]
        words = any(isinstance(value, str) for value, _ in known)
        descending = not words and not column.small_first
        known.sort(key=lambda item: item[0], reverse=descending != self.reverse)  # stable: ties keep the ranking
        return [row for _, row in known] + [row for value, row in values if value is None]
