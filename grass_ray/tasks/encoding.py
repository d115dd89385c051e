"""Encode a prompt and its answer, in the same way for training, generation, scoring and validation.

The tokens of the prompt are those of the prompt alone, since generation continues from them. The tokens of the answer
are those that follow them if both are encoded together, as lm-eval does: some tokenizers (Llama 2) insert a space if an
answer is encoded alone. It is encoded alone only if the last characters of the prompt and the first of the answer would
merge into one token, which generation could not produce::

    context, continuation = encode_pair(tokenizer, prompt, "the correct answer is true")
    encoded = encode_rows(rows, tokenizer, data)          # whole rows, with what is learned of each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grass_ray.config import DataConfig, DatasetSource
from grass_ray.tasks.conversations import Encoded, encode_chat, find_template, has_template
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.tasks.row_files import refuse_broken
from grass_ray.tasks.rows import AnyRow, ChatRow, Row, RowError, TextRow
from grass_ray.tasks.templates import render_prompt, render_response

_AT_ONCE = 10_000  # rows whose tokens are in memory beside the encoded rows


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a prompt, with the special tokens before the text."""
    return without_end(tokenizer, tokenizer(text)["input_ids"])


def encode_pair(
    tokenizer: Any, prompt: str, answer: str, encode: Callable[[str], list[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt, and those of its answer without an end token.

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: text before the answer.
        answer: text to learn, generate or score.
        encode: replaces :func:`encode_prompt`, for example by a cached version.
    """
    encode = encode or (lambda text: encode_prompt(tokenizer, text))
    context, whole = encode(prompt), encode(prompt + answer)
    if whole[: len(context)] == context:
        return context, whole[len(context) :]
    return context, tokenizer(answer, add_special_tokens=False)["input_ids"]


def without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Remove the end token that some tokenizers append to every text (``add_eos_token``)."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
    return ids[:length]


# ---------------------------------------------------------------------------------------------------------- whole rows


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row as a model gets it.

    Attributes:
        row: the row.
        ids: token ids, at most ``data.max_length_tokens``.
        learned: 1 for each token over which the loss is computed, else 0.
        length: number of tokens before truncation.
    """

    row: AnyRow
    ids: list[int]
    learned: list[int]
    length: int

    @property
    def is_cut(self) -> bool:
        """Whether the row was truncated."""
        return self.length > len(self.ids)

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted; the first token of a row never is."""
        return sum(self.learned[1:])


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows in their order; ``empty`` ones have no response, and ``refused`` ones no place in the chat template."""

    rows: list[EncodedRow]
    empty: int
    refused: list[str]


def encode_rows(rows: Sequence[AnyRow], tokenizer: Any, data: DataConfig, cache: Path | None = None) -> EncodedRows:
    """Encode rows: prompt, response and end token, a conversation by the chat template, or a text.

    Args:
        rows: of any kind.
        tokenizer: a tokenizer of transformers with an end token.
        data: template, masking, maximum length, and what to do with rows that the chat template refuses.
        cache: folder that keeps tokenized texts for later runs; any number of runs may share it. Conversations that the
            chat template renders are not kept.

    Raises:
        ConfigError: there is no chat template for conversations, or it refuses rows and ``data.broken_rows`` says so.
    """
    tokens = TokenCache(tokenizer, cache)
    found: list[EncodedRow] = []
    refused: list[str] = []
    learned_from = [row for row in rows if response_of(row)]
    for start in range(0, len(learned_from), _AT_ONCE):
        part = learned_from[start : start + _AT_ONCE]
        encode = _Encoder(tokenizer, data, part, tokens)
        for row in part:
            try:
                ids, learned = encode(row)
            except RowError as mistake:
                refused.append(f"{'' if isinstance(row, Row) else row.where}: {mistake}")
                continue
            limit = data.max_length_tokens
            found.append(EncodedRow(row=row, ids=ids[:limit], learned=learned[:limit], length=len(ids)))
    refuse_broken(refused, len(found), "the chat template", data.broken_rows)
    return EncodedRows(rows=found, empty=len(rows) - len(learned_from), refused=refused)


def response_of(row: AnyRow) -> str:
    """Return the text to learn without white space around it; of a conversation all messages."""
    if isinstance(row, Row):
        return render_response(row)
    if isinstance(row, TextRow):
        return row.text.strip()
    return row.messages if row.plain is None else row.plain[1].strip()


def size_of(row: AnyRow, data: DataConfig) -> int:
    """Return the number of characters of a row before its response."""
    if isinstance(row, Row):
        return len(render_prompt(row, data.template))
    return len(row.text) if isinstance(row, TextRow) else len(row.messages)


def is_chat(row: AnyRow, data: DataConfig, tokenizer: Any) -> bool:
    """Whether a row is rendered by the chat template."""
    source = data.source
    if not isinstance(row, ChatRow) or not isinstance(source, DatasetSource):
        return False
    if row.plain is None:
        return True
    return has_template(source, tokenizer) if source.chat is None else source.chat


class _Encoder:
    """Encodes rows of one data configuration."""

    def __init__(self, tokenizer: Any, data: DataConfig, rows: Sequence[AnyRow], cache: TokenCache) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._templates: dict[bool, str] = {}
        plain = [row for row in rows if not is_chat(row, data, tokenizer)]
        self._tokens = cache.encode([text for row in plain for text in self._texts(row)])

    def __call__(self, row: AnyRow) -> Encoded:
        ids, learned = self._encode(row)
        return ids, [1] * len(ids) if self._data.train_on_inputs else learned

    def _encode(self, row: AnyRow) -> Encoded:
        tokenizer = self._tokenizer
        if isinstance(row, ChatRow) and is_chat(row, self._data, tokenizer):
            return encode_chat(tokenizer, row, self._template(row.tools is not None))
        if isinstance(row, TextRow):
            ids = [*self._known(row.text), tokenizer.eos_token_id]
            return ids, [1] * len(ids)
        prompt, response = self._pair(row)
        context, answer = encode_pair(tokenizer, prompt, response, self._known)
        ids = [*context, *answer, tokenizer.eos_token_id]
        return ids, [0] * len(context) + [1] * (len(answer) + 1)

    def _texts(self, row: AnyRow) -> tuple[str, ...]:
        """What is tokenized of a row."""
        if isinstance(row, TextRow):
            return (row.text,)
        prompt, response = self._pair(row)
        return prompt, prompt + response

    def _pair(self, row: Row | ChatRow) -> tuple[str, str]:
        if isinstance(row, Row):
            return render_prompt(row, self._data.template), render_response(row)
        return row.plain or ("", "")

    def _known(self, text: str) -> list[int]:
        return without_end(self._tokenizer, self._tokens[text])

    def _template(self, tools: bool) -> str:
        if tools not in self._templates:
            source = self._data.source
            assert isinstance(source, DatasetSource)
            self._templates[tools] = find_template(source, self._tokenizer, tools=tools)
        return self._templates[tools]
