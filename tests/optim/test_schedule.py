"""When streamed work would be done on a GPU: the optimizer itself runs, on streams that only add up times.

Copies take as long as was measured on an H200, and so do the passes of LLaMA2-7B in bfloat16 with 4 x 1024 tokens
(benchmarks/results/offload_h200.md). The model is a small one with as many layers, cut into about as many chunks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pytest
import torch
from small import backward, make_llama, make_optimizer

from grass_ray import UniformSampler
from grass_ray.optim import layerwise_adamw, streamed
from grass_ray.optim.room import Room
from grass_ray.optim.streamed import Lazy

LAYERS = 32
# bytes of a layer's bfloat16 moments; bytes in a millisecond, alone and while copies go both ways
LAYER_BYTES = 809.5e6
ALONE, BOTH = 55e6, 47e6
# milliseconds: forward of a layer, backward of a frozen and of an active one, head and loss both ways; a layer's update
FORWARD, FROZEN, ACTIVE, HEAD, UPDATE = 3.6, 3.6, 7.2, 14.0, 1.5
# 8.3 GiB of activations in slots of 64 MiB: so many are freed by the backward of each layer
FREED = 4
CHUNK = 32 * 1024


class TimedStreams:
    """Streams whose work takes time, none of it here: an event is the time at which it happens."""

    def __init__(self) -> None:
        self.sizes: dict[Hashable, float] = {}
        self.done = dict.fromkeys(("compute", "fetch", "update", "write"), 0.0)
        self.chunks_of: dict[str, int] = {}

    @contextlib.contextmanager
    def on(self, name: str, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()) -> Iterator[None]:
        if name in ("fetch", "write"):
            nbytes = sum(self.sizes.get(memory, 0.0) for memory in (*reads, *writes))
            other = self.done["write" if name == "fetch" else "fetch"]
            self.done[name] += nbytes / (BOTH if other > self.done[name] else ALONE)
        if name == "update":
            self.done[name] += UPDATE * CHUNK / self.layer_bytes
        yield

    def compute(self, milliseconds: float) -> None:
        self.done["compute"] += milliseconds

    def record(self, name: str) -> float:
        return self.done[name]

    def wait(self, name: str, event: float, reason: str) -> None:
        self.done[name] = max(self.done[name], event)

    def wait_on_host(self, event: float, reason: str) -> None:
        """The host is far ahead of all streams."""


class Fixed(UniformSampler):
    """Always the same layers."""

    def __init__(self, active: tuple[int, ...]) -> None:
        super().__init__(len(active), 10_000)
        self._fixed = active

    def sample(self) -> tuple[int, ...]:
        super().sample()
        return self._fixed


class Simulation:
    """Training of the small model, whose passes and copies take the time, and the memory, of a large one's.

    Args:
        active: layers that train.
        freed: memory that a layer's forward keeps for its backward, in slots; None lends nothing.
        again: milliseconds in which backward computes a layer again.
    """

    def __init__(self, active: tuple[int, ...], freed: float | None = FREED, again: float = 0.0) -> None:
        self.model: Any = make_llama(layers=LAYERS, hidden=72)
        self.streams = TimedStreams()
        self.optimizer = make_optimizer(
            self.model,
            Fixed(active),
            lr=1e-3,
            offload="lazy",
            precision="weights",
            chunk_bytes=CHUNK,
            streams=self.streams,
        )
        self.active, self.freed, self.again = active, freed, again
        placement = self.optimizer._placement
        assert isinstance(placement, Lazy)
        self.placement = placement
        # as many bytes as float32 weights have here are six slots, as many as bfloat16 ones have there
        self.gradient = sum(p.nbytes for p in self.optimizer.stack.layers[0])
        scale = LAYER_BYTES / (2 * self.gradient)
        self.streams.layer_bytes = LAYER_BYTES / scale  # type: ignore[attr-defined]
        self.streams.sizes = {
            ("block", chunk.name): chunk.nbytes * scale
            for unit in placement.host.units
            for chunk in placement.host.chunks(unit)
        }
        self.kept = self.gradients = 0.0
        self.peak = self.most_lent = 0.0
        self._follow_passes()

    def _follow_passes(self) -> None:
        room = self.placement.room
        room.in_use = lambda: (self.held, 2**40)  # type: ignore[method-assign, assignment, return-value]
        arrive = room.backward

        def arriving(layer: int, **given: Any) -> None:
            self.kept = (self.freed or 0) * CHUNK * (layer + 1)
            arrive(layer, **given)

        room.backward = arriving  # type: ignore[method-assign]
        if self.freed is None:
            self.placement._slots_to_borrow = lambda: 0  # type: ignore[method-assign]
        self.model.lm_head.register_forward_pre_hook(lambda *_: self.streams.compute(HEAD))
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._forward(index))
            # the gradient of its output is there: only now its backward takes time
            layer.register_forward_hook(lambda module, inputs, output, index=index: self._follow(output, index))

    @property
    def lent(self) -> int:
        return CHUNK * len(self.placement.streamer.borrowed)

    @property
    def held(self) -> float:
        return self.kept + self.gradients + self.lent

    def _forward(self, layer: int) -> None:
        self.streams.compute(FORWARD)
        if layer in self.active:
            self.gradients = max(0.0, self.gradients - self.gradient)
        self.kept = (self.freed or 0) * CHUNK * (layer + 1)
        self.peak = max(self.peak, self.held)

    def _follow(self, output: torch.Tensor, layer: int) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self._backward(layer))

    def _backward(self, layer: int) -> None:
        self.streams.compute((ACTIVE if layer in self.active else FROZEN) + self.again)
        if layer in self.active:
            self.gradients += self.gradient
        self.most_lent = max(self.most_lent, self.lent)
        # on top of what is held each layer needs as much again as it keeps, and more if it is computed again
        self.peak = max(self.peak, self.held + (1 if not self.again else 8) * (self.freed or 0) * CHUNK)

    def run(self) -> tuple[float, float]:
        """Milliseconds of a lazy step, and of one whose states are resident."""
        times = []
        for step in range(5):
            started = self.streams.done["compute"]
            backward(self.model, step, rows=1, tokens=2)
            self.optimizer.step()
            self.optimizer.zero_grad()
            times.append(self.streams.done["compute"] - started)
        down = sum(self.again + (ACTIVE if i in self.active else FROZEN) for i in range(min(self.active), LAYERS))
        return times[-1], HEAD + LAYERS * FORWARD + down + UPDATE * len(self.active)


PAIRS = [(3, 7), (4, 29), (0, 1), (0, 31), (1, 2), (15, 16), (30, 31)]


@pytest.mark.parametrize("active", PAIRS)
def test_lazy_takes_as_long_as_resident_whatever_is_active(active: tuple[int, ...]) -> None:
    lazy, resident = Simulation(active).run()
    assert lazy <= 1.03 * resident


@pytest.mark.long
def test_lazy_takes_as_long_as_resident_for_many_pairs() -> None:
    ratios = {}
    for active in itertools.combinations((0, 1, 2, 3, 5, 8, 12, 20, 29, 31), 2):
        lazy, resident = Simulation(active).run()
        ratios[active] = lazy / resident
    assert max(ratios.values()) <= 1.03, ratios


@pytest.mark.parametrize("active", PAIRS)
@pytest.mark.parametrize("again", [0.0, FORWARD])
def test_the_peak_is_that_of_a_training_that_lends_nothing(active: tuple[int, ...], again: float) -> None:
    """Layers that are computed again keep an eighth, and lend less."""
    freed = FREED / 8 if again else FREED
    lending, without = Simulation(active, freed, again), Simulation(active, freed, again)
    without.placement._slots_to_borrow = lambda: 0  # type: ignore[method-assign]
    lending.run()
    without.run()
    assert lending.peak == without.peak
    assert (lending.most_lent > 0) == (min(active) < (10 if again else 20))


def test_layers_that_are_computed_again_free_little() -> None:
    """Copies have a third more time then, which is enough unless the lowest layers train."""
    ratios = {}
    for active in ((0, 1), (2, 5), (3, 7), (4, 29)):
        lazy, resident = Simulation(active, FREED / 8, FORWARD).run()
        ratios[active] = lazy / resident
    assert 1.05 < ratios[0, 1] < 1.08
    assert 1.03 < ratios[2, 5] < 1.04
    assert max(ratios[3, 7], ratios[4, 29]) <= 1.03


def test_without_borrowed_memory_low_layers_wait() -> None:
    free = {active: Simulation(active, None).run() for active in ((0, 1), (3, 7), (4, 29))}
    waited = {active: lazy - resident for active, (lazy, resident) in free.items()}
    assert waited[0, 1] > 20
    assert waited[3, 7] < 0.03 * free[3, 7][1]
    assert waited[4, 29] < 0


def test_the_order_of_backward_makes_low_layers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper layers first, each fetched when backward reached it: with layers 3 and 7 an H200 waited 30 ms.

    With layers 4 and 29 none was measured, where 17 ms are simulated: these times err on the side of waiting.
    """

    def downwards(units: Iterable[Any]) -> list[Any]:
        return sorted(units, key=lambda unit: -unit.layer)

    def when_reached(self: Lazy, layer: int) -> None:
        self.streamer.prefetch([unit for unit in self._coming if unit.layer == layer], layer, lambda: 0)

    for module in (streamed, layerwise_adamw):
        monkeypatch.setattr(module, "in_order_of_forward", downwards)
    monkeypatch.setattr(Lazy, "_backward_begins", when_reached)
    lazy, resident = Simulation((3, 7), None).run()
    assert 15 < lazy - resident < 35


def test_what_a_step_can_lend_follows_from_the_step_before() -> None:
    """Two passes a step, whose layers 0 to 2 are computed again: only the last one lends, from layer 2 on."""
    room, used = Room(torch.device("cpu")), [0]
    room.in_use = lambda: (used[0], 1000)  # type: ignore[method-assign]
    lent = []
    for step in range(3):
        for micro in range(2):
            room.forward()
            for layer in (3, 2, 1, 0):
                used[0] = 100 * layer
                room.backward(layer, again=False, lent=0)
                if layer <= 2:
                    room.backward(layer, again=True, lent=0)
                if amount := room.bytes(to_come=50):
                    lent.append((step, micro, layer, amount))
        room.end_step()
    assert lent == [(step, 1, layer, amount) for step in (1, 2) for layer, amount in ((1, 50), (0, 150))]
    room.forward()
    room.in_use = lambda: (used[0], used[0] + 7)  # type: ignore[method-assign]
    for used[0] in (900, 100):
        room.backward(3 if used[0] == 900 else 0, again=False, lent=0)
    assert room.bytes(to_come=0) == 0  # the first of two passes
