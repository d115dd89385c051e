"""What an optimizer cannot do and must not try in silence."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class OneModelOptimizer(torch.optim.Optimizer):
    """An optimizer whose parameters and hooks belong to one model, which it takes when it is built.

    It is complete as soon as it has the attribute ``units``.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: which parameters are trained is decided when the optimizer is built.

        Raises:
            ValueError: always, once the optimizer is built.
        """
        if hasattr(self, "units"):
            raise ValueError(
                "LayerwiseAdamW trains parts of its model, chosen when it is built (train_embeddings, train_head, "
                "train_norm and the sampler); train other parameters with an optimizer of their own"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: hooks and states belong to the parameters of one model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "LayerwiseAdamW cannot be copied or pickled: it belongs to the parameters of its model. Copy the model, "
            "build another optimizer on the copy, and give it load_state_dict(optimizer.state_dict())"
        )


def refuse_half(names: Sequence[str]) -> None:
    """Raise ValueError when parameters that should train, given by name, are float16."""
    if names:
        raise ValueError(
            f"{len(names)} parameters that should train are float16 ({', '.join(names[:3])}): updates are below its "
            "resolution, and squared gradients below its range. Load the model in bfloat16; or in float32, computing "
            "in float16 under torch.autocast with a GradScaler"
        )


def refuse_checkpoint_api() -> None:
    """torch.distributed.checkpoint.state_dict keeps a parameter's state and nothing else, and offers no hook to say so.

    Raises:
        RuntimeError: it is calling.
    """
    frame = sys._getframe(2)
    for _ in range(6):
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            raise RuntimeError(
                "torch.distributed.checkpoint.state_dict would lose the sampler's state and those of frozen layers; "
                "save optimizer.state_dict() on every worker, or optimizer.full_state_dict(), and load it with "
                "load_state_dict"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def described(state: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]) -> str:
    """The names of a parameter's states with their shapes and dtypes, where these are given."""
    return ", ".join(name if kind is None else f"{name} {list(kind[0])} {kind[1]}" for name, kind in state.items())
