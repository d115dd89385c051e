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
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grass_ray.config import ConfigError
from grass_ray.tasks.suites import Task

MAX_SHOWN = 5
MAX_ROW_CHARACTERS = 1_000_000  # no benchmark comes near; a longer row is a broken file, and would fill the memory

BrokenRows = Literal["refuse", "skip"]

# commas separate thousands (or lakhs): "1,5" is not 15
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_JSON_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


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
    """The finite number that ``text`` writes (commas between thousands are dropped), or None."""
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text.replace(",", ""))
    return number if math.isfinite(number) else None


def check_answer(answer: str, task: Task) -> None:
    """Raise :class:`RowError` unless ``answer`` is one the task can have."""
    if task.answer == "number" and parse_number(answer) is None:
        comma = "; a comma separates thousands, as in 1,500" if "," in answer else ""
        raise RowError(f"the answer {_shorten(answer)!r} is not a number{comma}")
    if task.labels and answer not in task.labels:
        raise RowError(f"unknown label {_shorten(answer)!r}; {task.key} has {', '.join(task.labels)}")


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def write_answer(value: str | int | float, task: Task | None) -> str:
    """An answer of a record as text, in Unicode's composed form; 1.0 is the label "1" where the task has that."""
    if task is not None and task.labels and isinstance(value, float) and value.is_integer():
        whole = str(int(value))
        return whole if whole in task.labels else str(value)
    return unicodedata.normalize("NFC", str(value).strip())


def row_from_record(record: Mapping[str, Any], task: Task | None) -> Row:
    """Validate one record. ``task`` None (a mixture of tasks) skips the check of the label."""
    missing = [key for key in ("instruction", "output", "answer") if key not in record]
    if missing:
        raise RowError(
            f"no {' and no '.join(repr(key) for key in missing)}; it has {', '.join(map(repr, record)) or 'no keys'}"
        )
    texts = {key: record.get(key, "") for key in ("instruction", "input", "output")}
    if texts["input"] is None:
        texts["input"] = ""
    for key, value in texts.items():
        if not isinstance(value, str):
            raise RowError(f"{key!r} is {type(value).__name__}, not text")
    if not texts["instruction"].strip():
        raise RowError("'instruction' is empty")
    answer = record["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError(f"'answer' is {type(answer).__name__}, not text or a number")
    row = Row(**texts, answer=write_answer(answer, task))
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
    if isinstance(record, RowError):
        raise record
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
    """(row number, value) pairs; what does not parse yields what is wrong with it as the value.

    What a file holds decides how it is read: one that begins with ``[`` is a list, one object a line are JSON lines.
    """
    try:
        # a byte that is not UTF-8 breaks the row it is in, not the file: it is found when the row is checked
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    begins, suffix = text.lstrip()[:1], path.suffix.lower()
    lines = suffix in (".jsonl", ".ndjson")
    if not begins and not lines:
        raise ConfigError(f"{path} is empty; it must hold a JSON list of rows")
    if lines and begins == "[" and isinstance(_parse(text), list):
        # a line of lists alone is a row that is no object
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
    """Whether one of the first two lines is a JSON object of its own, beside others."""
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
    except (ValueError, RecursionError):  # one row that Python cannot hold; the others are good
        values = [_parse(text[start:end]) for start, end in _elements(text)]
    if not isinstance(values, list):
        raise ConfigError(f"{path} holds {_json_kind(values)}; it must hold a JSON list of rows")
    return list(enumerate(values, start=1))


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Where the elements of a JSON list begin and end."""
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
    """The JSON value, or the :class:`RowError` that says why there is none."""
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
