"""The columns of a leaderboard, once for all outputs: terminal, Markdown, CSV, JSON, page, MLflow's table, ``--sort``.

A new column is one entry in ``COLUMNS``: everything but its key has a default. ::

    Column("gib_hours", "GiB h", lambda row: row.peak_allocated_gib * row.train_s / 3600, meaning="memory times time")
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from grass_ray.results.benchmarks import LM_EVAL_COLUMNS, LM_EVAL_FACTS, benchmark_columns
from grass_ray.results.column import COST, DETAILS, END, LOSS, RANKING, Column
from grass_ray.results.difference_columns import P_FOR, detectable, differences
from grass_ray.results.formats import NONE, NOT_TOLD, gib, limits, nats, nats_more, number, percent, points
from grass_ray.results.leaderboard import LeaderboardTable
from grass_ray.results.paired import Metric, fact
from grass_ray.results.rows import LeaderboardRow
from grass_ray.results.text_columns import TEXT_COLUMNS
from grass_ray.tasks.suites import TASKS


def _accuracy(row: LeaderboardRow) -> str:
    return percent(row.accuracy) + ("" if row.accuracy_std is None else f" ±{percent(row.accuracy_std)}")


def _rank(row: LeaderboardRow) -> str:
    return NONE if row.rank is None else NOT_TOLD if row.told_apart is False else str(row.rank)


def _loss(row: LeaderboardRow) -> str:
    return nats(row.loss) + ("" if row.loss_std is None else f" ±{nats(row.loss_std)}")


# -------------------------------------------------------------------------------------------------------- the columns

RANK = Column(
    "rank",
    "#",
    text=_rank,
    plain=lambda row: _rank(row).strip(NONE),
    meaning=f"place by accuracy, or by loss if there are no accuracies; {NOT_TOLD}: not told apart from the first row",
    place=RANKING,
    small_first=True,
    always=True,
    mlflow="rank",
)
METHOD = Column(
    "label",
    "method",
    lambda row: row.label,
    text=lambda row: row.label + (" *" if row.pareto else ""),
    meaning="and what sets the row apart",
    place=RANKING + 1,
    data=False,
    always=True,
    words=True,
)
STATUS = Column(
    "status",
    "status",
    form=lambda status: str(status).replace("_", " "),
    meaning="finished, or what became of the row; partial: not every seed, or not every task",
    place=END,
    always=True,
    words=True,
)
LOSS_COLUMN = Column(
    "loss",
    "loss",
    form=nats,
    text=_loss,
    meaning="of the right answer in nats, lower is better; ±: standard deviation over seeds",
    place=LOSS - 1,
    small_first=True,
)
# JSON and CSV have them in this order, which programs may rely on; tables for people are ordered by ``place``.
COLUMNS: tuple[Column, ...] = (
    METHOD,
    RANK,
    Column("method"),
    Column("model", mlflow="model"),
    Column("suite", mlflow="suite"),
    Column(
        "accuracy",
        "acc. %",
        form=percent,
        text=_accuracy,
        meaning="accuracy, the mean over tasks of the means over seeds; ±: standard deviation over seeds",
        place=RANKING + 10,
        share=True,
        mlflow="accuracy %",
        always=True,
    ),
    Column(
        "interval",
        "95 %",
        lambda row: row.accuracy_low,
        text=lambda row: limits(row.accuracy_low, row.accuracy_high),
        plain=lambda row: limits(row.accuracy_low, row.accuracy_high).strip(NONE),
        meaning="interval over questions (Wilson; of an average, Newcombe's combination)",
        place=RANKING + 10,
        sortable=False,
        data=False,
    ),
    Column("accuracy_low"),
    Column("accuracy_high"),
    Column("tasks", sortable=False),
    Column(
        "peak_allocated_gib",
        "alloc. GiB",
        form=gib,
        meaning="peak memory that tensors took on the device, the most of all seeds",
        place=COST,
        small_first=True,
        mlflow="peak GiB",
    ),
    Column(
        "peak_reserved_gib",
        "resrv. GiB",
        form=gib,
        meaning="peak memory reserved by the allocator (CUDA) or resident in the process (CPU)",
        place=DETAILS + 20,
        small_first=True,
    ),
    Column(
        "host_pinned_gib",
        "pinned GiB",
        form=gib,
        meaning="host memory of offloaded optimizer states",
        place=DETAILS + 20,
        small_first=True,
        mlflow="host GiB",
    ),
    Column(
        "tokens_per_second",
        "tok/s",
        form=lambda speed: number(speed, 0),
        meaning="non-padding tokens",
        place=COST,
        mlflow="tokens/s",
    ),
    Column(
        "train_s",
        "min",
        form=lambda seconds: number(seconds, 1, 1 / 60),
        meaning="minutes of training, a mean over seeds",
        place=COST,
        small_first=True,
        mlflow="train s",
    ),
    Column(
        "trainable_share",
        "train %",
        form=percent,
        meaning="most parameters that train at one time",
        place=DETAILS + 20,
        small_first=True,
        share=True,
    ),
    Column("seeds", "seeds", meaning="that finished", place=COST + 1),
    STATUS,
    Column("failure", mlflow="reason", plain=lambda row: row.failure or ""),
    Column("variant"),
    Column("hardware", mlflow="hardware"),
    Column("accuracy_std", small_first=True),
    Column(
        "accuracy_clean",
        "clean %",
        form=percent,
        meaning="average over the tasks whose test questions are not in the training data of any row",
        place=DETAILS + 10,
        share=True,
    ),
    Column(
        "accuracy_normalised",
        "norm. %",
        form=percent,
        meaning="average of (accuracy - chance) / (1 - chance): 0 is guessing, 100 perfect",
        place=DETAILS + 10,
        share=True,
    ),
    Column("contaminated", sortable=False),
    *differences("full", points, lambda row: row.to_full),
    *differences("best", points, lambda row: row.to_best),
    Column("pareto", mlflow="Pareto"),
    Column("task_intervals", sortable=False),
    Column(
        "training_steps",
        "steps",
        text=lambda row: f"{row.training_steps}" if row.trained else NONE,
        meaning="optimizer updates; probing comes on top",
        place=DETAILS + 40,
        small_first=True,
    ),
    Column("batch_size"),
    Column("train_tokens", small_first=True),
    Column(
        "learning_rate",
        "lr",
        form=lambda rate: NONE if rate is None else f"{rate:.3g}",
        meaning="peak learning rate",
        place=DETAILS + 40,
    ),
    Column("learning_rates_tried"),
    Column("data_sha256", sortable=False),
    Column("commit", "commit", meaning="of grass_ray; +: with changes", place=DETAILS + 60, words=True),
    Column("date", "date", meaning="of the last run", place=DETAILS + 60),
    Column("run_ids", sortable=False),
    P_FOR,
    Column("covers_training", get=lambda row: fact(row.to_full, "covers_training")),
    Column("covers_training_to_best", get=lambda row: fact(row.to_best, "covers_training")),
    Column(
        "train_rows",
        "rows",
        text=lambda row: NONE if row.train_rows is None else f"{row.train_rows}{'!' * bool(row.train_rows_dropped)}",
        meaning="trained on, the least of all seeds; !: others were dropped, a note says why",
        place=DETAILS + 30,
        mlflow="train rows",
    ),
    Column("train_rows_dropped", small_first=True, mlflow="rows dropped"),
    Column("test", mlflow="test"),
    Column("told_apart", mlflow="told apart"),
    LOSS_COLUMN,
    Column("loss_std", small_first=True),
    Column("task_losses", sortable=False),
    *differences("full", nats_more, lambda row: row.loss_to_full, metric="loss"),
    *differences("best", nats_more, lambda row: row.loss_to_best, metric="loss"),
    Column("loss_covers_training", get=lambda row: fact(row.loss_to_full, "covers_training")),
    Column("loss_covers_training_to_best", get=lambda row: fact(row.loss_to_best, "covers_training")),
    Column("loss_told_apart", get=lambda row: fact(row.loss_to_best, "told_apart")),
    detectable("full", lambda row: row.to_full),
    detectable("best", lambda row: row.to_best),
    detectable("full", lambda row: row.loss_to_full, metric="loss"),
    detectable("best", lambda row: row.loss_to_best, metric="loss"),
    *TEXT_COLUMNS,
    *LM_EVAL_COLUMNS,
    Column(
        "mean_reserved_gib",
        "mean GiB",
        form=gib,
        meaning="memory reserved after a step, the mean over steps and seeds",
        place=DETAILS + 20,
        small_first=True,
        mlflow="",
    ),
    Column(
        "p99_reserved_gib",
        "p99 GiB",
        form=gib,
        meaning="memory reserved after a step, its 99th percentile over steps, the most of all seeds",
        place=DETAILS + 20,
        small_first=True,
        mlflow="",
    ),
    Column(
        "checkpoint_mib",
        "ckpt. MiB",
        form=lambda size: number(size, 1),
        meaning="size of what an export holds: the adapter, or all weights",
        place=DETAILS + 20,
        small_first=True,
        mlflow="",
    ),
)
WORDS = frozenset(column.name for column in COLUMNS if column.words)


def task_column(task: str, metric: Metric = "accuracy") -> Column:
    """A task's accuracy, or its loss."""
    title = TASKS[task].title if task in TASKS else task
    if metric == "loss":
        return Column(
            task, task, lambda row: row.task_losses.get(task), nats, f"loss on {title}, in nats", small_first=True
        )
    return Column(
        task,
        task,
        lambda row: row.tasks.get(task),
        percent,
        f"accuracy (%) on {title}",
        interval=lambda row: row.task_intervals.get(task),
    )


