"""A prompt and its answer as token ids: one way for training, generation, scoring and validation.

Generation goes on from the tokens of the prompt alone, so these always stand first. The answer's tokens are those that
it has behind the prompt, as lm-eval scores them: some tokenizers (Llama 2) put a space before an answer only when it is
encoded alone. Where the prompt's last characters and the answer's first ones would merge into a token that generation
cannot write, the answer is encoded alone::

    context, continuation = encode_pair(tokenizer, prompt, "the correct answer is true")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The token ids that an answer goes on from, special tokens before the text included."""
    return without_end(tokenizer, tokenizer(text)["input_ids"])


def encode_pair(
    tokenizer: Any, prompt: str, answer: str, encode: Callable[[str], list[int]] | None = None
) -> tuple[list[int], list[int]]:
    """The token ids of a prompt, and those of its answer without an end token.

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: the text before the answer.
        answer: the text to learn, write or score.
        encode: :func:`encode_prompt` of this tokenizer, where it remembers texts.
    """
    encode = encode or (lambda text: encode_prompt(tokenizer, text))
    context, whole = encode(prompt), encode(prompt + answer)
    if whole[: len(context)] == context:
        return context, whole[len(context) :]
    return context, tokenizer(answer, add_special_tokens=False)["input_ids"]


def without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Token ids of a prompt without the end token that some tokenizers put behind every text (``add_eos_token``)."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
    return ids[:length]
