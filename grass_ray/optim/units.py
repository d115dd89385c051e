"""What an optimizer switches on and off as a whole: decoder layers, weight matrices, or layers and both ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from grass_ray.layerwise.stack import DecoderStack

Granularity = Literal["layer", "block", "matrix"]


@dataclass(frozen=True)
class Unit:
    """Parameters that train, freeze and move together.

    ``layer`` is the decoder layer they are in (None for embeddings, head, norm and adapters outside the layers);
    ``groups`` are the same parameters split by the optimizer's parameter group they belong to.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    layer: int | None
    groups: tuple[tuple[int, tuple[nn.Parameter, ...]], ...]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters)


def in_order_of_forward(units: Iterable[Unit]) -> list[Unit]:
    """Units in the order in which a forward needs them; it waits for those outside the layers before it begins."""
    return sorted(units, key=lambda unit: -1 if unit.layer is None else unit.layer)


def sampled_units(stack: DecoderStack, granularity: Granularity, decayed: set[nn.Parameter]) -> list[Unit]:
    """The units a sampler picks from, made of the parameters that require a gradient now.

    Args:
        stack: the model taken apart.
        granularity: ``"layer"``, one unit per decoder layer; ``"block"``, the embeddings, every layer, the final norm
            and the head (HiFT); ``"matrix"``, one unit per weight matrix of the layers, whose vectors stay frozen
            (MISA).
        decayed: the parameters weight decay applies to.

    Raises:
        ValueError: an unknown granularity.
    """
    parts: list[tuple[str, tuple[nn.Parameter, ...], int | None]]
    layers: list[tuple[str, tuple[nn.Parameter, ...], int | None]]
    layers = [(f"layer_{index:02d}", _trainable(parameters), index) for index, parameters in enumerate(stack.layers)]
    match granularity:
        case "layer":
            parts = layers
        case "block":
            parts = [("embeddings", _trainable(stack.embeddings), None), *layers]
            parts += [("norm", _trainable(stack.norm), None), ("head", _trainable(stack.head), None)]
            parts = [part for part in parts if part[1]]
        case "matrix":
            parts = [
                (f"layer_{index:02d}.{name}", (parameter,), index)
                for index, module in enumerate(stack.modules)
                for name, parameter in module.named_parameters()
                if parameter.requires_grad and parameter.ndim >= 2
            ]
        case _:
            raise ValueError(f"granularity is {granularity!r}; available: {', '.join(get_args(Granularity))}")
    return [_unit(name, parameters, layer, decayed) for name, parameters, layer in parts]


def constant_units(parts: Mapping[str, Iterable[nn.Parameter]], decayed: set[nn.Parameter]) -> list[Unit]:
    """Units that train at every step, by name; parts without a trainable parameter are left out."""
    units = [_unit(name, _trainable(parameters), None, decayed) for name, parameters in parts.items()]
    return [unit for unit in units if unit.parameters]


def _trainable(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    return tuple(p for p in parameters if p.requires_grad)


def _unit(name: str, parameters: tuple[nn.Parameter, ...], layer: int | None, decayed: set[nn.Parameter]) -> Unit:
    split = (tuple(p for p in parameters if p in decayed), tuple(p for p in parameters if p not in decayed))
    return Unit(name, parameters, layer, tuple((index, part) for index, part in enumerate(split) if part))
