"""LayerwiseAdamW: AdamW that trains a few layers at a time and chooses them itself.

A drop-in ``torch.optim.Optimizer``; probing, sampling, freezing, switching and moving states all happen in ``step``::

    optimizer = LayerwiseAdamW(model, GradNormSampler(num_active_layers=2, period=20), lr=1e-5)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

While ``optimizer.probing`` is True the gradients are measured and dropped, nothing is updated, and a learning-rate
schedule should stand still. GRASS: arXiv 2604.07808; AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grass_ray.layerwise.importance import GradNormMeter
from grass_ray.layerwise.samplers import Sampler
from grass_ray.layerwise.stack import decay_parameters, find_decoder_stack
from grass_ray.optim.host_store import HostStore

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Unit:
    """Parameters that train, freeze and move together: one decoder layer, the embeddings, the head or the norm.

    ``groups`` are the same parameters split by the optimizer's parameter group they belong to.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    groups: tuple[tuple[int, tuple[nn.Parameter, ...]], ...]


class LayerwiseAdamW(torch.optim.Optimizer):
    """AdamW over the layers a sampler draws.

    Parameters that do not require a gradient when the optimizer is built stay frozen for ever (a peft model's base
    weights); all others belong to it, and those outside the active set are frozen by it.

    Args:
        model: a decoder language model, on its device.
        sampler: which layers train, and when that changes.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled; applies to matrices, never to norms and biases.
        max_grad_norm: clip the global norm of the active gradients inside ``step``; None does not clip.
        offload: where states of frozen layers live: ``"none"`` leaves them on the device, ``"resident"`` moves them
            to the host at a switch; ``"auto"`` is ``"resident"``.
        inactive_states: ``"keep"`` the states of a layer that leaves the active set, or ``"reset"`` them to zero.
        train_embeddings: train the embeddings (and a head tied to them) at every step.
        train_head: train an untied LM head at every step.
        train_norm: train the final norm at every step.
        layers: the name of the list of decoder layers, for models where it cannot be found.

    Attributes:
        active_layers: indices of the layers that train now.
        switches: active sets drawn at the end of steps so far.
        grad_norm: global gradient norm of the last step, before clipping.

    Raises:
        ValueError: no decoder stack, a layer without trainable parameters, more active layers than layers, or a
            setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: Sampler,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        offload: Literal["none", "resident", "auto"] = "auto",
        inactive_states: Literal["keep", "reset"] = "keep",
        train_embeddings: bool = False,
        train_head: bool = False,
        train_norm: bool = False,
        layers: str | None = None,
    ) -> None:
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        if offload not in ("none", "resident", "auto"):
            raise ValueError(f"offload is {offload!r}; available: none, resident, auto")
        if inactive_states not in ("keep", "reset"):
            raise ValueError(f"inactive_states is {inactive_states!r}; available: keep, reset")
        stack = find_decoder_stack(model, layers)
        trainable = [tuple(p for p in layer if p.requires_grad) for layer in stack.layers]
        if not all(trainable):
            frozen = [index for index, layer in enumerate(trainable) if not layer]
            raise ValueError(f"layers {frozen} have no parameter that requires a gradient; build the optimizer first")
        sampler.start(stack.num_layers)

        always = {
            "embeddings": stack.embeddings if train_embeddings else (),
            "head": stack.head if train_head else (),
            "norm": stack.norm if train_norm else (),
        }
        parts = {f"layer_{index:02d}": layer for index, layer in enumerate(trainable)}
        parts |= {name: tuple(p for p in part if p.requires_grad) for name, part in always.items() if part}
        decayed = decay_parameters(model)
        managed = [p for part in parts.values() for p in part]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in managed if p in decayed]},
            {"params": [p for p in managed if p not in decayed], "weight_decay": 0.0},
        ]
        super().__init__(groups, defaults)
        self.sampler = sampler
        self.max_grad_norm = max_grad_norm
        self.inactive_states = inactive_states
        self.offload = "none" if offload == "none" else "resident"
        self.stack = stack
        self.grad_norm: Tensor | None = None
        self.active_layers: tuple[int, ...] = ()
        self.switches = 0
        self._layer_units = [_make_unit(name, parts[name], decayed) for name in list(parts)[: stack.num_layers]]
        self._always_units = [_make_unit(name, parts[name], decayed) for name in list(parts)[stack.num_layers :]]
        self._index = {p: index for index, p in enumerate(self._parameters_in_order())}
        self._host = HostStore(managed[0].device)
        self._meter = GradNormMeter(trainable) if sampler.needs_grad_norms or sampler.probing else None
        self._never_seen = torch.full((stack.num_layers,), torch.nan)
        if sampler.probing:
            for parameter in managed:
                parameter.register_post_accumulate_grad_hook(self._drop_while_probing)  # type: ignore[no-untyped-call]
        everything = set(managed)
        for parameter in model.parameters():
            if parameter not in everything:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._activate(tuple(range(stack.num_layers)) if sampler.probing else sampler.sample())

    # ------------------------------------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Measure, clip and update the active layers; at a boundary draw the next ones and hand states over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms = self._meter.collect() if self._meter is not None else self._never_seen
        if self.sampler.probing:
            self.zero_grad(set_to_none=True)
            self.grad_norm = self._total_norm(norms)
        else:
            active = self.active_parameters()
            gradients = [p.grad for p in active if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(active, self.max_grad_norm, self.grad_norm)
            for unit in self._active_units():
                self._update(unit)
        self.sampler.observe(norms)
        if self.sampler.due:
            self._switch(self.sampler.sample())
        return loss

    @property
    def probing(self) -> bool:
        """Whether the next step only measures; a learning-rate schedule should stand still meanwhile."""
        return self.sampler.probing

    def active_parameters(self) -> list[nn.Parameter]:
        """The parameters that train now."""
        return [p for unit in self._active_units() for p in unit.parameters]

    def resident_states(self) -> Iterator[Tensor]:
        """The moments that are on the device now."""
        on_host = self._host_units()
        for unit in [*self._layer_units, *self._always_units]:
            if unit.name not in on_host:
                for parameter in unit.parameters:
                    state = self.state.get(parameter, {})
                    yield from (state[name] for name in MOMENTS if name in state)

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of optimizer states (on the device, on the host)."""
        return sum(t.numel() * t.element_size() for t in self.resident_states()), self._host.bytes

    def _update(self, unit: Unit) -> None:
        """AdamW on one unit (torch's own fused kernel where it has one)."""
        for index, parameters in unit.groups:
            group = self.param_groups[index]
            trained: list[Tensor] = [p for p in parameters if p.grad is not None]
            if not trained:
                continue
            states = [self._state_of(p) for p in trained]
            adamw(
                trained,
                [p.grad for p in trained if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=trained[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _total_norm(self, norms: Tensor) -> Tensor:
        """Global gradient norm of the layers from their RMS values, shape (L,)."""
        sizes = [sum(p.numel() for p in unit.parameters) for unit in self._layer_units]
        return (norms.square() * norms.new_tensor(sizes)).nansum().sqrt()

    def _drop_while_probing(self, parameter: Tensor) -> None:
        """Free a gradient the moment it was measured, so that probing never holds more than a few of them."""
        if self.sampler.probing:
            parameter.grad = None

    # ---------------------------------------------------------------------------------------------- the switch

    def _switch(self, layers: tuple[int, ...]) -> None:
        """Make ``layers`` the active ones: states of layers that leave go first, so that both never add up."""
        self.switches += 1
        leaving = set(self.active_layers) - set(layers)
        for index in sorted(leaving):
            self._release(self._layer_units[index])
        self._host.synchronize()
        for index in sorted(set(layers) - set(self.active_layers)):
            self._reclaim(self._layer_units[index])
        self._activate(layers)

    def _activate(self, layers: tuple[int, ...]) -> None:
        """Let exactly ``layers`` and the always-trained parts require gradients; frozen ones hold none."""
        self.active_layers = layers
        for index, unit in enumerate(self._layer_units):
            for parameter in unit.parameters:
                parameter.requires_grad_(index in layers)
                if index not in layers:
                    parameter.grad = None

    def _release(self, unit: Unit) -> None:
        """A unit leaves the active set: forget its states, leave them, or move them to the host."""
        for parameter in unit.parameters:
            if self.inactive_states == "reset":
                self.state.pop(parameter, None)
            elif self.offload == "resident":
                state = self.state.get(parameter, {})
                for name in MOMENTS:
                    if name in state:
                        state[name] = self._host.evict(self._index[parameter], name, state[name])

    def _reclaim(self, unit: Unit) -> None:
        """A unit enters the active set: bring its states back."""
        if self.offload == "resident":
            for parameter in unit.parameters:
                state = self.state.get(parameter, {})
                for name in MOMENTS:
                    if name in state:
                        state[name] = self._host.fetch(state[name])

    def _active_units(self) -> list[Unit]:
        return [self._layer_units[index] for index in self.active_layers] + self._always_units

    def _host_units(self) -> set[str]:
        """Names of the units whose states are on the host: with offloading, every layer that is not active."""
        if self.offload == "none":
            return set()
        return {unit.name for index, unit in enumerate(self._layer_units) if index not in self.active_layers}

    # --------------------------------------------------------------------------------------------- the state

    def _parameters_in_order(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout, with the sampler's state and the active layers under ``"layerwise"``.

        Holds tensors and plain values only: ``torch.load(..., weights_only=True)`` reads it.
        """
        state = super().state_dict()
        state["layerwise"] = {
            "sampler": self.sampler.state_dict(),
            "active_layers": list(self.active_layers),
            "switches": self.switches,
            "on_host": self._host.reserved(),
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, bit for bit: dtypes are kept, each state goes where its layer's belongs.

        Raises:
            ValueError: the state belongs to another model or to another optimizer.
        """
        if "layerwise" not in state_dict:
            raise ValueError("this state was not saved by LayerwiseAdamW: it has no 'layerwise' entry")
        saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != sizes:
            raise ValueError(f"the saved state has parameter groups of {saved_sizes}, this optimizer of {sizes}")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        own = state_dict["layerwise"]
        self.sampler.load_state_dict(own["sampler"])
        self.switches = own["switches"]
        self._activate(tuple(own["active_layers"]))
        self.state.clear()
        self._host = HostStore(self._parameters_in_order()[0].device)
        on_host = self._host_units()
        unit_of = {p: unit.name for unit in [*self._layer_units, *self._always_units] for p in unit.parameters}
        parameters = self._parameters_in_order()
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            state = {"step": saved["step"].to(parameter.device, copy=True)}
            for name in MOMENTS:
                if unit_of[parameter] in on_host:
                    state[name] = self._host.evict(index, name, saved[name])
                else:
                    state[name] = saved[name].to(parameter.device, copy=True)
                    if index in own["on_host"]:
                        self._host.reserve(index, name, saved[name])
            self.state[parameter] = state
        self._host.synchronize()


def _make_unit(name: str, parameters: tuple[nn.Parameter, ...], decayed: set[nn.Parameter]) -> Unit:
    split = (tuple(p for p in parameters if p in decayed), tuple(p for p in parameters if p not in decayed))
    return Unit(name, parameters, tuple((index, part) for index, part in enumerate(split) if part))


def _check(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float | None
) -> None:
    rules = [
        (lr > 0, f"lr is {lr}; it must be above 0"),
        (all(0 <= beta < 1 for beta in betas), f"betas are {betas}; each must be at least 0 and below 1"),
        (eps > 0, f"eps is {eps}; it must be above 0"),
        (weight_decay >= 0, f"weight_decay is {weight_decay}; it must not be negative"),
        (max_grad_norm is None or max_grad_norm > 0, f"max_grad_norm is {max_grad_norm}; it must be above 0 or None"),
    ]
    mistakes = [message for holds, message in rules if not holds]
    if mistakes:
        raise ValueError("; ".join(mistakes))
