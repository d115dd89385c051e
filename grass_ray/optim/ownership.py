"""Which LayerwiseAdamW a model's parameters belong to, so that a second one starts from the model as it was given.

An optimizer freezes what does not train now. Another one built on the same model (a notebook cell run twice) must not
mistake that for the user's choice.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Protocol

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary


class Owner(Protocol):
    """An optimizer that freezes parameters."""

    def synchronize(self) -> None:
        """Finish what is under way on the model."""

    def retire(self) -> None:
        """Remove all hooks, and refuse further steps."""


# for every parameter that required a gradient when an optimizer was built on it: that optimizer
_OWNERS = WeakTensorKeyDictionary()
# which optimizer a sampler serves
_SERVED = WeakIdKeyDictionary()


class Takeover:
    """Gives a new optimizer the parameters that an earlier one froze; after an error they are frozen again.

    Args:
        model: what the new optimizer is built on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owned = [p for p in model.parameters() if p in _OWNERS]
        self._frozen = [p for p in self._owned if not p.requires_grad]
        self._earlier = {id(other): other for p in self._owned if (other := _OWNERS[p]()) is not None}

    def __enter__(self) -> Takeover:
        for other in self._earlier.values():
            other.synchronize()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def complete(self, owner: Owner, parameters: list[nn.Parameter]) -> None:
        """Make ``owner`` the one that ``parameters`` belong to, and retire those they belonged to."""
        for other in self._earlier.values():
            other.retire()
        if self._frozen:
            warnings.warn(
                f"an earlier LayerwiseAdamW froze {len(self._frozen)} parameters of this model; they are the new one's "
                "now, and the earlier one cannot be used any more. To keep some of them frozen, freeze them before the "
                "first optimizer is built",
                stacklevel=3,
            )
        for parameter in parameters:
            _OWNERS[parameter] = weakref.ref(owner)


def check_not_retired(retired: bool) -> None:
    """Raise RuntimeError if another optimizer has taken over the model."""
    if retired:
        raise RuntimeError("another LayerwiseAdamW was built on this model after this one; step that one")


def claim_sampler(sampler: object, owner: Owner) -> None:
    """Let ``sampler`` serve ``owner`` from now on, and no other optimizer."""
    _SERVED[sampler] = weakref.ref(owner)


def check_sampler(sampler: object, owner: Owner) -> None:
    """Raise RuntimeError if ``sampler`` does not serve ``owner``."""
    if sampler not in _SERVED or _SERVED[sampler]() is not owner:
        raise RuntimeError(
            "the sampler was given to another optimizer after this one, or put here after it was built; build each "
            "optimizer with a sampler of its own"
        )
