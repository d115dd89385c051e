"""Leaderboards as text: for a terminal, Markdown, CSV, JSON and a self-contained HTML page.

::

    print(render(build_leaderboard(records), "table"))
    page = render(tables, "html", records=records)        # with pictures, which need the records
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
from grass_ray.results.column import Column
from grass_ray.results.columns import (
    METHOD,
    RANK,
    WORDS,
    all_columns,
    detail_columns,
    leaderboard_csv,
    result_columns,
    row_values,
    task_columns,
)
from grass_ray.results.formats import markdown_table, markdown_text
from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable
from grass_ray.results.record import RunRecord
from grass_ray.results.sweep_comparison import (
    COMPARISON_HEADER,
    SweepComparison,
    comparison_cells,
    comparison_csv,
    comparison_notes,
)

Format = Literal["table", "markdown", "csv", "json", "html"]

_EMPTY = "no runs yet"


def render(
    tables: Sequence[LeaderboardTable],
    format: Format = "table",
    width: int = 100,
    records: Sequence[RunRecord] = (),
) -> str:
    """The tables as text.

    Args:
        tables: what :func:`grass_ray.results.leaderboard.build_leaderboard` made.
        format: ``json`` is one flat list of rows, ``csv`` one line a row with a column a task.
        width: columns of a terminal, for ``table``.
        records: what the tables were made of; ``html`` draws its pictures from them.
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
    cells, notes = comparison_cells(comparison), comparison_notes(comparison)
    title = f"{comparison.first} against {comparison.second}"
    if format == "html":
        from grass_ray.results.page.page import render_comparison_page

        return render_comparison_page(title, COMPARISON_HEADER, cells, notes)
    if format == "markdown":
        lines = [f"### {markdown_text(title)}", "", *markdown_table(COMPARISON_HEADER, cells, WORDS), ""]
        return "\n".join([*lines, *(f"- {markdown_text(note)}" for note in notes)])
    return _print(title, [_grid(COMPARISON_HEADER, cells)] if cells else [], notes, width)


# ----------------------------------------------------------------------------------------------------------- formats


def _terminal(table: LeaderboardTable, width: int) -> str:
    scored = [row for row in table.rows if row.tasks]
    parts: list[tuple[list[Column], Sequence[LeaderboardRow]]] = [(result_columns(table), table.rows)]
    parts.append(([RANK, METHOD, *detail_columns(table)], table.rows))
    if len(table.tasks) > 1 and scored:
        parts.append(([RANK, METHOD, *task_columns(table)], scored))
    grids = [
        _grid([column.name for column in columns], [[column.cell(row) for column in columns] for row in rows])
        for columns, rows in parts
    ]
    return _print(table.title, grids, table.reasons + table.all_notes, width)


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


def _grid(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in names:
        side: Literal["left", "right"] = "left" if name in WORDS else "right"
        broken = name.startswith(("vs ", "p ", "train ")) or name.endswith("GiB")
        header = Text(name.replace(" ", "\n") if broken else name)
        grid.add_column(header, justify=side, overflow="fold", no_wrap=name not in WORDS)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def markdown_rows(columns: Sequence[Column], rows: Sequence[LeaderboardRow]) -> list[str]:
    """The lines of a Markdown table with these columns."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    return markdown_table([column.name for column in columns], cells, WORDS)


def _markdown(table: LeaderboardTable) -> str:
    lines = [f"### {markdown_text(table.title)}", "", *markdown_rows(all_columns(table), table.rows)]
    lines += ["", *(f"- {markdown_text(note)}" for note in table.reasons + table.all_notes)]
    return "\n".join(lines).rstrip()
