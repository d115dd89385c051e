"""Rows, and reading them from JSON and JSON-lines files with every mistake named.

A row is what the published files hold: ``instruction``, ``input``, ``output`` (the text to learn), ``answer``::

    rows = read_rows(Path("dataset/boolq/test.json"), TASKS["boolq"])

A broken file is one :class:`ConfigError` with the file, the row numbers (counted from 1) and how many there are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grass_ray.config import ConfigError
from grass_ray.tasks.suites import Task

MAX_SHOWN = 5


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
    if task is not None:
        check_answer(row.answer, task)
    return row


def read_rows(
    path: Path, task: Task | None, convert: Callable[[Mapping[str, Any]], Row] | None = None
) -> tuple[Row, ...]:
    """Read a JSON list or (``.jsonl``) one JSON object a line.

    ``convert`` maps a record of another schema to a row. Raises :class:`ConfigError` on any mistake in the file.
    """
    rows: list[Row] = []
    mistakes: list[str] = []
    total = 0
    for number, record in _records(path):
        total += 1
        try:
            if isinstance(record, json.JSONDecodeError):
                raise RowError(f"broken JSON ({record.msg} at column {record.colno})")
            if not isinstance(record, dict):
                raise RowError(f"it is {_json_kind(record)}, not an object")
            row = convert(record) if convert else row_from_record(record, task)
            if convert and task:
                check_answer(row.answer, task)
            rows.append(row)
        except RowError as mistake:
            mistakes.append(f"row {number}: {mistake}")
    if mistakes:
        shown = "; ".join(mistakes[:MAX_SHOWN])
        more = f"; and {len(mistakes) - MAX_SHOWN} more" if len(mistakes) > MAX_SHOWN else ""
        raise ConfigError(f"{path}: {len(mistakes)} of {total} rows cannot be used: {shown}{more}")
    if not rows:
        raise ConfigError(f"{path} holds no rows; it needs at least one")
    return tuple(rows)


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
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} is not UTF-8 text: line {line} has the byte 0x{error.object[error.start]:02x}"
        ) from None
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
