"""What a leaderboard could have seen and what would see more, as text: ``grass-ray power``.

::

    wish = Wish(difference=0.02, seeds=(3, 5))
    print(render_power([report for table in tables for report in reports(table, ("loss",), wish)], "table"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any, Literal

from grass_ray.config import to_json
from grass_ray.results.formats import NONE, nats, nats_more, percent, points
from grass_ray.results.leaderboard import LeaderboardTable
from grass_ray.results.paired import LEVEL, Metric, fact
from grass_ray.results.power import POWER, Design, Spread, questions_needed, seeds_needed
from grass_ray.results.rendering import render_cells
from grass_ray.results.rows import LeaderboardRow


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be seen: a difference, with so many seeds a row or questions a task, how surely."""

    difference: float | None = None
    seeds: tuple[int, ...] = (2, 3, 5, 8, 12, 20)
    questions: int | None = None
    power: float = POWER
    level: float = LEVEL


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row's differences to ``full`` and to the best row, and the smallest that each comparison could have seen."""

    label: str
    seeds: int
    difference_to_full: float | None
    detectable_to_full: float | None
    difference_to_best: float | None
    detectable_to_best: float | None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Seeds of each of two rows (None: one run each, and nothing said of others), and what they see.

    ``detectable`` is the smallest difference that they see with the report's questions, ``questions_needed`` the
    questions of each task with which they see the wished difference; None if a million are too few.
    """

    seeds: int | None
    detectable: float | None
    questions_needed: int | None


@dataclass(frozen=True, kw_only=True)
class PowerReport:
    """Of one table and metric; without rows it is of figures given by hand.

    ``questions`` is the number of questions of a task, and ``seeds_needed`` that of seeds with which so many see the
    wished difference.
    """

    title: str
    metric: Metric
    spread: Spread | None
    tasks: int
    questions: int | None
    wish: Wish
    rows: tuple[Compared, ...]
    plan: tuple[Planned, ...]
    seeds_needed: int | None


def reports(
    table: LeaderboardTable, metrics: Sequence[Metric], wish: Wish, *, given: Callable[[Spread], Spread] = replace
) -> list[PowerReport]:
    """One report for each metric by which rows of the table were compared.

    Args:
        table: of the leaderboard.
        metrics: those wanted.
        wish: what is to be seen.
        given: puts figures given by hand in the place of those of the records.
    """
    found = []
    for metric in metrics:
        compared = [_compared(row, metric) for row in table.rows if row.rank is not None]
        sizes = [pair.questions for row in table.rows for pair in row.compared(metric) if pair is not None]
        spread = table.spreads.get(metric)
        if sizes:
            # with as many of each task the questions would add as much to the variance
            usual = round(len(sizes[0]) / sum(1 / n for n, _ in sizes[0]))
            spread = None if spread is None else given(spread)
            found.append(plan(table.title, metric, spread, len(sizes[0]), usual, wish, compared))
    return found


def plan(
    title: str,
    metric: Metric,
    spread: Spread | None,
    tasks: int,
    questions: int | None,
    wish: Wish,
    rows: Sequence[Compared] = (),
) -> PowerReport:
    """A report: what the wished seeds see with these questions of each task, and what the wished difference needs."""
    questions = wish.questions or questions
    sizes: Sequence[int | None] = [None] if spread is None or spread.seeds is None else wish.seeds
    lines, fewest = [], None
    if spread is not None:
        lines = [_planned(seeds, spread, tasks, questions, wish) for seeds in sizes]
        if wish.difference is not None and questions is not None and spread.seeds is not None:
            fewest = seeds_needed(
                wish.difference, spread, questions=questions, tasks=tasks, wanted=wish.power, level=wish.level
            )
    return PowerReport(
        title=title,
        metric=metric,
        spread=spread,
        tasks=tasks,
        questions=questions,
        wish=wish,
        rows=tuple(rows),
        plan=tuple(lines),
        seeds_needed=fewest,
    )


def _planned(seeds: int | None, spread: Spread, tasks: int, questions: int | None, wish: Wish) -> Planned:
    detectable = needed = None
    if questions is not None:
        design = Design(seeds=seeds, questions=questions, tasks=tasks)
        detectable = design.smallest(spread, wanted=wish.power, level=wish.level)
    if wish.difference is not None:
        needed = questions_needed(
            wish.difference, spread, seeds=seeds, tasks=tasks, wanted=wish.power, level=wish.level
        )
    return Planned(seeds=seeds, detectable=detectable, questions_needed=needed)


def _compared(row: LeaderboardRow, metric: Metric) -> Compared:
    full, best = row.compared(metric)
    return Compared(
        label=row.label,
        seeds=len(row.seeds),
        difference_to_full=fact(full, "value"),
        detectable_to_full=fact(full, "detectable"),
        difference_to_best=fact(best, "value"),
        detectable_to_best=fact(best, "detectable"),
    )


# ------------------------------------------------------------------------------------------------------------- as text


def render_power(
    found: Sequence[PowerReport], format: Literal["table", "markdown", "json"] = "table", *, width: int = 100
) -> str:
    """The reports as text."""
    if format == "json":
        return to_json([_plain(report) for report in found], indent=2)
    if not found:
        return "no rows that can be compared"
    return "\n\n".join(
        render_cells(f"{report.title}: {report.metric}", _parts(report), _notes(report), format, width=width)
        for report in found
    )


def _plain(report: PowerReport) -> dict[str, Any]:
    values = asdict(report)
    wish = values.pop("wish")
    return values | {name: wish[name] for name in ("difference", "power", "level")}


Form = Callable[[float | None], str]


def _forms(metric: Metric) -> tuple[Form, Form, str]:
    """How a difference, and a size without a sign, are written, and their unit."""
    return (nats_more, nats, "nats") if metric == "loss" else (points, percent, "percentage points")


def _parts(report: PowerReport) -> list[tuple[Sequence[str], list[list[str]]]]:
    more, plain, _ = _forms(report.metric)
    seen: list[tuple[str, Callable[[Compared], str]]] = [
        ("method", lambda row: row.label),
        ("seeds", lambda row: str(row.seeds)),
        ("vs full", lambda row: more(row.difference_to_full)),
        ("could see", lambda row: plain(row.detectable_to_full)),
        ("vs best", lambda row: more(row.difference_to_best)),
        ("could see best", lambda row: plain(row.detectable_to_best)),
    ]
    seen = [(name, cell) for name, cell in seen if any(cell(row) != NONE for row in report.rows)]
    planned: list[tuple[str, Callable[[Planned], str]]] = [
        ("seeds a row", lambda line: "these runs" if line.seeds is None else str(line.seeds))
    ]
    if report.questions is not None:
        planned.append((f"see, with {report.questions:,} questions a task", lambda line: plain(line.detectable)))
    if report.wish.difference is not None:
        planned.append((f"questions a task that see {plain(report.wish.difference)}", _needed))
    parts: list[tuple[Sequence[str], list[list[str]]]] = []
    if report.rows:
        parts.append(([name for name, _ in seen], [[cell(row) for _, cell in seen] for row in report.rows]))
    if report.plan:
        parts.append(([name for name, _ in planned], [[cell(line) for _, cell in planned] for line in report.plan]))
    return parts


def _needed(line: Planned) -> str:
    return "more than 1,000,000" if line.questions_needed is None else f"{line.questions_needed:,}"


def _notes(report: PowerReport) -> list[str]:
    wish, spread = report.wish, report.spread
    _, plain, unit = _forms(report.metric)
    average = f", in an average over {report.tasks} tasks" if report.tasks > 1 else ""
    notes = []
    if report.rows:
        notes.append(
            f"could see, {unit}: the smallest true difference that this comparison would have found with 80 % power at "
            "p .05, not corrected for many comparisons; the spread over seeds is pooled over the rows"
        )
    if spread is None:
        return notes
    level = f"{wish.level:g}".lstrip("0")
    notes.append(
        f"see, {unit}: the smallest true difference between two rows that so many seeds each find with "
        f"{100 * wish.power:g} % power at p {level}{average}"
    )
    variances = (spread.seeds or 0.0, spread.questions, spread.disagreement)
    seeds, questions, rest = (plain(sqrt(variance)) for variance in variances)
    if spread.seeds is None:
        notes.append(
            f"standard deviation of a difference over questions, {unit}: {questions}; nothing is known of the spread "
            "over seeds, so this speaks of these runs alone; --seed-sd gives it"
        )
        return notes
    notes.append(
        f"standard deviations, {unit}: {seeds} of a training as a whole, {questions} of a difference over questions, "
        f"{rest} of one training at one question"
    )
    if wish.difference is not None and report.questions is not None:
        few = "more than 200" if report.seeds_needed is None else str(report.seeds_needed)
        notes.append(f"seeds a row that see {plain(wish.difference)} with {report.questions:,} questions a task: {few}")
    return notes
