"""The same layers throughout: a control that chooses nothing while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from grass_ray.layerwise.all_layers import AllLayersSampler
from grass_ray.layerwise.sampler import require


class FixedSampler(AllLayersSampler):
    """The same layers throughout: a third of them, or those with given indices.

    All thirds have the same number of layers, a third of all rounded to the nearest and at least one, so that they may
    be compared; the middle one may then share a layer with a neighbour, or leave one between them.

    Args:
        layers: ``"first"``, ``"middle"`` or ``"last"`` third, or distinct indices of layers, from 0.

    Raises:
        ValueError: neither a third nor distinct indices.
    """

    trains_all: ClassVar[bool] = False

    def __init__(self, layers: Literal["first", "middle", "last"] | Sequence[int] = "middle") -> None:
        super().__init__()
        if isinstance(layers, str):
            require(
                layers in ("first", "middle", "last"), "layers", layers, "first, middle, last, or indices of layers"
            )
        else:
            distinct = len(set(layers)) == len(layers) > 0 and min(layers) >= 0
            require(distinct, "layers", list(layers), "at least one index from 0, each only once")
        self.layers = layers
        self._active: tuple[int, ...] = ()

    def start(self, sizes: Sequence[int], total: int | None = None) -> None:
        """Begin with ``len(sizes)`` units. Raises ValueError if they have no such layers."""
        super().start(sizes, total)
        count = len(sizes)
        if isinstance(self.layers, str):
            size = max(1, round(count / 3))
            first = {"first": 0, "middle": (count - size) // 2, "last": count - size}[self.layers]
            self._active = tuple(range(first, first + size))
        else:
            require(max(self.layers) < count, "layers", list(self.layers), f"below {count}, the number of layers")
            self._active = tuple(sorted(self.layers))

    def largest_active_sets(self, weights: Sequence[int]) -> list[tuple[int, ...]]:
        """The one set there is."""
        return [self._active]

    def sample(self) -> tuple[int, ...]:
        """The one set there is."""
        super().sample()
        return self._active

    def state_dict(self) -> dict[str, Any]:
        """Whether the set was drawn, and which it is."""
        return super().state_dict() | {"active": list(self._active)}

    def _restore(self, state: Any) -> None:
        super()._restore(state)
        if list(state["active"]) != list(self._active):
            raise ValueError(f"the saved state trains the layers {state['active']}, this sampler {list(self._active)}")
