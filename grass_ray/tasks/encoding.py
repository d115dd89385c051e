"""Encode a prompt and its answer, in the same way for training, generation, scoring and validation.

The tokens of the prompt are those of the prompt alone, since generation continues from them. The tokens of the answer
are those that follow them if both are encoded together, as lm-eval does: some tokenizers (Llama 2) insert a space if an
answer is encoded alone. It is encoded alone only if the last characters of the prompt and the first of the answer would
merge into one token, which generation could not produce::

    context, continuation = encode_pair(tokenizer, prompt, "the correct answer is true")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
