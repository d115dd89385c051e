"""How a check says that something does not keep the contract."""

from __future__ import annotations


class BrokenError(AssertionError):
    """The contract is broken; the message says how."""


def demand(holds: object, message: str) -> None:
    """Raise :class:`BrokenError` with the message unless ``holds`` is true."""
    if not holds:
        raise BrokenError(message)
