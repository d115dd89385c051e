"""What a sweep's parent run shows in MLflow: the ranking as a table, as Markdown in the description, and as figures.

::

    overview = Overview(tracker, sweep_run, "Which method learns most?", num_trials=30, folder=folder)
    overview.show(records)                     # again and again, as trials finish
    tables = overview.update(records)          # at the end

``mlflow ui`` shows the same leaderboard as ``grass-ray leaderboard`` prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from grass_ray.config import write_whole
from grass_ray.results.columns import METHOD, RANK, overview_rows
from grass_ray.results.figures.registry import write_sweep_plots
from grass_ray.results.figures.style import style_of
from grass_ray.results.formats import NOT_TOLD, limits, markdown_text, nats, percent
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable, build_leaderboard
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import Format, markdown_rows, render
from grass_ray.results.table_columns import all_columns
from grass_ray.results.tracker import Tracker

Whole = Callable[[RunRecord], RunRecord]

LONGEST_NOTE = 7500  # characters; MLflow cuts a tag at 8000
MOST_BARS = 40
_DESCRIBED = (
    *("rank", "label", "accuracy", "interval", "difference_to_full", "loss", "loss_difference_to_full"),
    *("lm_eval", "lm_eval_difference_to_base"),
    *("peak_allocated_gib", "tokens_per_second", "seeds", "status"),
)
_FORMS: dict[str, Format] = {"md": "markdown", "csv": "csv", "json": "json"}
_LEAST_PAUSE_S = 5.0
_DPI = 150


class Overview:
    """Keeps a parent run's table, description and figures up to date.

    Args:
        tracker: an open tracker.
        run_id: the parent run.
        question: what the sweep asks.
        num_trials: how many trials it has.
        folder: a local folder for the files; must exist until the tracker is closed.
    """

    def __init__(self, tracker: Tracker, run_id: str, question: str, *, num_trials: int, folder: Path) -> None:
        self._tracker = tracker
        self._run_id = run_id
        self._question = question
        self._num_trials = num_trials
        self.folder = folder
        self._not_before = 0.0

    def show(self, records: Collection[RunRecord], whole: Whole | None = None) -> None:
        """As :meth:`update`, unless that was done a moment ago."""
        if time.monotonic() >= self._not_before:
            self.update(list(records), whole)

    def update(self, records: Sequence[RunRecord], whole: Whole | None = None) -> list[LeaderboardTable]:
        """Build the leaderboard, write its files and send them to MLflow.

        Args:
            records: of all trials that ended.
            whole: finds the whole record of one that is without what was measured at every step.

        Returns:
            The leaderboard's tables.
        """
        started = time.monotonic()
        tables = build_leaderboard(records)
        write_summary(records, tables, self.folder, whole)
        finished = sum(record.status == "finished" for record in records)
        stopped = sum(record.status == "stopped" for record in records)
        metrics = {"sweep/finished": float(finished), "sweep/failed": float(len(records) - finished - stopped)}
        if stopped:
            metrics["sweep/stopped_early"] = float(stopped)
        first = [row for table in tables for row in table.rows if row.rank == 1]
        alike = len({row.test for row in first}) == 1  # accuracies of other tests cannot be ranked
        best = min(first, key=lambda row: row.badness(row.ranked_by)) if alike and first else None
        if best is not None:
            metrics[f"sweep/best_{best.ranked_by}"] = abs(best.badness(best.ranked_by))
        self._tracker.show_sweep(
            self._run_id,
            note=describe_sweep(self._question, tables, done=len(records), num_trials=self._num_trials),
            table=overview_rows(tables),
            files=sorted(path for path in self.folder.iterdir() if path.is_file()),
            tags={} if best is None else {"best": f"{best.label}: {_score(best)}"},
        )
        self._tracker.log_steps(self._run_id, [(len(records), metrics)])
        # drawing takes at most a tenth of the driver's time, however many trials end at once
        self._not_before = time.monotonic() + max(_LEAST_PAUSE_S, 10 * (time.monotonic() - started))
        return tables


def write_summary(
    records: Sequence[RunRecord], tables: Sequence[LeaderboardTable], folder: Path, whole: Whole | None = None
) -> None:
    """Write the leaderboard as Markdown, CSV and JSON, and the sweep's figures, into ``folder``."""
    from grass_ray.results.figures.figure import Runs  # loads matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for suffix, form in _FORMS.items():
        write_whole(folder / f"leaderboard.{suffix}", render(tables, form))
    draw_ranking(tables, folder / "ranking.png")
    write_sweep_plots(Runs(tables, records, whole), folder)


# ------------------------------------------------------------------------------------------------ table and description


def describe_sweep(question: str, tables: Sequence[LeaderboardTable], *, done: int, num_trials: int) -> str:
    """The sweep in Markdown, at most ``LONGEST_NOTE`` characters; the lowest rows are left out if there is no room."""
    best = next((row for table in tables for row in table.rows if row.rank == 1), None)
    found = "" if best is None or len(tables) > 1 else f"{_highest(best, tables[0].rows)} "
    # MLflow folds what comes after the first lines
    head = f"{found}{done} of {num_trials} trials have ended.\n\n{markdown_text(question)}"
    longest = max((len(table.rows) for table in tables), default=0)
    for shown in range(longest, 0, -1):
        text = "\n\n".join([head, *(_table(table, shown) for table in tables)])
        if len(text) <= LONGEST_NOTE:
            return text
    return f"{head}\n\nThe ranking is too long for this place: see leaderboard.md among the artifacts."


