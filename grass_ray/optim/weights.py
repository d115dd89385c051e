"""Where the weights of decoder layers live that do not train now: on the device, or on the host.

:class:`ResidentWeights` leaves all on the device. :class:`StreamedWeights` keeps those of frozen layers in host memory
and brings each layer's to the device just ahead of its forward and of its backward, through a ring of two slots, each
as large as a layer. Layers that train stay on the device. The weights are the same bits either way.

- Outside of its layer's passes ``parameter.data`` is the host copy: whatever reads or saves weights finds them there.
- A layer's slot follows from its place among the streamed layers. So when its backward begins, its weights are where
  they were in forward, and what autograd has saved of them (views of the slot) is valid again.
- A slot's next layer is the first one to be needed of those that belong there. The last layers of forward stay for
  backward, and the first ones come back under the last part of backward.
- A copy starts when the layer before it in the slot is done with, on a stream of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from grass_ray.layerwise.stack import DecoderStack
from grass_ray.optim.hooks import WeakHook, in_backward
from grass_ray.optim.host_weights import HostWeights, check_streamable, streamable_weights
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.parts import Parts
from grass_ray.optim.streaming import OffloadStats
from grass_ray.optim.streams import make_streams

# where weights begin in a slot: what kernels want, and more
ALIGNMENT = 512


class ResidentWeights:
    """All weights on the device (``weights="resident"``), and the base class of those that are not.

    Attributes:
        streams: weights of layers that do not train are on the host.
    """

    streams: ClassVar[bool] = False

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return 0

    def settle(self, trained: Iterable[nn.Parameter]) -> None:
        """These parameters train from now on; updates of those that trained before must be done."""

    def rest(self) -> None:
        """No pass is under way: let every parameter be what is to be read, saved or changed."""

    def on_device(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Those of ``parameters`` that are on the device between steps, and a ring that the others pass through."""
        yield from parameters


@dataclass(eq=False)
class Slot:
    """A place in the ring.

    Attributes:
        index: its number.
        memory: its bytes.
        layer: whose weights are here, or on their way; None for none.
        versions: of that layer's parameters when they were fetched, which tell whether they have changed since.
        fetched: event of the copy.
        released: event after the last pass that has read the slot.
    """

    index: int
    memory: Tensor
    layer: int | None = None
    versions: tuple[int, ...] = ()
    fetched: Any = None
    released: Any = None


