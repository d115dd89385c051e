"""Read rows from JSON and JSON-lines files, and report every mistake.

::

    rows = read_file(Path("dataset/boolq/test.json"), TASKS["boolq"]).rows

Broken rows raise one :class:`ConfigError` with the file, the numbers of the rows (from 1) and how many there are; with
``broken_rows="skip"`` they are left out and reported. A file that is no list of rows is always an
error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grass_ray.config import ConfigError
from grass_ray.reading import unpack
from grass_ray.tasks.rows import Row, RowError, check_answer, check_text, row_from_record
from grass_ray.tasks.suites import Task

MAX_SHOWN = 5

BrokenRows = Literal["refuse", "skip"]

_JSON_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Rows of one file, and for each skipped row what is wrong with it (``row 3: ...``)."""

    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Counts for the record, and the first mistakes if rows were skipped."""
        counts: dict[str, Any] = {"rows": len(self.rows)}
        if self.skipped:
            counts |= {"rows_skipped": len(self.skipped), "mistakes": list(self.skipped[:MAX_SHOWN])}
        return counts


def read_file(
    path: Path,
    task: Task | None,
    convert: Callable[[Mapping[str, Any]], Row] | None = None,
    broken_rows: BrokenRows = "refuse",
) -> Reading:
    """Read a JSON list, or one JSON object per line (``.jsonl``).

    Args:
        path: the file.
        task: whose answers the rows may have; None for a mixture of tasks.
        convert: maps a record of another schema to a row.
        broken_rows: whether broken rows are an error or skipped. It is an error if no row is left.

    Raises:
        ConfigError: the file is no list of rows, or rows are broken.
    """
    rows: list[Row] = []
    mistakes: list[str] = []
    for number, record in read_records(path):
        try:
            rows.append(_row(record, task, convert))
        except RowError as mistake:
            mistakes.append(f"row {number}: {mistake}")
    return take_rows(rows, mistakes, str(path), broken_rows)


def take_rows(rows: Sequence[Row], mistakes: Sequence[str], where: str, broken_rows: BrokenRows) -> Reading:
    """Return the rows that were read, or raise :class:`ConfigError` with the first mistakes and their number."""
    refuse_broken(mistakes, len(rows), where, broken_rows)
    if not rows:
        raise ConfigError(f"{where} holds no rows; it needs at least one")
    return Reading(rows=tuple(rows), skipped=tuple(mistakes))


def refuse_broken(mistakes: Sequence[str], usable: int, where: str, broken_rows: BrokenRows) -> None:
    """Raise :class:`ConfigError` if rows are broken, unless they are skipped and others are usable."""
    if mistakes and (broken_rows == "refuse" or not usable):
        shown = "; ".join(mistakes[:MAX_SHOWN])
        more = f"; and {len(mistakes) - MAX_SHOWN} more" if len(mistakes) > MAX_SHOWN else ""
        hint = ". data.broken_rows=skip leaves them out" if usable else ""
        total = usable + len(mistakes)
        raise ConfigError(f"{where}: {len(mistakes)} of {total} rows cannot be used: {shown}{more}{hint}")


def _row(record: Any, task: Task | None, convert: Callable[[Mapping[str, Any]], Row] | None) -> Row:
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, dict):
        raise RowError(f"it is {_json_kind(record)}, not an object")
    if convert is None:
        return row_from_record(record, task)
    row = convert(record)
    check_text(row)
    if task:
        check_answer(row.answer, task)
    return row


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds: ``.jsonl`` of ``rows.jsonl.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_text(path: Path) -> str:
    """Read a text file, which may be compressed (``.gz``), as UTF-8 with or without a byte order mark.

    A byte that is not UTF-8 becomes a lone surrogate, which :func:`grass_ray.tasks.rows.check_text` finds in its row.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"cannot read {path}: it is not a file")
    try:
        data = unpack(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: it is not a whole gzip file ({error})") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return data.decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path) -> Iterable[tuple[int, Any]]:
    """Yield the number and the value of each row of a JSON file. A row that is no JSON has a :class:`RowError`.

    The content decides how a file is read: one that begins with ``[`` is a list, one object per line is JSON lines.

    Raises:
        ConfigError: the file is no list of rows.
    """
    text = read_text(path)
    begins, suffix = text.lstrip()[:1], data_suffix(path)
    lines = suffix in (".jsonl", ".ndjson")
    if not begins and not lines:
        raise ConfigError(f"{path} is empty; it must hold a JSON list of rows")
    if lines and begins == "[" and isinstance(_parse(text), list):
        # a JSON list that is one line among others is only a broken row
        raise ConfigError(f"{path} holds a JSON list, and a {suffix} file one JSON object a line; rename it to .json")
    if (suffix != ".json" and not lines and begins not in "[{") or "\x00" in text[:100]:
        raise ConfigError(
            f"{path} is no JSON in UTF-8: it begins with {text[:20]!r}; rows are read from .json (a list) and .jsonl "
            "(one object a line) files"
        )
    if lines or (begins == "{" and _holds_lines(text)):
        return _lines(text)
    return _list(text, path)


def _holds_lines(text: str) -> bool:
    """Whether there are several lines, and one of the first two is a JSON object."""
    lines = [line for line in text.split("\n", 20) if line.strip()]
    return len(lines) > 1 and any(isinstance(_parse(line), dict) for line in lines[:2])


def _list(text: str, path: Path) -> list[tuple[int, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        row = 1 + sum(end < error.pos for _, end in _elements(text))
        raise ConfigError(
            f"{path} is broken JSON: {error.msg} at line {error.lineno} column {error.colno}, about row {row}"
        ) from None
    except (ValueError, RecursionError):  # Python cannot hold one of the rows; the others are valid
        values = [_parse(text[start:end]) for start, end in _elements(text)]
    if not isinstance(values, list):
        raise ConfigError(f"{path} holds {_json_kind(values)}; it must hold a JSON list of rows")
    return list(enumerate(values, start=1))


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each element of a JSON list."""
    depth = start = 0
    for mark in _JSON_MARKS.finditer(text):
        depth += (mark.group() in "[{") - (mark.group() in "]}")
        if mark.group() in "[{" and depth == 1:
            start = mark.end()
        elif (mark.group() == "," and depth == 1) or (mark.group() in "]}" and depth == 0):
            yield start, mark.start()
            start = mark.end()


def _lines(text: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line)


def _parse(text: str) -> Any:
    """Parse JSON; return a :class:`RowError` if that fails."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return RowError("it is nested too deeply to be read")
    except ValueError:
        return RowError(f"it holds a whole number of more than {sys.get_int_max_str_digits():,} digits")


def _json_kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
