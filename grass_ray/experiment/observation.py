"""What a search algorithm knows of a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grass_ray.experiment.space import Params


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A trial of a search.

    Args:
        params: the point that was tried.
        loss: the loss on held-out rows; None while the trial runs, NaN if it failed.
        rungs: losses during training, by step.
        stopped: whether it was stopped early; it is then judged by ``rungs``.
    """

    params: Params
    loss: float | None = None
    rungs: Mapping[int, float] = field(default_factory=dict)
    stopped: bool = False
