"""Whether a result's tables say what its records do: ``leaderboard.json``, ``.csv`` and ``.md``, and tables in pages.

Rows are found by their runs, cells by the key or heading of their column. A table of an earlier version may have other
columns: those that both have are compared, and the others named.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grass_ray.config import from_json, write_whole
from grass_ray.results.leaderboard import LeaderboardTable
from grass_ray.results.overview import write_summary
from grass_ray.results.rate_search import ANSWER_LOSS, SETTINGS, RateSearch, rate_table, search_of
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.verification.check import Check
from grass_ray.results.verification.markdown import check_markdown, replace_tables

LEADERBOARD, PLAN = "leaderboard", "PLAN.md"
_MISSING = "(missing)"
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """What a result's folder holds, and the leaderboard that its records make now."""

    folder: Path
    records: Sequence[RunRecord]
    searches: Sequence[RateSearch]
    tables: Sequence[LeaderboardTable]


def _leaderboards(result: Recomputed) -> str:
    return render(result.tables, "markdown")


def _rates(result: Recomputed) -> str:
    known = any(ANSWER_LOSS in record.metrics for record in result.records)
    return "\n".join(rate_table(result.records, result.searches)) if known else ""


# the tables that a page may have, as Markdown; those of another kind are one more function
MADE_OF_RECORDS: tuple[Callable[[Recomputed], str], ...] = (_leaderboards, _rates)


def check_tables(result: Recomputed) -> list[Check]:
    """Compare every table in a result's folder that is made of its records."""
    checks = []
    if (path := result.folder / f"{LEADERBOARD}.json").is_file():
        checks.append(_check_rows(path, _json_rows, render(result.tables, "json")))
    if (path := result.folder / f"{LEADERBOARD}.csv").is_file():
        checks.append(_check_rows(path, _csv_rows, render(result.tables, "csv")))
    for path in _pages(result.folder):
        whole = path.name == f"{LEADERBOARD}.md"
        checks.append(check_markdown(path, _leaderboards(result) if whole else _all_tables(result), whole=whole))
    if result.searches:
        checks.append(_check_rates(result))
    return checks


def rewrite_tables(result: Recomputed) -> None:
    """Write the leaderboard and the pictures anew, and replace the tables in the folder's pages."""
    write_summary(result.records, result.tables, result.folder)
    for path in _pages(result.folder):
        if path.name != f"{LEADERBOARD}.md":
            text = replace_tables(path.read_text(encoding="utf-8"), _all_tables(result))
            write_whole(path, text)


def _pages(folder: Path) -> list[Path]:
    """A plan was written before there was anything to make its tables of."""
    return [path for path in sorted(folder.glob("*.md")) if path.name != PLAN]


def _all_tables(result: Recomputed) -> str:
    return "\n\n".join(make(result) for make in MADE_OF_RECORDS)


# ------------------------------------------------------------------------------------------------------- JSON and CSV


def _json_rows(text: str) -> list[Row]:
    rows: list[Row] = from_json(text)
    return rows


def _csv_rows(text: str) -> list[Row]:
    return [{key: _value(key, value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _value(key: str, text: str) -> Any:
    if key == "run_ids":
        return text.split()
    try:
        return float(text)
    except ValueError:
        return text


def _check_rows(path: Path, read: Callable[[str], list[Row]], text: str) -> Check:
    check, made = Check(what=path.name), read(text)
    try:
        given = read(path.read_text(encoding="utf-8"))
        names = [_label(row) for row in given]
    except (AttributeError, ValueError) as error:
        check.disagreements.append(f"cannot be read: {error}")
        return check
    by_run = {run: row for row in made for run in row["run_ids"]}
    columns, expected = _keys(given), _keys(made)
    left = list(made)
    for label, row in zip(names, given, strict=True):
        runs = list(row.get("run_ids") or ())
        for run in runs:
            if run not in by_run:
                check.disagreements.append(f"{label}: there is no record of run {run}")
        partner = next((by_run[run] for run in runs if run in by_run), None)
        if partner is None:
            partner = next((other for other in left if not runs and _label(other) == label), None)
        if partner is None or partner not in left:
            check.disagreements.append(f"{label}: no such row can be made of the records")
            continue
        left.remove(partner)
        for key in columns:
            if key in expected:
                check.same(f"{label}, {key}", row.get(key, _MISSING), partner.get(key, _MISSING))
    check.disagreements += [f"{_label(row)}: the records have this row, the table has not" for row in left]
    order = [row.get("run_ids") for row in given]
    if not check.disagreements and order != [row["run_ids"] for row in made]:
        check.disagreements.append("rows are in another order")
    if missing := [key for key in expected if key not in columns]:
        check.remarks.append(f"{path.name}: columns that are made now are missing: {', '.join(missing)}")
    if unknown := [key for key in columns if key not in expected]:
        check.remarks.append(f"{path.name}: columns that are not made any more: {', '.join(unknown)}")
    return check


def _keys(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _label(row: Row) -> str:
    return f"{row['method']} ({row['variant']})" if row.get("variant") else str(row.get("method"))


# ------------------------------------------------------------------------------------------------------ learning rates


def _check_rates(result: Recomputed) -> Check:
    """The rates that runs and ``settings.yaml`` have are the best of their searches."""
    check = Check(what="learning rates")
    for record in result.records:
        if (search := search_of(record, result.searches)) is not None:
            rate = record.config["method"]["optimizer"]["lr"]
            check.same(f"{record.run_id}, best of its search", rate, float(search.best))
    if (path := result.folder / SETTINGS).is_file():
        saved = (yaml.safe_load(path.read_text("utf-8")) or {}).get("methods", {})
        for search in result.searches:
            line = f"method.optimizer.lr={search.best}"
            given = [text for text in saved.get(search.method, ()) if text.startswith("method.optimizer.lr=")]
            check.same(f"{SETTINGS}, {search.label}", given, [line])
    return check
