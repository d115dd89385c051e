"""Cache of tokenized texts, in files that any number of processes may read and write.

The name of a file is a hash of the tokenizer and of all texts, so a file never becomes outdated; one that was not read
for three months is deleted. If it is missing or broken, the texts are tokenized again::

    cache = TokenCache(tokenizer, folder)         # folder None keeps nothing
    tokens = cache.encode(["What is 2 + 3?"])     # {"What is 2 + 3?": [1780, 314, ...]}
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy

# age at which a file is deleted: what killed processes left, since one takes seconds to write, and what nobody reads
_KEPT_S = {".part": 3600.0, ".npz": 90 * 24 * 3600.0}
_AT_ONCE = 1000
MIN_TEXTS = 8  # as many texts or fewer are tokenized faster than their file is read


class TokenCache:
    """Tokenizes texts, with special tokens, and keeps the result in ``folder``, unless that is None."""

    def __init__(self, tokenizer: Any, folder: Path | None) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._name: str | None = None

    def encode(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return the token ids of each text."""
        texts = list(dict.fromkeys(texts))
        path = self._path(texts) if self._folder is not None and len(texts) > MIN_TEXTS else None
        tokens = None if path is None else _read(path, len(texts))
        if tokens is None:
            # in parts: what a tokenizer returns takes many times the memory of the ids
            parts = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
            tokens = [ids for part in parts for ids in self._tokenizer(part)["input_ids"]]
            if path is not None:
                _write(path, tokens)
        return dict(zip(texts, tokens, strict=True))

    def _path(self, texts: Sequence[str]) -> Path:
        assert self._folder is not None
        if self._name is None:
            self._name = _identify(self._tokenizer)
        digest = hashlib.sha256(self._name.encode())
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return self._folder / f"{digest.hexdigest()[:32]}.npz"


def _identify(tokenizer: Any) -> str:
    """Return a text that is equal for two tokenizers only if they tokenize all texts equally."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules |= {"padding": None, "truncation": None}  # these change from call to call
        rules_text = json.dumps(rules, sort_keys=True)
    else:
        kind, settings = type(tokenizer).__name__, sorted(tokenizer.init_kwargs.items())
        rules_text = f"{kind}\n{settings}\n{json.dumps(tokenizer.get_vocab(), sort_keys=True)}"
    return f"{tokenizer.special_tokens_map}\n{rules_text}"


def _read(path: Path, count: int) -> list[list[int]] | None:
    """Read the token ids of ``count`` texts; None if the file is missing or broken."""
    try:
        with numpy.load(path, allow_pickle=False) as file:
            ids, lengths = file["ids"], file["lengths"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if len(lengths) != count or int(lengths.sum()) != len(ids):
        return None
    with suppress(OSError):  # a folder that may only be read
        os.utime(path)
    ends = numpy.cumsum(lengths)
    return [part.tolist() for part in numpy.split(ids, ends[:-1])]


def _write(path: Path, tokens: Sequence[Sequence[int]]) -> None:
    """Write a file completely or not at all; errors are ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.iterdir():
            with suppress(OSError):  # another process deletes it
                if other.stat().st_mtime < time.time() - _KEPT_S.get(other.suffix, math.inf):
                    other.unlink()
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            numpy.savez_compressed(
                file,
                ids=numpy.fromiter(itertools.chain.from_iterable(tokens), dtype=numpy.int32),
                lengths=numpy.array([len(ids) for ids in tokens], dtype=numpy.int64),
            )
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk
