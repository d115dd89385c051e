"""What training changed on lm-eval's own tasks: comparisons of rows with the untrained model, and their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grass_ray.results.column import LM_EVAL, Column
from grass_ray.results.difference_columns import detectable, differences
from grass_ray.results.formats import NONE, number, p_text, percent, points
from grass_ray.results.paired import Comparison, adjust, collect_answers, compare_answers
from grass_ray.results.record import RunRecord
from grass_ray.results.row_facts import Benchmark
from grass_ray.results.rows import LeaderboardRow


def compare_with_base(rows: Sequence[LeaderboardRow], groups: Sequence[Sequence[RunRecord]]) -> list[LeaderboardRow]:
    """Compare each trained row with the untrained model, over all tasks and task by task.

    P-values over all tasks are adjusted over the rows, those of single tasks over rows and tasks.
    """
    base = next((at for at, row in enumerate(rows) if not row.trained and row.is_ranked and row.lm_eval_tasks), None)
    if base is None:
        return list(rows)
    theirs = collect_answers(groups[base], "lm_eval")
    overall: dict[int, Comparison] = {}
    single: dict[tuple[int, str], Comparison] = {}
    for index, row in enumerate(rows):
        if not (row.trained and row.is_ranked and row.lm_eval_tasks):
            continue
        own = collect_answers(groups[index], "lm_eval")
        if (found := compare_answers(own, theirs)) is not None:
            overall[index] = found
        for task in own.tasks:
            if (found := compare_answers(own.only([task]), theirs.only([task]))) is not None:
                single[index, task] = found
    overall, adjusted = adjust(overall), adjust(single)
    return [_with(row, index, overall.get(index), adjusted) for index, row in enumerate(rows)]


def _with(
    row: LeaderboardRow, index: int, overall: Comparison | None, single: dict[tuple[int, str], Comparison]
) -> LeaderboardRow:
    tasks = {task: replace(own, to_base=single.get((index, task))) for task, own in row.lm_eval_tasks.items()}
    return replace(row, lm_eval_to_base=overall, lm_eval_tasks=tasks)


# ------------------------------------------------------------------------------------------------------------- columns


def _facts_of(row: LeaderboardRow) -> dict[str, dict[str, float | str | None]]:
    """Every task of a row as plain JSON values."""
    return {task: _facts(own) for task, own in row.lm_eval_tasks.items()}


def _facts(own: Benchmark) -> dict[str, float | str | None]:
    found = own.to_base
    return {
        "metric": own.metric,
        "value": own.value,
        "stderr": own.stderr,
        "difference_to_base": None if found is None else found.value,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "p_adjusted": None if found is None else found.p_adjusted,
    }


LM_EVAL_FACTS = ("metric", "value", "stderr", "difference_to_base", "low", "high", "p_adjusted")


def _average(row: LeaderboardRow) -> str:
    return percent(row.lm_eval) + ("" if row.lm_eval_std is None else f" ±{percent(row.lm_eval_std)}")


LM_EVAL_COLUMNS = (
    Column(
        "lm_eval",
        "lm-eval %",
        form=percent,
        text=_average,
        meaning="mean over lm-eval's own tasks whose metric is a share; ±: standard deviation over seeds",
        place=LM_EVAL,
        share=True,
    ),
    Column("lm_eval_std", small_first=True),
    *differences("base", points, lambda row: row.lm_eval_to_base, metric="lm_eval"),
    *differences("full", points, lambda row: row.lm_eval_to_full, metric="lm_eval"),
    *differences("best", points, lambda row: row.lm_eval_to_best, metric="lm_eval"),
    detectable("full", lambda row: row.lm_eval_to_full, metric="lm_eval"),
    detectable("best", lambda row: row.lm_eval_to_best, metric="lm_eval"),
    Column("lm_eval_tasks", get=_facts_of, sortable=False),
)


def benchmark_columns(task: str) -> list[Column]:
    """A task's metric with lm-eval's standard error, and its difference to the untrained model."""

    def value(row: LeaderboardRow) -> float | None:
        return None if (own := row.lm_eval_tasks.get(task)) is None else own.value

    def text(row: LeaderboardRow) -> str:
        return NONE if (own := row.lm_eval_tasks.get(task)) is None else _value(own)

    def change(row: LeaderboardRow) -> Comparison | None:
        return None if (own := row.lm_eval_tasks.get(task)) is None else own.to_base

    def difference(row: LeaderboardRow) -> str:
        found = change(row)
        return NONE if found is None else f"{points(found.value)} (p {p_text(found.p_adjusted)})"

    return [
        Column(
            f"lm_eval/{task}",
            task,
            value,
            text=text,
            meaning=f"{task} of lm-eval, with its standard error",
            place=LM_EVAL + 2,
        ),
        Column(
            f"lm_eval/{task}/to_base",
            f"{task} vs base",
            lambda row: None if (found := change(row)) is None else found.value,
            points,
            f"change of {task} by training, in percentage points, and its adjusted p-value",
            text=difference,
            interval=lambda row: None if (found := change(row)) is None else found.limits,
            place=LM_EVAL + 2,
        ),
    ]


def _value(own: Benchmark) -> str:
    form = percent if own.is_share else lambda value: number(value, 3)
    return form(own.value) + ("" if own.stderr is None else f" ±{form(own.stderr)}")
