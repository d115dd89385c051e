"""Rows of a data set in the shapes that people have: conversations, pairs, and plain text.

::

    shape = detect_shape(record, columns, where)               # "messages", from the columns of the first rows
    row = Shaper(shape, columns).shape(record, "row 3 of chats.jsonl")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grass_ray.config import ConfigError, DatasetColumns, Shape
from grass_ray.tasks.rows import ChatRow, Row, RowError, TextRow, check_texts
from grass_ray.tasks.templates import TemplateName, render_prompt

# columns that a shape must have; the first shape whose columns are there is taken
NEEDED: Mapping[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def detect_shape(records: Sequence[Mapping[str, Any]], columns: DatasetColumns, where: str) -> Shape:
    """Return the first shape of which a record has all columns.

    Args:
        records: the first records; keys may be missing in some of them.
        columns: names of the columns.
        where: the file, for the message.

    Raises:
        ConfigError: there is no such shape.
    """
    there = dict.fromkeys(key for record in records for key, value in record.items() if value is not None)
    for shape in NEEDED:
        if all(getattr(columns, role) in there for role in NEEDED[shape]):
            return shape
    wanted = "; ".join(
        f"{shape}: {' and '.join(getattr(columns, r) for r in roles)}" for shape, roles in NEEDED.items()
    )
    raise ConfigError(
        f"{where} has the columns {', '.join(map(str, there)) or '(none)'}, which are no shape that is known "
        f"({wanted}). Say which column is what, for example --set data.source.columns.prompt=question "
        "data.source.columns.completion=answer"
    )


class Shaper:
    """Makes rows of records of one shape.

    Args:
        shape: their shape.
        columns: names of their columns.
        template: how an instruction becomes a prompt if it is not rendered as a conversation.

    Attributes:
        numbers: how many values were numbers and were written as text.
    """

    def __init__(self, shape: Shape, columns: DatasetColumns, template: TemplateName) -> None:
        self.columns = columns
        self.numbers = 0
        self._template = template
        makers: Mapping[Shape, Callable[[Mapping[str, Any], str], ChatRow | TextRow]] = {
            "messages": lambda record, where: self._chat(record, columns.messages, where),
            "conversations": lambda record, where: self._chat(record, columns.conversations, where),
            "prompt_completion": self._pair,
            "alpaca": self._alpaca,
            "text": lambda record, where: TextRow(text=self._text(record, columns.text), where=where),
        }
        self._make = makers[shape]

    def shape(self, record: Any, where: str) -> ChatRow | TextRow:
        """Make a row. Raises :class:`RowError` if the record cannot be used."""
        if isinstance(record, RowError):
            raise record
        if not isinstance(record, Mapping):
            raise RowError(f"it is {kind_of(record)}, not an object")
        row = self._make(record, where)
        texts = {"text": row.text} if isinstance(row, TextRow) else {"messages": row.messages, "tools": row.tools or ""}
        check_texts(texts)
        return row

    def _chat(self, record: Mapping[str, Any], column: str, where: str) -> ChatRow:
        messages = read_messages(_value(record, column), column)
        tools = record.get(self.columns.tools)
        if tools is not None:
            tools = _as_list(tools, self.columns.tools)
        return ChatRow(messages=_json(messages), tools=_json(tools) if tools else None, where=where)

    def _pair(self, record: Mapping[str, Any], where: str) -> ChatRow:
        prompt, completion = (self._text(record, key) for key in (self.columns.prompt, self.columns.completion))
        return _turn(prompt, completion, (prompt, completion), where)

    def _alpaca(self, record: Mapping[str, Any], where: str) -> ChatRow:
        columns = self.columns
        instruction, output = (self._text(record, key) for key in (columns.instruction, columns.output))
        about = "" if record.get(columns.input) is None else self._text(record, columns.input)
        if not instruction.strip():
            raise RowError(f"{columns.instruction!r} is empty")
        question = f"{instruction.strip()}\n\n{about.strip()}" if about.strip() else instruction.strip()
        plain = render_prompt(Row(instruction=instruction, input=about, output="", answer=""), self._template)
        return _turn(question, output.strip(), (plain, output.strip()), where)

    def _text(self, record: Mapping[str, Any], column: str) -> str:
        value = _value(record, column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.numbers += 1
            return str(value)
        if not isinstance(value, str):
            hint = f"; a list of messages is named with data.source.columns.messages={column}" * isinstance(value, list)
            raise RowError(f"{column!r} is {kind_of(value)}, not text{hint}")
        return value


def _value(record: Mapping[str, Any], column: str) -> Any:
    if column not in record:
        raise RowError(f"no {column!r}; it has {', '.join(map(repr, record)) or 'no keys'}")
    return record[column]


def _turn(prompt: str, response: str, plain: tuple[str, str], where: str) -> ChatRow:
    """A turn of the user and one of the assistant. An empty response is kept here, and counted where rows are used."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return ChatRow(messages=_json(messages), plain=plain, where=where)


def read_messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Return messages with ``role`` and ``content``, whatever their keys were; other keys are left alone.

    Raises:
        RowError: they are no conversation with something to learn.
    """
    messages = [_message(message, number) for number, message in enumerate(_as_list(value, column), start=1)]
    if not messages:
        raise RowError(f"{column!r} is empty; it needs at least one message")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("it has no message of the assistant, so there is nothing to learn")
    return messages


def _as_list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str) and value.strip():  # in a CSV file, a list is JSON text
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f"{column!r} is text that is no JSON list: {value[:40]!r}") from None
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) != 1:  # Arrow keeps a list of objects as lists of their values
            raise RowError(f"{column!r} has lists of different lengths")
        return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise RowError(f"{column!r} is {kind_of(value)}, not a list")
    return value


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        nested = "; several conversations are several rows" if isinstance(message, list) else ""
        raise RowError(f"message {number} is {kind_of(message)}, not an object with a role{nested}")
    rest = {key: value for key, value in message.items() if value is not None}
    keys = ("role", "content") if "role" in rest else ("from", "value")
    if keys[0] not in rest:
        raise RowError(f"message {number} has no 'role' (or 'from'); it has {', '.join(map(repr, rest)) or 'no keys'}")
    said, content = rest.pop(keys[0]), rest.pop(keys[1], None)
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise RowError(f"message {number} has the role {said!r}; known are {', '.join(ROLES)}")
    text = _content(content, number, role, keys[1], optional=bool(rest.get("tool_calls")))
    return {"role": role, "content": text, **rest}


def _content(content: Any, number: int, role: str, key: str, *, optional: bool) -> str:
    if isinstance(content, list):  # parts, as OpenAI has them
        strange = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
        if strange:
            raise RowError(f"message {number} ({role}) has a part that is not text; only text is learned")
        content = "".join(part["text"] for part in content)
    if isinstance(content, int | float) and not isinstance(content, bool):
        content = str(content)
    if content is None and optional:
        return ""
    if not isinstance(content, str):
        raise RowError(f"message {number} ({role}): {key!r} is {kind_of(content)}, not text")
    if not content.strip() and not optional and role in ("user", "assistant"):
        raise RowError(f"message {number} ({role}) is empty")
    return content


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"it holds a value that is no JSON: {error}") from None


def kind_of(value: object) -> str:
    """Name the kind of a JSON value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    number = isinstance(value, int | float)
    return names.get(type(value), "a number" if number else type(value).__name__)
