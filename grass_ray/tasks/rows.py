"""Rows: the examples that a model is trained and evaluated on.

A row of a benchmark holds what the published files hold: ``instruction``, ``input``, ``output`` (the response to learn)
and ``answer``. Data without a right answer are conversations or texts. :mod:`grass_ray.tasks.row_files` reads all of
them from files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grass_ray.tasks.suites import Task

# no benchmark has rows of this size; a longer one is a broken file, and would fill the memory
MAX_ROW_CHARACTERS = 1_000_000

# commas separate thousands (or lakhs): "1,5" is not 15
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example: the question, the response to learn, and the answer that scoring compares with."""

    instruction: str
    input: str
    output: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A conversation. Its parts are JSON texts, so that rows can be compared and hashed.

    Attributes:
        messages: a list of objects with at least ``role``, as the chat template gets them.
        tools: what the chat template gets as tools; None for none.
        plain: prompt and response of a row that can also be rendered without a chat template; else None.
        where: file and number of the row, for messages; does not count when rows are compared.
    """

    messages: str
    tools: str | None = None
    plain: tuple[str, str] | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A text of which every token is learned; ``where`` is its file and number, for messages."""

    text: str
    where: str = field(default="", compare=False)


AnyRow = Row | ChatRow | TextRow


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Rows, and where they come from as plain JSON values."""

    rows: tuple[AnyRow, ...]
    provenance: dict[str, Any]

    @property
    def questions(self) -> list[Row]:
        """The rows with a right answer."""
        return [row for row in self.rows if isinstance(row, Row)]


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def parse_number(text: str) -> float | None:
    """Parse a finite number; commas may separate thousands. None if ``text`` is no number."""
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text.replace(",", ""))
    return number if math.isfinite(number) else None


def check_answer(answer: str, task: Task) -> None:
    """Raise :class:`RowError` unless ``answer`` is a possible answer of the task."""
    if task.answer == "number" and parse_number(answer) is None:
        comma = "; a comma separates thousands, as in 1,500" if "," in answer else ""
        raise RowError(f"the answer {_shorten(answer)!r} is not a number{comma}")
    if task.labels and answer not in task.labels:
        raise RowError(f"unknown label {_shorten(answer)!r}; {task.key} has {', '.join(task.labels)}")


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def write_answer(value: str | int | float, task: Task | None) -> str:
    """Write the answer of a record as text in composed Unicode. 1.0 is written as "1" if the task has that label."""
    if task is not None and task.labels and isinstance(value, float) and value.is_integer():
        whole = str(int(value))
        return whole if whole in task.labels else str(value)
    return unicodedata.normalize("NFC", str(value).strip())


def row_from_record(record: Mapping[str, Any], task: Task | None) -> Row:
    """Make a row of a record.

    Args:
        record: with the keys of a row.
        task: whose answers it may have; None (a mixture of tasks) does not check the answer.

    Raises:
        RowError: the record cannot be used.
    """
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
    check_text(row)
    if task is not None:
        check_answer(row.answer, task)
    return row


def check_text(row: Row) -> None:
    """Raise :class:`RowError` if a row is too long or its text is not UTF-8."""
    check_texts(asdict(row))


def check_texts(texts: Mapping[str, str]) -> None:
    """Raise :class:`RowError` if the texts of a row, by name, are too long or not UTF-8."""
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


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_rows(rows: Iterable[AnyRow]) -> str:
    """Return the sha256 of rows as canonical JSON lines, for sources without files."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()


def canonical(row: AnyRow) -> str:
    """Return a row as one line of JSON, without where it came from."""
    values = {part.name: getattr(row, part.name) for part in fields(row) if part.compare}
    return json.dumps(values, sort_keys=True)
