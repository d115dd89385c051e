"""Weights of decoder layers in host memory: which of them can live there, and page-locked copies of those that do."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence, Set

import torch
from torch import Tensor, nn

from grass_ray.layerwise.stack import DecoderStack, find_decoder_stack
from grass_ray.optim.host_memory import RESERVE_BYTES, available_bytes

# torch rounds every block of pinned memory up to a power of two; larger tensors are allocated exactly, then page-locked
SMALL_BYTES = 1024 * 1024
OUTSIDE = -1


def streamable_weights(
    model: nn.Module, stack: DecoderStack, managed: Collection[nn.Parameter]
) -> list[list[nn.Parameter]]:
    """The weights of each decoder layer that can live on the host while the layer does not train.

    What several layers share, or what is used outside of its layer, is left out, and so is what adapters train: it is
    small, and always on the device.

    Args:
        model: the whole model, adapters included.
        stack: the model taken apart.
        managed: the parameters that the optimizer trains.
    """
    adapters = set(managed) if hasattr(model, "get_base_model") else set()
    layer_of = {f"{stack.path}.{index}": index for index in range(stack.num_layers)}
    depth = len(stack.path.split(".")) + 1
    users: dict[nn.Parameter, set[int]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[parameter].add(layer_of.get(".".join(name.split(".")[:depth]), OUTSIDE))
    return [
        [p for p in parameters if p not in adapters and users[p] == {index}]
        for index, parameters in enumerate(stack.layers)
    ]


def check_streamable(stack: DecoderStack, layers: Sequence[Sequence[nn.Parameter]], *, sharded: bool) -> None:
    """Raise ValueError where weights cannot be streamed, with what to do instead."""
    advice = "; give weights='resident'"
    names = {p: name for module in stack.modules for name, p in module.named_parameters()}
    parameters = [p for layer in layers for p in layer]
    if sharded:
        raise ValueError(
            "weights='streamed' needs whole weights, and FSDP2 leaves each worker some rows of them; shard the model "
            "or stream its weights, not both" + advice
        )
    compiled = any(
        type(layer).__name__ == "OptimizedModule" or getattr(layer, "_compiled_call_impl", None) is not None
        for layer in stack.modules
    )
    if compiled:
        raise ValueError(
            "weights='streamed' changes where the weights of a layer are, and compiled layers fix it" + advice
        )
    if not parameters:
        raise ValueError(f"none of the {stack.num_layers} layers has weights of its own to stream" + advice)
    odd = [
        names[p] for p in parameters if not p.is_contiguous() or not (p.is_floating_point() and type(p.data) is Tensor)
    ]
    if odd:
        raise ValueError(
            f"{', '.join(odd[:3])}: quantised weights, or ones that are not contiguous in memory, are not streamed"
            + advice
        )


class HostWeights:
    """Host copies of weights; page-locked if the device is a CUDA device, so that copies overlap with computation.

    Args:
        device: where the weights are used.

    Attributes:
        pinned: whether the host memory is page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._locked: list[Tensor] = []
        weakref.finalize(self, _unlock, self._locked).atexit = False

    @property
    def parameters(self) -> Set[nn.Parameter]:
        """Those that have a copy."""
        return self._copies.keys()

    @property
    def bytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move weights to the host, one at a time: ``parameter.data`` is the host copy from now on.

        Raises:
            MemoryError: the host has less memory available than the copies need.
        """
        for parameter in parameters:
            given = parameter.data
            if self.pinned or given.device.type != "cpu":
                _check_memory(given.nbytes, self.bytes)
                parameter.data = self._allocate(given).copy_(given)
            self._copies[parameter] = parameter.data

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The host copy of a parameter."""
        return self._copies[parameter]

    def _allocate(self, like: Tensor) -> Tensor:
        small = like.nbytes < SMALL_BYTES
        copy = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=self.pinned and small)
        if self.pinned and not small:
            error = int(torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0))  # type: ignore[no-untyped-call]
            if error:
                self.pinned = False
                warnings.warn(
                    f"host memory cannot be pinned (CUDA error {error}); transfers of weights will be slower and will "
                    "not overlap with computation",
                    stacklevel=2,
                )
            else:
                self._locked.append(copy)
        return copy


def _unlock(locked: list[Tensor]) -> None:
    if locked:
        torch.cuda.synchronize()  # a copy may be under way
    while locked:
        torch.cuda.cudart().cudaHostUnregister(locked.pop().data_ptr())  # type: ignore[no-untyped-call]


def _check_memory(wanted: int, held: int) -> None:
    available = available_bytes()
    if available is not None and wanted + RESERVE_BYTES > available:
        raise MemoryError(
            f"weights='streamed' needs {wanted / 2**20:.0f} MiB more of host memory, but only "
            f"{available / 2**20:.0f} MiB are available (weights hold {held / 2**20:.0f} MiB already); use fewer "
            "workers a machine, or weights='resident'"
        )


def move_outside_of_layers(model: nn.Module, device: torch.device, layers: str | None = None) -> None:
    """Move everything but the weights of the decoder layers to ``device``: embeddings, norm, head, and all buffers.

    A model that is too large for a device is given to an optimizer with ``weights="streamed"`` in this way.

    Args:
        model: a decoder language model, adapters included.
        device: where it shall be trained.
        layers: name of the list of decoder layers; found if None.
    """
    inside = {p for layer in find_decoder_stack(model, layers).modules for p in layer.parameters()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    for parameter in model.parameters():
        if parameter not in inside:
            parameter.data = parameter.data.to(device)
