"""Leaderboards as text: for a terminal, Markdown, CSV, JSON and a self-contained HTML page.

::

    print(render(build_leaderboard(records), "table"))
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grass_ray.results.leaderboard import LeaderboardRow, LeaderboardTable

Format = Literal["table", "markdown", "csv", "json", "html"]

_Column = tuple[str, Callable[[LeaderboardRow], str]]
_EMPTY = "no runs yet"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #1b1b1b }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #444 }
th:nth-child(2), td:nth-child(2), th:last-child, td:last-child { text-align: left }
tr.unranked { color: #777 }
tr.pareto td:nth-child(2) { font-weight: 600 }
p.note { color: #555; margin: .3rem 0 }
"""


def render(tables: Sequence[LeaderboardTable], format: Format = "table", width: int = 100) -> str:
    """The tables as text.

    Args:
        tables: what :func:`grass_ray.results.leaderboard.build_leaderboard` made.
        format: ``json`` is one flat list of rows, ``csv`` one line a row with a column a task.
        width: columns of a terminal, for ``table``.
    """
    if format == "json":
        rows = [row.to_dict() for table in tables for row in table.rows]
        return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False)
    if format == "csv":
        return _csv(tables)
    if format == "html":
        return _html(tables)
    if not tables:
        return _EMPTY
    return "\n\n".join(_markdown(table) if format == "markdown" else _terminal(table, width) for table in tables)


# ------------------------------------------------------------------------------------------------------------- cells


def _number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _significant(value: float | None) -> str:
    """Gibibytes with enough digits for small models too."""
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _interval(row: LeaderboardRow) -> str:
    if row.accuracy_low is None or row.accuracy_high is None:
        return "-"
    return f"{100 * row.accuracy_low:.1f}-{100 * row.accuracy_high:.1f}"


def _accuracy(row: LeaderboardRow) -> str:
    spread = "" if row.accuracy_std is None else f" ±{100 * row.accuracy_std:.1f}"
    return _number(row.accuracy, 1, 100) + spread


def _difference(row: LeaderboardRow) -> str:
    return "-" if row.difference_to_full is None else f"{100 * row.difference_to_full:+.1f}"


_NUMBER: _Column = ("#", lambda row: "-" if row.rank is None else str(row.rank))
_METHOD: _Column = ("method", lambda row: row.label + (" *" if row.pareto else ""))
_RESULTS: list[_Column] = [
    _NUMBER,
    _METHOD,
    ("acc. %", _accuracy),
    ("95 %", _interval),
    ("vs full", _difference),
    ("p", lambda row: _p(row.p_adjusted)),
    ("alloc. GiB", lambda row: _significant(row.peak_allocated_gib)),
    ("tok/s", lambda row: _number(row.tokens_per_second, 0)),
    ("min", lambda row: _number(row.train_s, 1, 1 / 60)),
    ("seeds", lambda row: str(len(row.seeds))),
]
_DETAILS: list[_Column] = [
    ("resrv. GiB", lambda row: _significant(row.peak_reserved_gib)),
    ("pinned GiB", lambda row: _significant(row.host_pinned_gib)),
    ("train %", lambda row: _number(row.trainable_share, 1, 100)),
    ("commit", lambda row: row.commit or "-"),
    ("date", lambda row: row.date),
]
_STATUS: _Column = ("status", lambda row: row.status.replace("_", " "))
_ALWAYS = ("#", "method", "acc. %", "status")
_WORDS = ("method", "commit", "status")


def _task_columns(table: LeaderboardTable) -> list[_Column]:
    def column(task: str) -> _Column:
        return task, lambda row: _number(row.tasks.get(task), 1, 100)

    return [column(task) for task in table.tasks] if len(table.tasks) > 1 else []


def _all_columns(table: LeaderboardTable) -> list[_Column]:
    return [*_used([*_RESULTS, *_DETAILS], table.rows), *_task_columns(table), _STATUS]


def _used(columns: Sequence[_Column], rows: Sequence[LeaderboardRow]) -> list[_Column]:
    """The columns that say anything, with number, method and accuracy always there."""
    return [(name, cell) for name, cell in columns if name in _ALWAYS or any(cell(row) != "-" for row in rows)]


