"""Take a model apart for an optimizer: what its sampler picks from, what always trains, what never trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grass_ray.layerwise.sampler import Sampler
from grass_ray.layerwise.stack import DecoderStack, decay_parameters, find_decoder_stack
from grass_ray.optim.options import LayerwiseOptions
from grass_ray.optim.projection import projected_parameters
from grass_ray.optim.refusals import refuse_half
from grass_ray.optim.sharded import Shards, check_sharded, find_shards
from grass_ray.optim.units import Unit, constant_units, sampled_units


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model as an optimizer sees it.

    Attributes:
        stack: the decoder layers and both ends.
        device: where everything is that trains.
        shards: how FSDP2 has sharded the model; None for a whole one.
        units: what the sampler picks from, from the first layer up.
        constant: what trains at every step.
        managed: the parameters of both.
        projected: those of them that the projection updates.
        decayed: those that weight decay applies to.
        given: parameters that required a gradient when the model was taken apart.
        unmanaged: names of those of them that are outside the language model.
    """

    stack: DecoderStack
    device: torch.device
    shards: Shards | None
    units: list[Unit]
    constant: list[Unit]
    managed: list[nn.Parameter]
    projected: set[nn.Parameter]
    decayed: set[nn.Parameter]
    given: list[nn.Parameter]
    unmanaged: list[str]

    def freeze_others(self, model: nn.Module) -> None:
        """Freeze every parameter of ``model`` that nothing here trains."""
        trained = set(self.managed)
        for parameter in model.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)
                parameter.grad = None

    def groups(self) -> list[dict[str, Any]]:
        """Two parameter groups: matrices, and what weight decay never applies to."""
        return [
            {"params": [p for p in self.managed if p in self.decayed]},
            {"params": [p for p in self.managed if p not in self.decayed], "weight_decay": 0.0},
        ]


def take_apart(model: nn.Module, sampler: Sampler, options: LayerwiseOptions) -> Parts:
    """Take ``model`` apart, and start the sampler with its units.

    Args:
        model: a decoder language model.
        sampler: picks among the units.
        options: of the optimizer.

    Raises:
        ValueError: no decoder stack, no trainable layer, more active layers than trainable ones, float16 weights that
            should train, or a model sharded in a way that cannot train layer-wise.
    """
    shards = find_shards(model)
    if shards is not None and options.projection is not None:
        raise ValueError(
            f"{type(options.projection).__name__} updates whole matrices, and FSDP2 leaves a worker some rows of "
            "each; pass the bare model, or a method without a projection"
        )
    stack = find_decoder_stack(model, options.layers)
    decayed = decay_parameters(model)
    units = sampled_units(stack, options.granularity, decayed)
    if not sampler.trains_all:
        units = [unit for unit in units if unit.parameters]
        if not units:
            raise ValueError(
                f"none of the {stack.num_layers} layers has a parameter that requires a gradient, so there is nothing "
                "to draw from; thaw those that should train, then build the optimizer"
            )
    sampler.start([unit.size for unit in units], total=sum(p.numel() for p in model.parameters()))
    ends = {"embeddings": stack.embeddings, "head": stack.head, "norm": stack.norm}
    # and what peft adds outside the model: virtual tokens
    always = {name: parameters for name, parameters in ends.items() if name in options.always_trained}
    constant = constant_units(always | {"adapter": tuple(_outside_of_the_base(model))}, decayed)
    managed = [p for unit in (*units, *constant) for p in unit.parameters]
    names = {p: name for name, p in model.named_parameters()}
    refuse_half([names[p] for p in managed if p.dtype == torch.float16])
    if shards is not None:
        check_sharded(names, managed)
    return Parts(
        stack=stack,
        device=managed[0].device if options.weights == "resident" else _device_outside(model, stack),
        shards=shards,
        units=units,
        constant=constant,
        managed=managed,
        projected=projected_parameters(options.projection, stack.layers, managed),
        decayed=decayed,
        given=[p for p in model.parameters() if p.requires_grad],
        unmanaged=[names[p] for p in stack.unmanaged if p.requires_grad and p not in set(managed)],
    )


def _device_outside(model: nn.Module, stack: DecoderStack) -> torch.device:
    """Where the model is, apart from its decoder layers, which may still be on the host."""
    inside = {p for layer in stack.modules for p in layer.parameters()}
    return next((p.device for p in model.parameters() if p not in inside), next(iter(inside)).device)


def _outside_of_the_base(model: Any) -> list[nn.Parameter]:
    """Parameters of a peft model that its base model does not hold."""
    if not hasattr(model, "get_base_model"):
        return []
    base = set(model.get_base_model().parameters())
    return [p for p in model.parameters() if p not in base]
