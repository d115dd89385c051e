"""Encode a conversation by a chat template, and tell which tokens are the assistant's.

::

    ids, learned = encode_chat(tokenizer, row, template=None)       # learned: 1 for tokens of the assistant, else 0

Where the template marks the assistant's text (``{% generation %}``), transformers tells its tokens. Elsewhere a turn of
the assistant is the text between the conversation before it, rendered with the generation prompt, and the conversation
that ends with it; a greeting that opens a conversation is not learned. Both must be beginnings of the whole
conversation: a template that renders a turn differently when others follow (one that drops earlier reasoning, for
example) is refused, since nothing then says what was learned.
"""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from grass_ray.config import ConfigError, DatasetSource
from grass_ray.tasks.rows import ChatRow, RowError

# roles as headings; a turn of the assistant ends with the tokenizer's own end token, so any tokenizer can be used
SIMPLE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
# templates of the Llama 3 family write today's date unless they are given one, and a run could not be repeated
DATE = "26 Jul 2024"

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# what a template raises for messages that it was not written for
_REFUSALS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)

Encoded = tuple[list[int], list[int]]  # token ids, and 1 for those that are learned


def own_template(source: DatasetSource) -> str | None:
    """Return the template that a source names; None if it takes the tokenizer's.

    Raises:
        ConfigError: its file cannot be read.
    """
    if source.chat_template is None or source.chat_template == "simple":
        return SIMPLE if source.chat_template else None
    path = Path(os.path.expanduser(source.chat_template))
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(
            f"cannot read the chat template {path}: {reason}; give a file with a Jinja template, or simple"
        ) from None


def has_template(source: DatasetSource, tokenizer: Any) -> bool:
    """Whether there is a chat template."""
    return bool(source.chat_template or getattr(tokenizer, "chat_template", None))


def find_template(source: DatasetSource, tokenizer: Any, *, tools: bool = False) -> str:
    """Return the chat template that conversations are rendered with.

    Raises:
        ConfigError: there is none, it is no template, or the tokenizer cannot tell where its tokens stand in a text.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not has_template(source, tokenizer):
        raise ConfigError(
            f"the tokenizer {name} has no chat template, which conversations are rendered with; take a model that was "
            "tuned for chats, or set data.source.chat_template to a file with a Jinja template, or to simple"
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {name} is written in Python and does not tell which tokens are the assistant's; give the "
            "model with its tokenizer.json"
        )
    try:
        template: str = own_template(source) or tokenizer.get_chat_template(tools=[{}] if tools else None)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        where = source.chat_template or f"of {name}"
        raise ConfigError(f"the chat template {where} is no Jinja template: {error} (line {error.lineno})") from None
    except ValueError as error:  # several templates, none of which is the default
        raise ConfigError(f"the tokenizer {name}: {error}") from None
    except _REFUSALS:
        pass  # it wants other messages; each row shows whether it gets them
    return template


def says_what_is_learned(template: str) -> bool:
    """Whether a template marks the text of the assistant."""
    return _MARK.search(template) is not None


def encode_chat(tokenizer: Any, row: ChatRow, template: str) -> Encoded:
    """Return the token ids of a conversation, and 1 for each token of the assistant.

    Raises:
        RowError: the template refuses the conversation, or does not tell what is the assistant's.
    """
    messages = json.loads(row.messages)
    tools = None if row.tools is None else json.loads(row.tools)
    chat = _Chat(tokenizer, template, tools)
    try:
        ids, learned = chat.marked(messages) if says_what_is_learned(template) else chat.by_prefixes(messages)
    except _REFUSALS as error:
        if isinstance(error, RowError):
            raise
        reason = str(error).strip("'").splitlines()
        raise RowError(f"the chat template refuses it: {reason[0] if reason else type(error).__name__}") from None
    marks = set(tokenizer.added_tokens_encoder.values()) | {tokenizer.eos_token_id}
    if not any(own and token not in marks for token, own in zip(ids, learned, strict=True)):
        raise RowError("the chat template renders nothing of what the assistant says")
    return ids, learned


class _Chat:
    """A template with its tokenizer and tools."""

    def __init__(self, tokenizer: Any, template: str, tools: Any) -> None:
        self._tokenizer = tokenizer
        self._options = {"tools": tools, "chat_template": template, "date_string": DATE}

    def marked(self, messages: list[dict[str, Any]]) -> Encoded:
        found = self._tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **self._options
        )
        return list(found["input_ids"]), list(found["assistant_masks"])

    def by_prefixes(self, messages: list[dict[str, Any]]) -> Encoded:
        whole = self._render(messages)
        # no generation prompt stands before a greeting that opens the conversation, so it is not learned
        turns = [number for number, message in enumerate(messages) if number and message["role"] == "assistant"]
        if not turns:
            raise RowError(
                "its only message of the assistant is the first one, and this chat template marks no {% generation %}, "
                "so where that begins is not known"
            )
        spans = [self._span(whole, messages, number) for number in turns]
        ids, learned = self._tokenize(whole, spans)
        ends = set(self._tokenizer.added_tokens_encoder.values())
        says_its_end = any(token in ends for token, own in zip(ids, learned, strict=True) if own)
        if messages[-1]["role"] == "assistant" and not says_its_end:  # else the model would learn to go on for ever
            ids, learned = [*ids, self._tokenizer.eos_token_id], [*learned, 1]
        return ids, learned

    def _tokenize(self, whole: str, spans: list[tuple[int, int]]) -> Encoded:
        """Encode a text of which some spans are learned."""
        found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        places = found["offset_mapping"]
        edges = {edge for span in spans for edge in span}
        if not any(start < edge < end for start, end in places for edge in edges):
            inside = [any(first <= start < end <= last for first, last in spans) for start, end in places]
            return list(found["input_ids"]), [int(own) for own in inside]
        # generation starts after the prompt's own tokens, so none may reach over an edge, such as " 4" behind "is: "
        ids: list[int] = []
        learned: list[int] = []
        cuts = [0, *sorted(edges), len(whole)]
        for start, end in pairwise(cuts):
            piece = self._tokenizer(whole[start:end], add_special_tokens=False)["input_ids"]
            ids += piece
            learned += [int((start, end) in spans)] * len(piece)
        return ids, learned

    def _span(self, whole: str, messages: list[dict[str, Any]], number: int) -> tuple[int, int]:
        """Where the text of a turn of the assistant begins and ends, its end token included."""
        before = self._render(messages[:number], add_generation_prompt=True)
        until = self._render(messages[: number + 1])
        if not whole.startswith(until):  # some templates close a whole conversation with the end token
            until = until.removesuffix(self._tokenizer.eos_token)
        if not (whole.startswith(before) and whole.startswith(until) and len(before) < len(until)):
            raise RowError(
                f"the chat template renders message {number + 1} differently when others follow, so which tokens are "
                "the assistant's is not known; set data.source.chat_template to one that marks them with "
                "{% generation %}, or leave one answer in a row"
            )
        # the line break behind the end token is never generated
        text = whole[len(before) : len(until)]
        bare = text.rstrip()
        closed = any(bare.endswith(token) for token in self._tokenizer.added_tokens_encoder)
        return len(before), len(before) + len(bare if closed else text)

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
        )
        return text