def _notes(table: LeaderboardTable) -> list[str]:
    notes = list(table.notes)
    if any(row.pareto for row in table.rows):
        notes.append("* no other row has both more accuracy and less peak memory")
    if any(row.accuracy_std is not None for row in table.rows):
        notes.append("±: standard deviation over seeds; the 95 % interval is over the questions")
    return notes


def _reasons(table: LeaderboardTable) -> list[str]:
    """What became of the rows that are not ranked."""
    lines = []
    for row in table.rows:
        if row.rank is None:
            reason = " ".join((row.failure or "").split())
            lines.append(f"{row.label}: {row.status.replace('_', ' ')}" + (f" - {reason}" if reason else ""))
    return lines


# ----------------------------------------------------------------------------------------------------------- formats


def _terminal(table: LeaderboardTable, width: int) -> str:
    out = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    scored = [row for row in table.rows if row.tasks]
    grids = [
        (_used([*_RESULTS, _STATUS], table.rows), table.rows),
        ([_NUMBER, _METHOD, *_used(_DETAILS, table.rows)], table.rows),
    ]
    if len(table.tasks) > 1 and scored:
        grids.append(([_NUMBER, _METHOD, *_task_columns(table)], tuple(scored)))
    with out.capture() as capture:
        out.print(Text(table.title))
        for columns, rows in grids:
            out.print()
            out.print(_grid(columns, rows))
        out.print()
        for line in _reasons(table) + _notes(table):
            out.print(Text(line))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _grid(columns: Sequence[_Column], rows: Sequence[LeaderboardRow]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, _ in columns:
        side: Literal["left", "right"] = "left" if name in _WORDS else "right"
        header = Text(name.replace(" ", "\n") if name in ("vs full", "train %") or name.endswith("GiB") else name)
        grid.add_column(header, justify=side, overflow="fold", no_wrap=name not in _WORDS)
    for row in rows:
        grid.add_row(*(Text(cell(row)) for _, cell in columns))
    return grid


def _markdown(table: LeaderboardTable) -> str:
    columns = _all_columns(table)
    lines = [f"### {_markdown_text(table.title)}", ""]
    lines.append("| " + " | ".join(_markdown_text(name) for name, _ in columns) + " |")
    lines.append("|" + "|".join(" --- " if name in _WORDS else " ---: " for name, _ in columns) + "|")
    lines += ["| " + " | ".join(_markdown_text(cell(row)) for _, cell in columns) + " |" for row in table.rows]
    lines += ["", *(f"- {_markdown_text(note)}" for note in _reasons(table) + _notes(table))]
    return "\n".join(lines).rstrip()


def _markdown_text(text: str) -> str:
    for mark in "\\|*_`#[":
        text = text.replace(mark, "\\" + mark)
    return escape(" ".join(text.split()), quote=False)


def _csv(tables: Sequence[LeaderboardTable]) -> str:
    rows = [row.to_dict() for table in tables for row in table.rows]
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    lines: list[dict[str, Any]] = []
    for row in rows:
        line = {key: value for key, value in row.items() if key != "tasks"}
        line["seeds"], line["run_ids"] = " ".join(map(str, row["seeds"])), " ".join(row["run_ids"])
        lines.append(line | {f"eval/{task}/accuracy": row["tasks"].get(task) for task in tasks})
    if not lines:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue().rstrip("\n")


def _html(tables: Sequence[LeaderboardTable]) -> str:
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>']
    parts += [f"<style>{_STYLE}</style></head><body><h1>Leaderboard</h1>"]
    for table in tables:
        columns = _all_columns(table)
        parts.append(f"<h2>{escape(table.title)}</h2><table><thead><tr>")
        parts += [f"<th>{escape(name)}</th>" for name, _ in columns]
        parts.append("</tr></thead><tbody>")
        for row in table.rows:
            kind = "unranked" if row.rank is None else "pareto" if row.pareto else "ranked"
            cells = "".join(f"<td>{escape(cell(row))}</td>" for _, cell in columns)
            parts.append(f'<tr class="{kind}">{cells}</tr>')
        parts.append("</tbody></table>")
        parts += [f'<p class="note">{escape(line)}</p>' for line in _reasons(table) + _notes(table)]
    if not tables:
        parts.append(f"<p>{_EMPTY}</p>")
    return "\n".join([*parts, "</body></html>"])
