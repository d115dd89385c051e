"""The columns of a leaderboard: what each is called, how its cells read, what it means. Shared by all formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.pairing import scope
from grass_ray.tasks.suites import TASKS

WORDS = ("method", "p for", "commit", "status")
_ALWAYS = ("#", "method", "acc. %", "status")


class Column(NamedTuple):
    """A column: ``value`` sorts, None last; ``meaning`` explains the name to a reader."""

    name: str
    cell: Callable[[LeaderboardRow], str]
    value: Callable[[LeaderboardRow], float | str | None]
    meaning: str


# ------------------------------------------------------------------------------------------------------------- cells


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number with so many digits, a dash where there is none."""
    return "-" if value is None else f"{scale * value:.{digits}f}"


def significant(value: float | None) -> str:
    """Gibibytes with enough digits for small models too."""
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def p_text(value: float | None) -> str:
    """A p-value with three digits."""
    return "-" if value is None else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as percent without the sign."""
    return "-" if value is None else f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def limits(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Two shares as percent."""
    if low is None or high is None:
        return "-"
    return f"{percent(low, sign=True)} to {percent(high, sign=True)}" if sign else f"{percent(low)}-{percent(high)}"


def _accuracy(row: LeaderboardRow) -> str:
    return percent(row.accuracy) + ("" if row.accuracy_std is None else f" ±{percent(row.accuracy_std)}")


def _scope(row: LeaderboardRow) -> str:
    full, best = scope(row.covers_training), scope(row.covers_training_to_best)
    if "-" in (full, best) or full == best:
        return best if full == "-" else full
    return f"full: {full}, best: {best}"


RANK = Column("#", lambda row: "-" if row.rank is None else str(row.rank), lambda row: row.rank, "rank by accuracy")
METHOD = Column(
    "method", lambda row: row.label + (" *" if row.pareto else ""), lambda row: row.label, "and what sets the row apart"
)
STATUS = Column(
    "status",
    lambda row: row.status.replace("_", " "),
    lambda row: row.status,
    "finished, or what became of the row; partial: not every seed, or not every task",
)
RESULTS: tuple[Column, ...] = (
    RANK,
    METHOD,
    Column(
        "acc. %",
        _accuracy,
        lambda row: row.accuracy,
        "accuracy, the mean over tasks of the means over seeds; ±: standard deviation over seeds",
    ),
    Column(
        "95 %",
        lambda row: limits(row.accuracy_low, row.accuracy_high),
        lambda row: row.accuracy_low,
        "interval over questions (Wilson; of an average, Newcombe's combination)",
    ),
    Column(
        "vs full",
        lambda row: percent(row.difference_to_full, sign=True),
        lambda row: row.difference_to_full,
        "difference to full fine-tuning on the same questions, in percentage points",
    ),
    Column(
        "p",
        lambda row: p_text(row.p_adjusted),
        lambda row: row.p_adjusted,
        "of that difference, adjusted for the table",
    ),
    Column(
        "vs best",
        lambda row: percent(row.difference_to_best, sign=True),
        lambda row: row.difference_to_best,
        "difference to the first row on the same questions, in percentage points",
    ),
    Column(
        "p best",
        lambda row: p_text(row.p_adjusted_to_best),
        lambda row: row.p_adjusted_to_best,
        "of that difference, adjusted for the table",
    ),
    Column(
        "p for",
        _scope,
        _scope,
        "what the differences and p-values speak of: any seeds and questions, or questions and these runs alone",
    ),
    Column(
        "alloc. GiB",
        lambda row: significant(row.peak_allocated_gib),
        lambda row: row.peak_allocated_gib,
        "peak memory that tensors took on the device, the most of all seeds",
    ),
    Column(
        "tok/s", lambda row: number(row.tokens_per_second, 0), lambda row: row.tokens_per_second, "non-padding tokens"
    ),
    Column(
        "min",
        lambda row: number(row.train_s, 1, 1 / 60),
        lambda row: row.train_s,
        "minutes of training, a mean over seeds",
    ),
    Column("seeds", lambda row: str(len(row.seeds)), lambda row: len(row.seeds), "that finished"),
)
DETAILS: tuple[Column, ...] = (
    Column(
        "clean %",
        lambda row: percent(row.accuracy_clean),
        lambda row: row.accuracy_clean,
        "average over the tasks whose test questions are not in the training data of any row",
    ),
    Column(
        "norm. %",
        lambda row: percent(row.accuracy_normalised),
        lambda row: row.accuracy_normalised,
        "average of (accuracy - chance) / (1 - chance): 0 is guessing, 100 perfect",
    ),
    Column(
        "resrv. GiB",
        lambda row: significant(row.peak_reserved_gib),
        lambda row: row.peak_reserved_gib,
        "peak memory reserved by the allocator (CUDA) or resident in the process (CPU)",
    ),
    Column(
        "pinned GiB",
        lambda row: significant(row.host_pinned_gib),
        lambda row: row.host_pinned_gib,
        "host memory of offloaded optimizer states",
    ),
    Column(
        "train %",
        lambda row: number(row.trainable_share, 1, 100),
        lambda row: row.trainable_share,
        "most parameters that train at one time",
    ),
    Column(
        "rows",
        lambda row: "-" if row.train_rows is None else f"{row.train_rows}{'!' * bool(row.train_rows_dropped)}",
        lambda row: row.train_rows,
        "trained on, the least of all seeds; !: others were dropped, a note says why",
    ),
    Column(
        "steps",
        lambda row: f"{row.training_steps}" if row.trained else "-",
        lambda row: row.training_steps,
        "optimizer updates; probing comes on top",
    ),
    Column(
        "lr",
        lambda row: "-" if row.learning_rate is None else f"{row.learning_rate:.3g}",
        lambda row: row.learning_rate,
        "peak learning rate",
    ),
    Column("commit", lambda row: row.commit or "-", lambda row: row.commit, "of grass_ray; +: with changes"),
    Column("date", lambda row: row.date, lambda row: row.date, "of the last run"),
)


# --------------------------------------------------------------------------------------------------------- of a table


def result_columns(table: LeaderboardTable) -> list[Column]:
    """Ranking, costs and status, as far as they say anything."""
    return used([*RESULTS, STATUS], table.rows)


def detail_columns(table: LeaderboardTable) -> list[Column]:
    """What does not fit beside the ranking on a terminal."""
    return used(DETAILS, table.rows)


def task_columns(table: LeaderboardTable) -> list[Column]:
    """A column a task, none where there is only one task."""

    def column(task: str) -> Column:
        title = TASKS[task].title if task in TASKS else task
        return Column(
            task, lambda row: percent(row.tasks.get(task)), lambda row: row.tasks.get(task), f"accuracy (%) on {title}"
        )

    return [column(task) for task in table.tasks] if len(table.tasks) > 1 else []


def all_columns(table: LeaderboardTable) -> list[Column]:
    """Every column that says anything."""
    return [*used([*RESULTS, *DETAILS], table.rows), *task_columns(table), STATUS]


def used(columns: Sequence[Column], rows: Sequence[LeaderboardRow]) -> list[Column]:
    """The columns that say anything, with number, method, accuracy and status always there."""
    return [column for column in columns if column.name in _ALWAYS or any(column.cell(row) != "-" for row in rows)]


# -------------------------------------------------------------------------------------------------------------- notes


def table_notes(table: LeaderboardTable) -> list[str]:
    """What a reader must know, one sentence each; the budget first."""
    notes = [table.budget] if table.budget else []
    notes += table.notes
    if any(row.pareto for row in table.rows):
        notes.append("* no other row has both more accuracy and less peak memory")
    if any(row.accuracy_std is not None for row in table.rows):
        notes.append("±: standard deviation over seeds; the 95 % interval is over the questions")
    return notes


def reasons(table: LeaderboardTable) -> list[str]:
    """What became of the rows that are not ranked; rows that ended alike together."""
    ends: dict[str, list[str]] = {}
    for row in table.rows:
        if row.rank is None:
            reason = " ".join((row.failure or "").split())
            end = row.status.replace("_", " ") + (f" - {reason}" if reason else "")
            ends.setdefault(end, []).append(row.label)
    lines = []
    for end, labels in ends.items():
        more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
        lines.append(f"{', '.join(labels[:8])}{more}: {end}")
    return lines