def sort_keys() -> list[str]:
    """What ``--sort`` takes besides tasks."""
    return [column.key for column in COLUMNS if column.sortable]


def column_of(key: str, metric: Metric = "accuracy") -> Column:
    """The column of a key, or of a task in a table that is ranked by the metric."""
    return next((column for column in COLUMNS if column.key == key), task_column(key, metric))


# -------------------------------------------------------------------------------------------------------- for programs


def row_values(row: LeaderboardRow) -> dict[str, Any]:
    """A row as plain JSON values in a fixed order."""
    return {column.key: column.raw(row) for column in COLUMNS if column.data}


def leaderboard_csv(tables: Sequence[LeaderboardTable]) -> str:
    """One line per row, with three columns per task for its accuracy and limits, and one for its loss if there are."""
    rows = [row_values(row) for table in tables for row in table.rows]
    tasks = dict.fromkeys(task for row in rows for task in row["tasks"])
    with_losses = any(row["task_losses"] for row in rows)
    benchmarks = dict.fromkeys(task for row in rows for task in row["lm_eval_tasks"])
    lines = []
    for row in rows:
        accuracies, intervals, losses = (row.pop(key) for key in ("tasks", "task_intervals", "task_losses"))
        own = row.pop("lm_eval_tasks")
        line = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
        for task in tasks:
            low, high = intervals.get(task) or (None, None)
            line[f"eval/{task}/accuracy"] = accuracies.get(task)
            line |= {f"eval/{task}/accuracy_low": low, f"eval/{task}/accuracy_high": high}
            line |= {f"eval/{task}/loss": losses.get(task)} if with_losses else {}
        for task in benchmarks:
            facts = own.get(task, {})
            line |= {f"lm_eval/{task}/{key}": facts.get(key) for key in LM_EVAL_FACTS}
        lines.append(line)
    if not lines:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue().rstrip("\n")


def overview_rows(tables: Sequence[LeaderboardTable]) -> list[dict[str, Any]]:
    """The leaderboard as rows of one flat table for MLflow, with the same columns in every row."""
    named = [(column.name if column.mlflow is None else column.mlflow, column) for column in COLUMNS]
    named = sorted(((name, column) for name, column in named if name), key=lambda item: item[1].place)
    rows = [row for table in tables for row in table.rows]
    if all(row.loss is None for row in rows):
        named = [(name, column) for name, column in named if not column.key.startswith("loss")]
    tasks = dict.fromkeys(task for table in tables for task in table.benchmarks)
    if not tasks:
        named = [(name, column) for name, column in named if not column.key.startswith("lm_eval")]
    named += [(column.name, column) for task in tasks for column in benchmark_columns(task)]
    return [{name: column.overview(row) for name, column in named} for row in rows]