class StreamedWeights(ResidentWeights):
    """Weights of layers that do not train, on the host (``weights="streamed"``).

    Args:
        model: whose weights are moved to the host.
        parts: the model taken apart.
        options: of the optimizer.
        stats: what to count into.

    Raises:
        ValueError: these weights cannot be streamed.
        MemoryError: the host has too little memory.
    """

    streams: ClassVar[bool] = True

    def __init__(self, model: nn.Module, parts: Parts, options: LayerwiseOptions, stats: OffloadStats) -> None:
        stack = parts.stack
        layers = streamable_weights(model, stack, parts.managed)
        check_streamable(stack, layers, sharded=parts.shards is not None)
        self._device = parts.device
        self._stats = stats
        self._streams = options.streams or make_streams(parts.device, merged=False)
        self._host = HostWeights(parts.device)
        self._layers = layers
        self._places, size = _places(layers)
        count = min(options.weight_slots, len(layers))
        self._ring = torch.empty(count * size, dtype=torch.uint8, device=parts.device)
        self._slots = [Slot(index, self._ring[index * size : (index + 1) * size]) for index in range(count)]
        # of each streamed layer
        self._slot_of: dict[int, Slot] = {}
        self._in_slot: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._trained: set[nn.Parameter] = set()
        # the layer whose parameters are in its slot now, the last one of the forward under way, and the lowest one that
        # backward will reach
        self._current: int | None = None
        self._last = -1
        self._lowest: int | None = None
        self._move(stack)
        self._assign_slots()

    def _move(self, stack: DecoderStack) -> None:
        """Weights to the host, everything else of the layers to the device."""
        streamable = {p for layer in self._layers for p in layer}
        for module in stack.modules:
            for inner in module.modules():
                for name, buffer in inner._buffers.items():
                    inner._buffers[name] = None if buffer is None else buffer.to(self._device)
            for parameter in module.parameters():
                if parameter not in streamable:
                    parameter.data = parameter.data.to(self._device)
        self._host.take(p for layer in self._layers for p in layer)

    def hook(self, layers: Sequence[nn.Module]) -> Iterator[Any]:
        """Follow the passes of the decoder layers; the handles of the hooks."""
        rest = WeakHook(self.rest)
        for index, module in enumerate(layers):
            yield from (
                module.register_forward_pre_hook(WeakHook(self._forward_begins, index)),
                module.register_forward_hook(_AfterForward(self._forward_ends, index)),
                module.register_state_dict_pre_hook(rest),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_pre_hook(rest),  # type: ignore[no-untyped-call]
            )

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return self._host.bytes

    def on_device(self, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
        """Those of ``parameters`` that are on the device between steps, and the ring."""
        away = {p for own in self._in_slot.values() for p, _ in own}
        yield from (p for p in parameters if p not in away)
        yield self._ring

    # ------------------------------------------------------------------------------------------------ what trains now

    def settle(self, trained: Iterable[nn.Parameter]) -> None:
        """Bring the weights that train from now on to the device to stay; first write those back that trained before.

        Waits for the copies to the host, so that both never add up on the device.
        """
        wanted = set(trained) & self._host.parameters
        enter, leave = wanted - self._trained, self._trained - wanted
        if not enter and not leave:
            return
        self.rest()
        for layer, parameter in self._of_layers(leave):
            with self._streams.on("compute", writes=[("host weights", layer)]):
                self._host.of(parameter).copy_(parameter.data, non_blocking=True)
            self._stats.weight_bytes_out += parameter.nbytes
        if leave:
            arrived = self._streams.record("compute")
            self._streams.wait_on_host(arrived, "weights are on the host before they are read there")
        for parameter in leave:
            parameter.data = self._host.of(parameter)
        for layer, parameter in self._of_layers(enter):
            with self._streams.on("compute", reads=[("host weights", layer)]):
                parameter.data = self._host.of(parameter).to(self._device, non_blocking=True, copy=True)
            self._stats.weight_bytes_in += parameter.nbytes
        self._trained = wanted
        self._assign_slots()

    def _of_layers(self, parameters: Collection[nn.Parameter]) -> Iterator[tuple[int, nn.Parameter]]:
        return ((index, p) for index, layer in enumerate(self._layers) for p in layer if p in parameters)

    def _assign_slots(self) -> None:
        """Streamed layers take turns in the slots, in the order of forward."""
        self._slot_of, self._in_slot = {}, {}
        for index, layer in enumerate(self._layers):
            streamed = [p for p in layer if p not in self._trained]
            if streamed:
                slot = self._slots[len(self._slot_of) % len(self._slots)]
                self._slot_of[index] = slot
                self._in_slot[index] = [(p, _view(slot.memory, self._places[p], p)) for p in streamed]

    def rest(self) -> None:
        """No pass is under way: every parameter is where it is to be read, saved or changed; slots are filled anew."""
        self._leave()
        for slot in self._slots:
            slot.layer = None

    # ------------------------------------------------------------------------------------------------- during a pass

    def _forward_begins(self, layer: int) -> None:
        self._enter(layer)
        if not in_backward():
            if layer <= self._last:
                self._lowest = None  # another forward
            self._last = layer
            self._fill_slots(self._after_forward(layer))

    def _forward_ends(self, layer: int, output: Any) -> None:
        if in_backward():
            return  # the layer is computed again, and its backward comes next
        reached = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        for tensor in reached:
            tensor.register_hook(WeakHook(self._backward_begins, layer))  # type: ignore[no-untyped-call]
        if reached and self._lowest is None:
            self._lowest = layer
        self._leave()
        self._fill_slots(self._after_forward(layer + 1))

    def _backward_begins(self, layer: int) -> None:
        """The gradient of a layer's output is complete, so the backward of all layers above it is done."""
        self._enter(layer)
        lowest = layer if self._lowest is None else self._lowest
        self._fill_slots(itertools.chain(range(layer, lowest - 1, -1), range(len(self._layers))))

    def _after_forward(self, layer: int) -> Iterator[int]:
        """Layers in the order in which they will be needed, while forward is about to begin with ``layer``."""
        top = len(self._layers)
        backward = range(top - 1, self._lowest - 1, -1) if self._lowest is not None else ()
        return itertools.chain(range(layer, top), backward, range(top))

    def _enter(self, layer: int) -> None:
        """Let the parameters of a layer be in its slot, and those of the layer before on the host again."""
        if layer == self._current:
            return
        self._leave()
        if layer not in self._slot_of:
            return
        slot = self._slot_of[layer]
        if slot.layer != layer or slot.versions != self._versions(layer):
            self._fetch(layer)
        self._streams.wait("compute", slot.fetched, "weights are on the device before a pass reads them")
        for parameter, view in self._in_slot[layer]:
            parameter.data = view
        self._current = layer

    def _leave(self) -> None:
        if self._current is None:
            return
        for parameter, _ in self._in_slot[self._current]:
            parameter.data = self._host.of(parameter)
        self._slot_of[self._current].released = self._streams.record("compute")
        self._current = None

    def _fill_slots(self, coming: Iterable[int]) -> None:
        """Fetch for each slot the first of the ``coming`` layers that belongs there, unless it is there."""
        seen: set[int] = set()
        for layer in coming:
            slot = self._slot_of.get(layer)
            if slot is not None and slot.index not in seen:
                seen.add(slot.index)
                if slot.layer != layer:
                    self._fetch(layer)
                if len(seen) == len(self._slots):
                    return

    def _fetch(self, layer: int) -> None:
        slot = self._slot_of[layer]
        if slot.released is not None:
            self._streams.wait("weights", slot.released, "a slot is filled again after a pass has read it")
        memory = [("weight slot", slot.index)]
        with self._streams.on("weights", reads=[("host weights", layer)], writes=memory):
            for parameter, view in self._in_slot[layer]:
                view.copy_(self._host.of(parameter), non_blocking=True)
                self._stats.weight_bytes_in += view.nbytes
        slot.layer, slot.versions, slot.fetched = layer, self._versions(layer), self._streams.record("weights")

    def _versions(self, layer: int) -> tuple[int, ...]:
        return tuple(p._version for p, _ in self._in_slot[layer])


class _AfterForward(WeakHook):
    """Passes on the output of the module, which a forward hook is called with last."""

    def __call__(self, *given: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*self._given, given[-1])


def _places(layers: Sequence[Sequence[nn.Parameter]]) -> tuple[dict[nn.Parameter, int], int]:
    """Where in its layer's slot each weight begins, and the bytes of a slot that is large enough for any layer."""
    places: dict[nn.Parameter, int] = {}
    sizes = [0]
    for layer in layers:
        end = 0
        for parameter in layer:
            places[parameter] = end
            end += math.ceil(parameter.nbytes / ALIGNMENT) * ALIGNMENT
        sizes.append(end)
    return places, max(sizes)


def slot_bytes(layers: Sequence[Sequence[nn.Parameter]]) -> int:
    """Bytes of a slot for the largest of ``layers``."""
    return _places(layers)[1]


def _view(memory: Tensor, begin: int, parameter: nn.Parameter) -> Tensor:
    return memory[begin : begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)


def make_weights(
    model: nn.Module, parts: Parts, options: LayerwiseOptions, stats: OffloadStats, handles: list[Any]
) -> ResidentWeights:
    """Place the weights of a model as ``options.weights`` says; see :class:`StreamedWeights`.

    ``handles`` takes up those of all hooks on the model.
    """
    if options.weights == "resident":
        return ResidentWeights()
    weights = StreamedWeights(model, parts, options, stats)
    handles.extend(weights.hook(parts.stack.modules))
    return weights
