"""Private random generators, keyed by what they are for: ``keyed_generator("draw", seed, index)``.

Whatever else draws random numbers, on whichever worker, after whichever resume: the same key gives the same stream.
"""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that ``key`` alone decides.

    The key is hashed, since torch's CPU generator looks at the low 32 bits of a seed only.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
