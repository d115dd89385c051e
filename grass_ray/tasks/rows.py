"""Rows, and reading them from JSON and JSON-lines files with every mistake named.

A row is what the published files hold: ``instruction``, ``input``, ``output`` (the text to learn), ``answer``::

    rows = read_rows(Path("dataset/boolq/test.json"), TASKS["boolq"])

Broken rows are one :class:`ConfigError` with the file, the row numbers (counted from 1) and how many there are; with
``broken_rows="skip"`` they are left out and described (:func:`read_file`). A file that is no list of rows is refused
either way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grass_ray.config import ConfigError
from grass_ray.tasks.suites import Task

MAX_SHOWN = 5
MAX_ROW_CHARACTERS = 1_000_000  # no benchmark comes near; a longer row is a broken file, and would fill the memory

BrokenRows = Literal["refuse", "skip"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example: the question, the response to learn, and the bare answer that scoring compares with."""

    instruction: str
    input: str
    output: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Rows and where they come from; ``provenance`` is plain JSON."""

    rows: tuple[Row, ...]
    provenance: dict[str, Any]


class RowError(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The rows of one file, and what is wrong with each row that was left out (``row 3: ...``)."""

    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Counts for the record, and the first mistakes where rows were left out."""
        counts: dict[str, Any] = {"rows": len(self.rows)}
        if self.skipped:
            counts |= {"rows_skipped": len(self.skipped), "mistakes": list(self.skipped[:MAX_SHOWN])}
        return counts


def parse_number(text: str) -> float | None:
    """The finite number that ``text`` writes (commas between digits are dropped), or None."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def check_answer(answer: str, task: Task) -> None:
    """Raise :class:`RowError` unless ``answer`` is one the task can have."""
    if task.answer == "number" and parse_number(answer) is None:
        raise RowError(f"the answer {answer!r} is not a number")
    if task.labels and answer not in task.labels:
        raise RowError(f"unknown label {answer!r}; {task.key} has {', '.join(task.labels)}")


def row_from_record(record: Mapping[str, Any], task: Task | None) -> Row:
    """Validate one record. ``task`` None (a mixture of tasks) skips the check of the label."""
    missing = [key for key in ("instruction", "output", "answer") if key not in record]
    if missing:
        raise RowError(
            f"no {' and no '.join(repr(key) for key in missing)}; it has {', '.join(map(repr, record)) or 'no keys'}"
        )
    texts = {key: record.get(key, "") for key in ("instruction", "input", "output")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise RowError(f"{key!r} is {type(value).__name__}, not text")
    if not texts["instruction"].strip():
        raise RowError("'instruction' is empty")
    answer = record["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError(f"'answer' is {type(answer).__name__}, not text or a number")
    row = Row(**texts, answer=str(answer).strip())
    _check_text(row)
    if task is not None:
        check_answer(row.answer, task)
    return row


def _check_text(row: Row) -> None:
    """Raise :class:`RowError` on a row that is far too long or whose text is not Unicode."""
    texts = asdict(row)
    if (length := sum(map(len, texts.values()))) > MAX_ROW_CHARACTERS:
        raise RowError(f"it has {length:,} characters; a row may have {MAX_ROW_CHARACTERS:,}")
    for key, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # a byte that was not UTF-8 was read as U+DC00 plus the byte
            what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
            raise RowError(f"{key!r} is not UTF-8 text: it has {what}") from None


def read_rows(
    path: Path, task: Task | None, convert: Callable[[Mapping[str, Any]], Row] | None = None
) -> tuple[Row, ...]:
    """The rows of a file of which every row must be good; see :func:`read_file`."""
    return read_file(path, task, convert).rows


def read_file(
    path: Path,
    task: Task | None,
    convert: Callable[[Mapping[str, Any]], Row] | None = None,
    broken_rows: BrokenRows = "refuse",
) -> Reading:
    """Read a JSON list or (``.jsonl``) one JSON object a line.

    Args:
        path: the file.
        task: whose answers the rows must have; None for a mixture of tasks.
        convert: maps a record of another schema to a row.
        broken_rows: ``skip`` leaves broken rows out, as long as one is left.

    Raises:
        ConfigError: a file that is no list of rows, or broken rows that are refused.
    """
    rows: list[Row] = []
    mistakes: list[str] = []
    for number, record in _records(path):
        try:
            rows.append(_row(record, task, convert))
        except RowError as mistake:
            mistakes.append(f"row {number}: {mistake}")
    return take_rows(rows, mistakes, str(path), broken_rows)


def take_rows(rows: Sequence[Row], mistakes: Sequence[str], where: str, broken_rows: BrokenRows) -> Reading:
    """What was read, or a :class:`ConfigError` with the first mistakes and their number."""
    if mistakes and (broken_rows == "refuse" or not rows):
        shown = "; ".join(mistakes[:MAX_SHOWN])
        more = f"; and {len(mistakes) - MAX_SHOWN} more" if len(mistakes) > MAX_SHOWN else ""
        hint = ". data.broken_rows=skip leaves them out" if rows else ""
        total = len(rows) + len(mistakes)
        raise ConfigError(f"{where}: {len(mistakes)} of {total} rows cannot be used: {shown}{more}{hint}")
    if not rows:
        raise ConfigError(f"{where} holds no rows; it needs at least one")
    return Reading(rows=tuple(rows), skipped=tuple(mistakes))


def _row(record: Any, task: Task | None, convert: Callable[[Mapping[str, Any]], Row] | None) -> Row:
    if isinstance(record, json.JSONDecodeError):
        raise RowError(f"broken JSON ({record.msg} at column {record.colno})")
    if not isinstance(record, dict):
        raise RowError(f"it is {_json_kind(record)}, not an object")
    if convert is None:
        return row_from_record(record, task)
    row = convert(record)
    _check_text(row)
    if task:
        check_answer(row.answer, task)
    return row


def hash_file(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_rows(rows: Iterable[Row]) -> str:
    """The sha256 of the rows as canonical JSON lines, for sources that have no file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _records(path: Path) -> Iterable[tuple[int, Any]]:
    """(row number, value) pairs; a JSON-lines line that does not parse yields its error as the value."""
    try:
        # a byte that is not UTF-8 breaks the row it is in, not the file: it is found when the row is checked
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix == ".jsonl":
        return _lines(text)
    if not text.strip():
        raise ConfigError(f"{path} is empty; it must hold a JSON list of rows")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is broken JSON: {error.msg} at line {error.lineno} column {error.colno}, "
            f"about row {_rows_before(text, error.pos)}"
        ) from None
    if not isinstance(values, list):
        raise ConfigError(f"{path} holds {_json_kind(values)}; it must hold a JSON list of rows")
    return list(enumerate(values, start=1))


def _rows_before(text: str, position: int) -> int:
    """The number of the row that a JSON list breaks in: whole rows before ``position``, plus one."""
    decoder = json.JSONDecoder()
    at = text.find("[") + 1
    count = 0
    while 0 < at < position:
        while at < position and text[at] in " \t\r\n,":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        count += 1
    return count + 1


def _lines(text: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error


def _json_kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
