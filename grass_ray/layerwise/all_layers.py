"""Every layer trains at every step: full fine-tuning and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from grass_ray.layerwise.sampler import Sampler


class AllLayersSampler(Sampler):
    """Every layer trains at every step: full fine-tuning and adapters."""

    trains_all: ClassVar[bool] = True

    def __init__(self) -> None:
        self._drawn = False

    @property
    def due(self) -> bool:
        """Whether the one and only active set is still to be drawn."""
        return not self._drawn

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with ``len(sizes)`` units."""
        super().start(sizes, total)
        self._drawn = False

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """All units."""
        return [tuple(range(len(weights)))]

    def sample(self) -> tuple[int, ...]:
        """All units."""
        self._drawn = True
        return tuple(range(self._num_units))

    def state_dict(self) -> dict[str, Any]:
        """Whether the set was drawn."""
        return super().state_dict() | {"drawn": self._drawn}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._drawn = bool(state["drawn"])
