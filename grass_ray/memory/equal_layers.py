"""Follow a step through a few of a model's equal layers, and know what it takes with all of them.

Neighbouring layers that are built alike, train alike and are recomputed alike allocate and free the same, so a run of
them is followed through four: the first, the last, and two between them. What happens in the second of these is then
repeated once for each layer that was left out. That the two in between agree, and that nothing of theirs outlives them
but gradients, is checked; where it does not hold (a prefix, whose gradients of all layers meet at the end) the step is
followed through all layers. The sizes are the same to the byte::

    runs = equal_runs([LayerKind(layer) for layer in stack.modules], recomputed=10)
    with shortened(model, stack, runs) as marked:
        marked(log)                 # the log learns which layer allocates what
        ...                         # forward and backward
    step = ShortenedStep(runs, log.segments())
    peak = step.peak if step.repeats else ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from grass_ray.layerwise.stack import DecoderStack
from grass_ray.memory.allocations import AllocationLog, Parts, Segment, highest

# layers of a run that are followed: the first, two whose neighbours are alike, and the last
FOLLOWED = 4
# attributes that tell equal layers apart and change nothing
PLACES = {"layer_idx"}


@dataclass(frozen=True)
class Run:
    """Neighbouring layers that are alike: ``count`` of them from ``first`` on, as their ``kind`` says."""

    first: int
    count: int
    kind: Hashable

    @property
    def followed(self) -> tuple[int, ...]:
        """Indices of the layers that a shortened model has."""
        if self.count <= FOLLOWED:
            return tuple(range(self.first, self.first + self.count))
        return (self.first, self.first + 1, self.first + 2, self.first + self.count - 1)

    @property
    def left_out(self) -> int:
        """Number of layers that a shortened model does not have."""
        return self.count - len(self.followed)

    @property
    def key(self) -> Hashable:
        """Equal for runs whose followed layers allocate the same."""
        return self.kind, len(self.followed)


class LayerKind:
    """What decides what a layer allocates: how it is built, and what trains in it.

    Args:
        layer: does not change any more, but for what trains in it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._built = tuple(
            (
                name,
                type(module),
                *((key, value) for key, value in sorted(vars(module).items()) if _is_setting(key, value)),
            )
            for name, module in layer.named_modules()
        )
        self._parameters = dict(layer.named_parameters())
        self._held = tuple((name, p.shape, p.dtype) for name, p in self._parameters.items())

    def key(self, dropped: Collection[Tensor]) -> Hashable:
        """Equal for layers that allocate the same; ``dropped`` are parameters whose gradients are freed at once."""
        trains = tuple((p.requires_grad, p in dropped) for p in self._parameters.values())
        return self._built, self._held, trains


def equal_runs(layers: Sequence[LayerKind], recomputed: int, dropped: Collection[Tensor] = ()) -> list[Run]:
    """The runs of equal neighbours in ``layers``.

    Args:
        layers: all of a model's.
        recomputed: how many of them, from the first, are recomputed in backward.
        dropped: parameters whose gradients are freed as soon as they are there.
    """
    kinds = [(layer.key(dropped), index < recomputed) for index, layer in enumerate(layers)]
    runs: list[Run] = []
    for kind, own in groupby(kinds):
        first = runs[-1].first + runs[-1].count if runs else 0
        runs.append(Run(first, len(list(own)), kind))
    return runs


def _is_setting(name: str, value: object) -> bool:
    return name not in PLACES and (value is None or isinstance(value, (bool, int, float, str)))


@contextmanager
def shortened(model: nn.Module, stack: DecoderStack, runs: Iterable[Run]) -> Iterator[Callable[[AllocationLog], None]]:
    """In the block, ``model`` has only the followed layers of ``runs``.

    Yields:
        What makes a log mark where the forward and the backward pass of each of them begin, as ``(pass of the model,
        "forward" or "backward", index of the layer)``.
    """
    parent, _, name = stack.path.rpartition(".")
    home = model.get_submodule(parent)
    layers = getattr(home, name)
    followed = [index for run in runs for index in run.followed]
    handles: list[Any] = []
    passes = 0

    def mark_on(log: AllocationLog) -> None:
        def watch(index: int, layer: nn.Module) -> None:
            def begin(module: nn.Module, args: Any) -> None:
                nonlocal passes
                passes += index == followed[0]
                log.mark((passes, "forward", index))

            def end(module: nn.Module, args: Any, output: Any) -> None:
                hidden: Tensor = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    place = (passes, "backward", index)
                    hidden.register_hook(lambda gradient: log.mark(place))  # type: ignore[no-untyped-call]

            handles.extend((layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)))

        for index in followed:
            watch(index, stack.modules[index])

    setattr(home, name, nn.ModuleList(stack.modules[index] for index in followed))
    try:
        yield mark_on
    finally:
        for handle in handles:
            handle.remove()
        setattr(home, name, layers)


class ShortenedStep:
    """A step that was followed in a shortened model.

    Args:
        runs: the layers of the model it was followed in.
        segments: what it allocated.
    """

    def __init__(self, runs: Sequence[Run], segments: Sequence[Segment]) -> None:
        self._runs = runs
        self._segments = segments
        self.repeats = all(self._repeats(run) for run in runs if len(run.followed) == FOLLOWED)

    def peak(self, runs: Sequence[Run]) -> Parts:
        """The parts at the peak with the layers of ``runs``, whose keys are those of the runs that were followed."""
        times = self.times(runs)
        return highest(
            segment
            for segment in self._segments
            for _ in range(1 if segment.place is None else times.get(_layer(segment), 1))
        )

    def times(self, runs: Sequence[Run]) -> dict[int, int]:
        """How many layers of ``runs`` a followed layer stands for, by its index, where it is more than itself."""
        pairs = zip(self._runs, runs, strict=True)
        return {own.followed[2]: 1 + run.left_out for own, run in pairs if run.left_out}

    def _repeats(self, run: Run) -> bool:
        """Whether the two layers in the middle of a run do the same, and leave only gradients."""
        _, one, other, _ = run.followed
        second, third = ([s for s in self._segments if s.place and _layer(s) == index] for index in (one, other))
        same = [s.changes for s in second] == [s.changes for s in third]
        kept = [change for segment in third for change, kind in segment.changes if kind != "gradients"]
        return same and sum(kept) == 0


def _layer(segment: Segment) -> int:
    assert isinstance(segment.place, tuple)
    index: int = segment.place[2]
    return index
