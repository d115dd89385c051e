"""A prompt and its answer as token ids: one way for training, generation, scoring and validation.

The answer is encoded apart from the prompt. That is what generation does by nature: it goes on from the tokens of the
prompt alone. Encoded together, the two would share tokens in which the prompt's last characters and the answer's first
ones merge, and some tokenizers (Llama 2) put a space before an answer only when it stands alone::

    ids = encode_prompt(tokenizer, prompt) + encode_answer(tokenizer, "the correct answer is true")
"""

from __future__ import annotations

from typing import Any


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The token ids that an answer goes on from, special tokens before the text included."""
    return without_end(tokenizer, tokenizer(text)["input_ids"])


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    """The token ids of an answer, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Token ids of a prompt without the end token that some tokenizers put behind every text (``add_eos_token``)."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
    return ids[:length]
