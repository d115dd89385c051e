"""Tables in Markdown files: read, compared with what the records make now, and replaced by that.

Cells are compared by row and heading as they are printed, character by character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grass_ray.results.verification.check import Check

_BAR = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+\s*")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class MarkdownTable:
    """A table of a Markdown file.

    Attributes:
        title: the heading right above it; empty if there is none.
        columns: the headings of its columns.
        rows: its cells, as they are written.
        notes: the list right below it.
        lines: where all of this begins, and the line after its end.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    lines: tuple[int, int]

    @property
    def key(self) -> int:
        """The place of the column that names a row."""
        return self.columns.index("method") if "method" in self.columns else 0

    def by_name(self) -> dict[str, tuple[str, ...]]:
        """The rows by name. A mark behind a name is no part of it; a second row of the same name is numbered."""
        found: dict[str, tuple[str, ...]] = {}
        for row in self.rows:
            name = row[self.key].removesuffix(r" \*")
            number = sum(known.split(" #")[0] == name for known in found)
            found[f"{name} #{number + 1}" if number else name] = row
        return found

    def likeness(self, other: MarkdownTable) -> float:
        """How many columns of both tables are the same, as a share of all; 1 and more with the same title."""
        own, others = set(self.columns), set(other.columns)
        return len(own & others) / len(own | others) + (bool(self.title) and self.title == other.title)


def read_tables(text: str) -> list[MarkdownTable]:
    """All tables of a Markdown text."""
    lines = text.splitlines()
    found, at = [], 0
    while at < len(lines):
        if not (lines[at].startswith("|") and at + 1 < len(lines) and _RULE.fullmatch(lines[at + 1])):
            at += 1
            continue
        above = next((line for line in range(at - 1, -1, -1) if lines[line].strip()), None)
        titled = above is not None and lines[above].startswith("#")
        end = _after(lines, at + 2, "|")
        first_note = next((line for line in range(end, len(lines)) if lines[line].strip()), end)
        after_notes = _after(lines, first_note, "- ")
        found.append(
            MarkdownTable(
                title=lines[above].lstrip("# ") if titled and above is not None else "",
                columns=_cells(lines[at]),
                rows=tuple(_cells(line) for line in lines[at + 2 : end]),
                notes=tuple(lines[first_note:after_notes]),
                lines=(above if titled and above is not None else at, after_notes if after_notes > first_note else end),
            )
        )
        at = end
    return found


def _after(lines: Sequence[str], start: int, mark: str) -> int:
    end = start
    while end < len(lines) and lines[end].startswith(mark):
        end += 1
    return end


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in _BAR.split(line.strip())[1:-1])


# ----------------------------------------------------------------------------------------------------------- comparing


def check_markdown(path: Path, made: str, *, whole: bool) -> Check:
    """Compare a file's tables with those that the records make.

    Args:
        path: of the file.
        made: the tables of the records in Markdown.
        whole: whether the file must have all of them.
    """
    check = Check(what=path.name)
    given, expected = read_tables(path.read_text(encoding="utf-8")), read_tables(made)
    pairs = dict(_pairs(given, expected))
    for index, table in enumerate(given):
        if index in pairs:
            _compare(check, table, expected[pairs[index]], number=index + 1 if len(given) > 1 else 0)
        else:
            named = f" ({table.title})" if table.title else ""
            check.remarks.append(
                f"{path.name}: table {index + 1}{named} is not made of these records: {', '.join(table.columns)}"
            )
    if whole:
        for index in sorted(set(range(len(expected))) - set(pairs.values())):
            check.disagreements.append(f"the table of {expected[index].title} is missing")
    return check


def _pairs(given: Sequence[MarkdownTable], made: Sequence[MarkdownTable]) -> Iterator[tuple[int, int]]:
    """Which table is which: those most alike first, at least half of their columns the same."""
    found = [(-a.likeness(b), i, j) for i, a in enumerate(given) for j, b in enumerate(made) if a.likeness(b) >= 0.5]
    left_given, left_made = set(range(len(given))), set(range(len(made)))
    for _, i, j in sorted(found):
        if i in left_given and j in left_made:
            left_given.remove(i)
            left_made.remove(j)
            yield i, j


def _compare(check: Check, given: MarkdownTable, made: MarkdownTable, *, number: int) -> None:
    at = f"table {number}, " if number else ""
    rows, expected = given.by_name(), made.by_name()
    for name in sorted(rows.keys() - expected.keys()):
        check.disagreements.append(f"{at}{name}: no such row can be made of the records")
    for name in sorted(expected.keys() - rows.keys()):
        check.disagreements.append(f"{at}{name}: the records have this row, the table has not")
    common = [column for column in given.columns if column in made.columns]
    for name, row in rows.items():
        if (other := expected.get(name)) is None:
            continue
        if len(row) != len(given.columns):
            check.disagreements.append(f"{at}{name}: {len(row)} cells in {len(given.columns)} columns")
            continue
        for column in common:
            check.same(f"{at}{name}, {column}", row[given.columns.index(column)], other[made.columns.index(column)])
    if rows.keys() == expected.keys() and list(rows) != list(expected):
        check.disagreements.append(f"{at}rows are in another order: {', '.join(rows)}")
    _columns(check, given.columns, made.columns, at)
    for line in [given.title, *given.notes]:
        _line(check, line, [made.title, *made.notes], at)
    if missing := sum(_masked(line) not in map(_masked, given.notes) for line in made.notes):
        check.remarks.append(f"{check.what}: {at}{missing} notes are missing that are made now")


def _columns(check: Check, given: Sequence[str], made: Sequence[str], at: str) -> None:
    if missing := [column for column in made if column not in given]:
        check.remarks.append(f"{check.what}: {at}columns that are made now are missing: {', '.join(missing)}")
    if unknown := [column for column in given if column not in made]:
        check.remarks.append(f"{check.what}: {at}columns that are not made any more: {', '.join(unknown)}")


def _line(check: Check, line: str, made: Sequence[str], at: str) -> None:
    """A title or a note: its numbers must be those of the line that has the same words."""
    alike = [other for other in made if _masked(other) == _masked(line)]
    if alike:
        check.same(f"{at}note", line, line if line in alike else alike[0])
    elif line:
        check.remarks.append(f"{check.what}: {at}a line that is not made any more: {line}")


def _masked(line: str) -> str:
    return _NUMBER.sub("#", line)


# ----------------------------------------------------------------------------------------------------------- replacing


def replace_tables(text: str, made: str) -> str:
    """The text with every table that the records make, its title and its notes, as they are made now."""
    given, expected = read_tables(text), read_tables(made)
    lines, new = text.splitlines(), made.splitlines()
    for index, other in sorted(_pairs(given, expected), reverse=True):
        start, end = given[index].lines
        first, last = expected[other].lines
        lines[start:end] = new[first:last]
    return "\n".join(lines) + "\n" * text.endswith("\n")