def _highest(best: LeaderboardRow, rows: Sequence[LeaderboardRow]) -> str:
    alike = sum(row.told_apart is False for row in rows)
    others = f", not told apart from {alike} other row{'s' * (alike > 1)}" if alike else ""
    words = {"loss": "Lowest loss", "accuracy": "Highest accuracy", "lm_eval": "Highest average of lm-eval's tasks"}
    what = words[best.ranked_by]
    return f"{what}: **{markdown_text(best.label)}**, {_score(best)}{others}."


def _table(table: LeaderboardTable, shown: int) -> str:
    rows, columns = table.rows[:shown], [column for column in all_columns(table) if column.key in _DESCRIBED]
    lines = [f"**{markdown_text(table.title)}**\n", *markdown_rows(columns, rows)]
    if len(table.rows) > shown:
        lines.append(f"\n{len(table.rows) - shown} more rows in leaderboard.md")
    lines += [f"\n{markdown_text(warning)}" for warning in table.warnings]
    if any(row.told_apart is False for row in rows):
        lines.append(f"\n{NOT_TOLD}: not told apart from the first row at the 5 % level")
    if any(row.to_full is not None and not row.to_full.covers_training for row in rows):
        lines.append("\nvs full speaks of these runs alone where a side has one seed")
    if any(row.pareto for row in rows):
        lines.append(f"\n{markdown_text(table.pareto_note)}")
    return "\n".join(lines)


def _score(row: LeaderboardRow) -> str:
    if row.ranked_by == "loss":
        return f"{nats(row.loss)} nats"
    if row.ranked_by == "lm_eval":
        return f"{percent(row.lm_eval)} %"
    known = row.accuracy_low is not None and row.accuracy_high is not None
    return percent(row.accuracy) + (f" ({limits(row.accuracy_low, row.accuracy_high)})" if known else "") + " %"


# ------------------------------------------------------------------------------------------------------------- picture


def draw_ranking(tables: Sequence[LeaderboardTable], path: Path) -> bool:
    """Draw accuracies with their intervals, or losses, one panel per table. Returns False if nothing is ranked."""
    from matplotlib.figure import Figure

    panels = [(table, rows) for table in tables if (rows := [row for row in table.rows if row.rank is not None])]
    if not panels:
        return False
    heights = [min(len(rows), MOST_BARS) * 0.32 + 1.1 for _, rows in panels]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    grid: Any = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (table, rows) in zip(grid[:, 0], panels, strict=True):
        _draw_bars(axes, table, rows[:MOST_BARS])
        if len(rows) > MOST_BARS:
            axes.set_xlabel(f"{axes.get_xlabel()}; the best {MOST_BARS} of {len(rows)} rows")
    path.unlink(missing_ok=True)  # a link is replaced, not followed
    figure.savefig(path, dpi=_DPI)
    return True


def _draw_bars(axes: Any, table: LeaderboardTable, rows: Sequence[LeaderboardRow]) -> None:
    for place, row in enumerate(rows):
        score, low, high, text = _bar(row)
        axes.barh(place, score, color=style_of(row.method).colour, height=0.66, alpha=0.85)
        spread = [[max(0.0, score - low)], [max(0.0, high - score)]]
        axes.errorbar(score, place, xerr=spread, color="#333333", linewidth=1, capsize=2.5)
        axes.annotate(
            text, (max(high, score), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_yticks(range(len(rows)), [f"{RANK.cell(row)}  {METHOD.cell(row)}" for row in rows])
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    head, _, tail = table.title.partition(" (")
    axes.set_title(f"{head}\n({tail}" if tail else head, fontsize=9.5, loc="left")
    legend = f"; {NOT_TOLD}: not told apart from the first row" if any(row.told_apart is False for row in rows) else ""
    what = {
        "accuracy": "accuracy (%), 95 % interval over questions",
        "loss": "loss (nats), lower is better; ± standard deviation over seeds",
        "lm_eval": "average of lm-eval's tasks (%); ± standard deviation over seeds",
    }[table.metric]
    axes.set_xlabel(f"{what}{legend}", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _bar(row: LeaderboardRow) -> tuple[float, float, float, str]:
    """A row's score, its limits and its text: accuracy in percent with its interval, or loss and the seeds' spread."""
    if row.ranked_by == "loss":
        loss, spread = row.loss or 0.0, row.loss_std or 0.0
        return loss, loss - spread, loss + spread, nats(loss)
    if row.ranked_by == "lm_eval":
        mean, spread = 100 * (row.lm_eval or 0.0), 100 * (row.lm_eval_std or 0.0)
        return mean, mean - spread, mean + spread, percent(row.lm_eval)
    score = 100 * (row.accuracy or 0.0)
    low, high = (score if bound is None else 100 * bound for bound in (row.accuracy_low, row.accuracy_high))
    return score, low, high, percent(row.accuracy)
