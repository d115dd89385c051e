"""Leaderboards as text: for a terminal, Markdown, CSV, JSON and a self-contained HTML page.

::

    print(render(build_leaderboard(records), "table"))
    page = render(tables, "html", records=records)        # with figures, which need the records
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grass_ray.config import to_json
from grass_ray.results.column import LOSS, SCOPE, Column
from grass_ray.results.columns import METHOD, RANK, WORDS, leaderboard_csv, row_values
from grass_ray.results.comparison_text import comparison_csv, comparison_notes, comparison_parts
from grass_ray.results.formats import markdown_table, markdown_text
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.record import RunRecord
from grass_ray.results.sweep_comparison import SweepComparison
from grass_ray.results.table_columns import (
    all_columns,
    detail_columns,
    lm_eval_columns,
    loss_columns,
    result_columns,
    task_columns,
)

Format = Literal["table", "markdown", "csv", "json", "html"]

_EMPTY = "no runs yet"
_WORDY = 16  # characters that a column of words has in a narrow terminal


def render(
    tables: Sequence[LeaderboardTable],
    format: Format = "table",
    width: int = 100,
    records: Sequence[RunRecord] = (),
) -> str:
    """The tables as text.

    Args:
        tables: what :func:`grass_ray.results.leaderboard.build_leaderboard` made.
        format: ``json`` is one flat list of rows, ``csv`` has one line per row and columns per task.
        width: of the terminal in characters, for ``table``.
        records: what the tables were built from; ``html`` draws its figures from them.
    """
    if format == "json":
        rows = [row_values(row) for table in tables for row in table.rows]
        return to_json(rows, indent=2)
    if format == "csv":
        return leaderboard_csv(tables)
    if format == "html":
        from grass_ray.results.page.page import render_page  # loads matplotlib

        return render_page(tables, records)
    if not tables:
        return _EMPTY
    return "\n\n".join(_markdown(table) if format == "markdown" else _terminal(table, width) for table in tables)


def render_comparison(comparison: SweepComparison, format: Format = "table", width: int = 100) -> str:
    """Two sweeps side by side as text; ``csv`` and ``json`` hold every question answered differently."""
    if format == "json":
        return to_json(comparison.to_dict(), indent=2)
    if format == "csv":
        return comparison_csv(comparison)
    parts, notes = comparison_parts(comparison), comparison_notes(comparison)
    title = f"{comparison.first} against {comparison.second}"
    if format == "html":
        from grass_ray.results.page.page import render_comparison_page

        return render_comparison_page(title, parts, notes)
    return render_cells(title, parts, notes, format, width=width)


def render_cells(
    title: str,
    parts: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
    format: Literal["table", "markdown"],
    *,
    width: int,
) -> str:
    """Tables of one title, each its headings and cells, and what a reader must know of them."""
    if format == "markdown":
        lines = [f"### {markdown_text(title)}", ""]
        for names, cells in parts:
            lines += [*markdown_table(names, cells, WORDS), ""]
        return "\n".join([*lines, *(f"- {markdown_text(note)}" for note in notes)])
    grids = [grid for names, cells in parts if cells for grid in _grids(names, cells, width, repeated=1)]
    return _print(title, grids, notes, width)


# ----------------------------------------------------------------------------------------------------------- formats


def _terminal(table: LeaderboardTable, width: int) -> str:
    scored = [row for row in table.rows if row.scored]
    results, details = result_columns(table), detail_columns(table)
    losses: list[Column] = []
    if table.metric == "accuracy" and not _fits(results, table.rows, width):  # losses get a table of their own
        losses = loss_columns(table)
        results = [column for column in results if column not in losses or not LOSS <= column.place < SCOPE]
    parts: list[tuple[list[Column], Sequence[LeaderboardRow]]] = [([*results, *details], table.rows)]
    if _fits(results, table.rows, width):
        parts = [(results, table.rows), ([RANK, METHOD, *details], table.rows)]
    if losses:
        parts.insert(1, (losses, [row for row in table.rows if row.loss is not None]))
    if len(table.tasks) > 1 and scored:
        parts.append(([RANK, METHOD, *task_columns(table)], scored))
    if benchmarks := lm_eval_columns(table):
        parts.append((benchmarks, [row for row in table.rows if row.lm_eval_tasks]))
    grids = []
    for columns, rows in parts:
        grids += _grids([column.name for column in columns], _cells(columns, rows), width, repeated=2)
    return _print(table.title, grids, table.reasons + table.all_notes, width)


def _cells(columns: Sequence[Column], rows: Sequence[LeaderboardRow]) -> list[list[str]]:
    return [[column.cell(row) for column in columns] for row in rows]


def _fits(columns: Sequence[Column], rows: Sequence[LeaderboardRow], width: int) -> bool:
    return _total(_widths([column.name for column in columns], _cells(columns, rows))) <= width


def _print(title: str, grids: Sequence[Table], lines: Sequence[str], width: int) -> str:
    out = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with out.capture() as capture:
        out.print(Text(title))
        for grid in grids:
            out.print()
            out.print(grid)
        out.print()
        for line in lines:
            out.print(Text(line))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _grids(names: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, repeated: int) -> list[Table]:
    """The table, or several below each other where numbers or words would be cut.

    Args:
        names: of the columns.
        rows: their cells.
        width: of the terminal in characters.
        repeated: how many columns, from the first, stand in each table.
    """
    whole, words = _widths(names, rows), [name in WORDS for name in names]
    if _total(whole) <= width:
        return [_grid(names, rows, whole)]
    broken = [
        [cell.replace(" ", "\n") if word else cell for cell, word in zip(row, words, strict=True)] for row in rows
    ]
    widths = [min(own, max(least, _WORDY)) for own, least in zip(whole, _widths(names, broken), strict=True)]
    taken = len(names)
    while taken > repeated + 1 and _total(widths[:taken]) > width:
        taken -= 1
    room = width - _total(widths[:taken])
    for place in range(taken):  # what is left goes to the columns of words, from the first
        more = min(whole[place] - widths[place], max(room, 0))
        widths[place] += more
        room -= more
    grid = _grid(names[:taken], [row[:taken] for row in rows], widths[:taken], fixed=True)
    if taken == len(names):
        return [grid]
    others = [[*row[:repeated], *row[taken:]] for row in rows]
    return [grid, *_grids([*names[:repeated], *names[taken:]], others, width, repeated=repeated)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _widths(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Characters of each column with every line of a cell as it is."""
    columns = zip(map(_heading, names), *rows, strict=True)
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]


def _heading(name: str) -> str:
    broken = name.startswith(("vs ", "p ", "train ", "loss vs ", "lm-eval vs ")) or name.endswith("GiB")
    return name.replace(" ", "\n") if broken else name


def _grid(names: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], *, fixed: bool = False) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, width in zip(names, widths, strict=True):
        side: Literal["left", "right"] = "left" if name in WORDS else "right"
        own = width if fixed else None
        grid.add_column(Text(_heading(name)), justify=side, overflow="fold", no_wrap=name not in WORDS, width=own)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def markdown_rows(columns: Sequence[Column], rows: Sequence[LeaderboardRow]) -> list[str]:
    """The lines of a Markdown table with these columns."""
    return markdown_table([column.name for column in columns], _cells(columns, rows), WORDS)


def _markdown(table: LeaderboardTable) -> str:
    lines = [f"### {markdown_text(table.title)}", "", *markdown_rows(all_columns(table), table.rows)]
    lines += ["", *(f"- {markdown_text(note)}" for note in table.reasons + table.all_notes)]
    return "\n".join(lines).rstrip()
