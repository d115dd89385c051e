"""Which columns a table for people has: those that say anything, in their places."""

from __future__ import annotations

from collections.abc import Callable

from grass_ray.results import columns as all_of
from grass_ray.results.benchmarks import benchmark_columns
from grass_ray.results.column import COST, DETAILS, END, LM_EVAL, LOSS, Column
from grass_ray.results.columns import LOSS_COLUMN, METHOD, RANK, STATUS, task_column
from grass_ray.results.formats import NONE
from grass_ray.results.leaderboard import LeaderboardTable


def result_columns(table: LeaderboardTable) -> list[Column]:
    """Ranking, costs and status, as far as they say anything."""
    by_lm_eval = table.metric == "lm_eval"
    return _shown(table, lambda column: not DETAILS <= column.place < END or (by_lm_eval and _of_lm_eval(column)))


def loss_columns(table: LeaderboardTable) -> list[Column]:
    """Losses and their differences; none if there are no losses."""
    found = _shown(table, lambda column: column is LOSS_COLUMN or LOSS <= column.place < COST)
    return [RANK, METHOD, *found] if LOSS_COLUMN in found else []


def detail_columns(table: LeaderboardTable) -> list[Column]:
    """What does not fit beside the ranking on a terminal."""
    return _shown(table, lambda column: DETAILS <= column.place < LM_EVAL)


def lm_eval_columns(table: LeaderboardTable) -> list[Column]:
    """lm-eval's own tasks one by one, and their average unless rows are ranked by it; none if there are none."""
    tasks = [column for task in table.benchmarks for column in benchmark_columns(task)]
    shown = [column for column in tasks if any(column.cell(row) != NONE for row in table.rows)]
    one = len(table.benchmarks) < 2 or table.metric == "lm_eval"  # then its average is said already
    mean = [] if one else _shown(table, lambda column: column.place == LM_EVAL)
    return [RANK, METHOD, *mean, *shown] if shown else []


def _of_lm_eval(column: Column) -> bool:
    return LM_EVAL <= column.place < END


def task_columns(table: LeaderboardTable) -> list[Column]:
    """A column per task; none if there is only one task, or if they are not evaluated."""
    if table.metric == "lm_eval":
        return []
    return [task_column(task, table.metric) for task in table.tasks] if len(table.tasks) > 1 else []


def all_columns(table: LeaderboardTable) -> list[Column]:
    """Every column that says anything, the status last."""
    shown = _shown(table, lambda column: column is not STATUS and not _of_lm_eval(column))
    if table.metric == "lm_eval":
        shown = [*_shown(table, lambda column: column.place < COST or _of_lm_eval(column)), *shown]
    return list(dict.fromkeys([*shown, *task_columns(table), *lm_eval_columns(table), STATUS]))


def _shown(table: LeaderboardTable, chosen: Callable[[Column], bool]) -> list[Column]:
    """The chosen columns for people that have a value in some row, and those that are always there."""
    columns = [column for column in all_of.COLUMNS if column.name and chosen(column)]
    without = None if table.metric == "accuracy" else "accuracy"
    shown = [
        column
        for column in columns
        if (column.always and column.key != without) or any(column.cell(row) != NONE for row in table.rows)
    ]
    return sorted(shown, key=lambda column: column.place)
