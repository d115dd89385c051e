"""Two sweeps side by side as text: headings and cells, notes, and the questions that were answered differently.

::

    for names, cells in comparison_parts(comparison):      # the table, and that of lm-eval's own tasks
        print(names, cells)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from grass_ray.results.formats import limits, nats, nats_more, p_text, percent, points, scope, times
from grass_ray.results.notes import scope_notes
from grass_ray.results.paired import fact
from grass_ray.results.sweep_comparison import SHOWN_SETTINGS, BenchmarkPair, ComparisonRow, SweepComparison

_COLUMNS: tuple[tuple[str, Callable[[ComparisonRow], str]], ...] = (
    ("method", lambda row: row.label),
    ("A %", lambda row: percent(row.first)),
    ("B %", lambda row: percent(row.second)),
    ("B - A", lambda row: points(fact(row.comparison, "value"))),
    ("95 %", lambda row: limits(fact(row.comparison, "low"), fact(row.comparison, "high"), points)),
    ("p", lambda row: p_text(fact(row.comparison, "p_adjusted"))),
    ("loss A", lambda row: nats(row.first_loss)),
    ("loss B", lambda row: nats(row.second_loss)),
    ("loss B - A", lambda row: nats_more(fact(row.by_loss, "value"))),
    ("loss 95 %", lambda row: limits(fact(row.by_loss, "low"), fact(row.by_loss, "high"), nats_more)),
    ("p loss", lambda row: p_text(fact(row.by_loss, "p_adjusted"))),
    ("p for", lambda row: scope(fact(row.comparison or row.by_loss, "covers_training"))),
    ("only A", lambda row: str(row.only_first)),
    ("only B", lambda row: str(row.only_second)),
    ("asked", lambda row: str(row.questions)),
    ("memory", lambda row: times(row.memory_ratio)),
    ("speed", lambda row: times(row.speed_ratio)),
)


# columns that are left out where no row of either side has a value of that kind
_OF_ACCURACY = ("A %", "B %", "B - A", "95 %", "p")
_BENCHMARKS = ("method", "A", "B", "B - A", "95 %", "p", "p for")


def comparison_parts(comparison: SweepComparison) -> list[tuple[list[str], list[list[str]]]]:
    """Headings and cells of the table, and of one with lm-eval's own tasks if both sides have some."""
    rows = comparison.rows
    losses = any(row.by_loss is not None for row in rows)
    accuracy = any(row.comparison is not None for row in rows) or not any(row.by_loss or row.lm_eval for row in rows)
    shown = {name for name, _ in _COLUMNS if (losses or "loss" not in name) and (accuracy or name not in _OF_ACCURACY)}
    columns = [(name, cell) for name, cell in _COLUMNS if name in shown]
    several = len({(row.model, row.suite) for row in rows}) > 1

    def label(row: ComparisonRow) -> str:
        return f"{row.label}, {row.model} on {row.suite}" if several else row.label

    cells = [[label(row) if name == "method" else cell(row) for name, cell in columns] for row in rows]
    parts = [([name for name, _ in columns], cells)]
    benchmarks = [line for row in rows for line in _benchmark_cells(row, label(row))]
    return [*parts, (list(_BENCHMARKS), benchmarks)] if benchmarks else parts


def _benchmark_cells(row: ComparisonRow, label: str) -> list[list[str]]:
    """A line for each task of lm-eval, and their average where there are several."""
    found = {f"{label}: {task} ({own.metric})": own for task, own in row.lm_eval_tasks.items()}
    if len(row.lm_eval_tasks) > 1 and row.lm_eval is not None:
        found = {f"{label}: average of shares": row.lm_eval, **found}
    return [[name, *_pair_cells(own)] for name, own in found.items()]


def _pair_cells(own: BenchmarkPair) -> list[str]:
    form, more = (percent, points) if own.is_share else (nats, nats_more)
    found = own.comparison
    return [
        form(own.first),
        form(own.second),
        more(own.second - own.first),
        limits(fact(found, "low"), fact(found, "high"), more),
        p_text(fact(found, "p_adjusted")),
        scope(fact(found, "covers_training")),
    ]


def comparison_notes(comparison: SweepComparison) -> list[str]:
    """What a reader must know, one sentence each."""
    notes = [f"A: {comparison.first}; B: {comparison.second}; only A, only B: questions that side alone got right"]
    compared = [row.comparison for row in comparison.rows if row.comparison is not None]
    losses = [row.by_loss for row in comparison.rows if row.by_loss is not None]
    benchmarks = [own.comparison for row in comparison.rows for own in row.lm_eval_tasks.values() if own.comparison]
    for name, found in (("p", compared), ("p loss", losses), ("p of lm-eval's tasks", benchmarks)):
        if tests := sorted({one.test for one in found}):
            notes.append(f"{name}: {' or '.join(tests)} on the same questions, Benjamini-Hochberg over this table")
    if benchmarks:
        notes.append("questions of lm-eval's tasks are among those of only A, only B and asked")
    notes += scope_notes(one.covers_training for one in compared + losses + benchmarks)
    for row in comparison.rows:
        if row.settings:
            more = len(row.settings) - SHOWN_SETTINGS
            shown = ", ".join(row.settings[:SHOWN_SETTINGS]) + (f" and {more} more" if more > 0 else "")
            notes.append(f"{row.label} is not configured alike: {shown}")
        if (row.first_status, row.second_status) != ("finished", "finished"):
            notes.append(f"{row.label}: A {row.first_status}, B {row.second_status}".replace("_", " "))
    for name, labels in (("A", comparison.only_in_first), ("B", comparison.only_in_second)):
        if labels:
            notes.append(f"only in {name}: {', '.join(labels)}")
    return notes + comparison.tested_otherwise


def comparison_csv(comparison: SweepComparison) -> str:
    """One line per question that the two sides answered differently."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "model", "suite", "task", "example_id", "first", "second"])
    for row in comparison.rows:
        writer.writerows(
            [row.label, row.model, row.suite, change.task, change.example_id, change.first, change.second]
            for change in row.changes
        )
    return out.getvalue().rstrip("\n")
