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
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grass_ray.layerwise.importance import GradNormMeter
from grass_ray.layerwise.samplers import AllLayersSampler, Measure, Sampler
from grass_ray.layerwise.stack import decay_parameters, find_decoder_stack
from grass_ray.optim.data_parallel import Workers
from grass_ray.optim.host_store import HostStore
from grass_ray.optim.projection import Projection
from grass_ray.optim.units import Granularity, Unit, constant_units, sampled_units

# the Adam step counter: part of a state, but no memory worth moving
STEP = "step"


class LayerwiseAdamW(torch.optim.Optimizer):
    """AdamW over the layers a sampler draws.

    Parameters that do not require a gradient when the optimizer is built stay frozen for ever (a peft model's base
    weights); all others belong to it, and those outside the active set are frozen by it. Where torch.distributed is
    initialised the gradients of the active set are averaged over the workers inside ``step``: pass the bare model,
    not one wrapped in DistributedDataParallel.

    Args:
        model: a decoder language model, on its device.
        sampler: which layers train, and when that changes.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled; applies to matrices, never to norms and biases.
        max_grad_norm: clip the global norm of the active gradients inside ``step``; None does not clip.
        projection: keep the moments of the layers' matrices in a small space
            (:class:`~grass_ray.optim.projection.GaLore`, :class:`~grass_ray.optim.projection.Apollo`).
        master_weights: update weights of less than 32 bits through a float32 copy, with float32 moments; the copy is
            part of a parameter's state.
        offload: where states of frozen layers live: ``"none"`` leaves them on the device, ``"resident"`` moves them
            to the host at a switch; ``"auto"`` is ``"resident"``.
        inactive_states: ``"keep"`` the states of a layer that leaves the active set, or ``"reset"`` them to zero.
        train_embeddings: train the embeddings (and a head tied to them) at every step.
        train_head: train an untied LM head at every step.
        train_norm: train the final norm at every step.
        granularity: what the sampler picks from: decoder layers, layers and both ends (``"block"``), or weight
            matrices.
        layers: the name of the list of decoder layers, for models where it cannot be found.
        process_group: the data-parallel workers; None takes torch.distributed's default group where there is one.

    Attributes:
        active_units: indices of the units that train now.
        switches: active sets drawn after the first one.
        grad_norm: global gradient norm of the last step, before clipping.
        probed: whether the last step only measured.

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
        projection: Projection | None = None,
        master_weights: bool = False,
        offload: Literal["none", "resident", "auto"] = "auto",
        inactive_states: Literal["keep", "reset"] = "keep",
        train_embeddings: bool = False,
        train_head: bool = False,
        train_norm: bool = False,
        granularity: Granularity = "layer",
        layers: str | None = None,
        process_group: Any | None = None,
    ) -> None:
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        if offload not in ("none", "resident", "auto"):
            raise ValueError(f"offload is {offload!r}; available: none, resident, auto")
        if inactive_states not in ("keep", "reset"):
            raise ValueError(f"inactive_states is {inactive_states!r}; available: keep, reset")
        if granularity == "block" and (train_embeddings or train_head or train_norm):
            raise ValueError("granularity 'block' samples embeddings, head and norm; train_* flags cannot hold them")
        stack = find_decoder_stack(model, layers)
        decayed = decay_parameters(model)
        units = sampled_units(stack, granularity, decayed)
        if not isinstance(sampler, AllLayersSampler) and not all(unit.parameters for unit in units):
            frozen = [index for index, unit in enumerate(units) if not unit.parameters]
            raise ValueError(f"layers {frozen} have no parameter that requires a gradient; build the optimizer first")
        sampler.start([unit.size for unit in units], total=sum(p.numel() for p in model.parameters()))
        always = {
            "embeddings": stack.embeddings if train_embeddings else (),
            "head": stack.head if train_head else (),
            "norm": stack.norm if train_norm else (),
            # what peft adds outside the model: virtual tokens
            "adapter": _outside_of_the_base(model),
        }
        constant = constant_units(always, decayed)
        managed = [p for unit in (*units, *constant) for p in unit.parameters]
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
        self.units = units
        self.constant_units = constant
        self.grad_norm: Tensor | None = None
        self.active_units: tuple[int, ...] = ()
        self.switches = 0
        self.probed = False
        self._workers = Workers(process_group)
        self._projection = projection
        self._projected = {p for layer in stack.layers for p in layer if projection is not None and p.ndim == 2}
        self._master_weights = master_weights
        self._index = {p: index for index, p in enumerate(self._parameters_in_order())}
        self._host = HostStore(managed[0].device)
        measures = sampler.grad_norms == "arriving" or sampler.probing
        self._meter = GradNormMeter([unit.parameters for unit in units]) if measures else None
        self._never_seen = torch.full((len(units),), torch.nan)
        if sampler.probing:
            for parameter in managed:
                parameter.register_post_accumulate_grad_hook(self._drop_while_probing)  # type: ignore[no-untyped-call]
        everything = set(managed)
        for parameter in model.parameters():
            if parameter not in everything:
                parameter.requires_grad_(False)
                parameter.grad = None
        if sampler.probing:
            self._activate(tuple(range(len(units))))
        else:
            self._activate(sampler.sample() if sampler.due else ())

    # ------------------------------------------------------------------------------------------------ the step

    def probe(self, measure: Measure) -> None:
        """Before a step's forward: let the sampler take extra measurements, and switch if they make a draw due."""
        self.sampler.probe(measure)
        if self.sampler.due:
            self._switch(self.sampler.sample())

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Measure, average over the workers, clip and update the active layers; at a boundary draw the next ones.

        Raises:
            RuntimeError: nothing is active (a sampler that must measure first got no ``probe``), or the workers
                disagree about what is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms = self._never_seen if self._meter is None else self._workers.average(self._meter.collect())
        self.probed = self.sampler.probing
        if self.probed:
            self.zero_grad(set_to_none=True)
            self.grad_norm = self._total_norm(norms)
        else:
            active = self.active_parameters()
            if not active:
                raise RuntimeError(
                    f"{type(self.sampler).__name__} has not drawn yet: call optimizer.probe(measure) before the first "
                    "step, or give the sampler its scores"
                )
            self._workers.average_gradients(active)
            gradients = [p.grad for p in active if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(active, self.max_grad_norm, self.grad_norm)
            if self.sampler.grad_norms == "clipped":
                norms = self._rms_gradients()
            for unit in self._active():
                self._update(unit)
        self.sampler.observe(norms)
        if self.sampler.due:
            self._switch(self.sampler.sample())
        return loss

    @property
    def probing(self) -> bool:
        """Whether the next step only measures; a learning-rate schedule should stand still meanwhile."""
        return self.sampler.probing

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers in which something trains now, ascending."""
        layers = {self.units[index].layer for index in self.active_units}
        return tuple(sorted(layer for layer in layers if layer is not None))

    def active_parameters(self) -> list[nn.Parameter]:
        """The parameters that train now."""
        return [p for unit in self._active() for p in unit.parameters]

    def resident_states(self) -> Iterator[Tensor]:
        """The state tensors that are on the device now."""
        on_host = self._units_on_host()
        for unit in (*self.units, *self.constant_units):
            if unit.name not in on_host:
                for parameter in unit.parameters:
                    yield from _tensors(self.state.get(parameter, {})).values()

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of optimizer states (on the device, on the host)."""
        return sum(t.numel() * t.element_size() for t in self.resident_states()), self._host.bytes

    def _update(self, unit: Unit) -> None:
        """AdamW on one unit (torch's own fused kernel where it has one)."""
        for index, parameters in unit.groups:
            group = self.param_groups[index]
            trained = [p for p in parameters if p.grad is not None]
            for parameter in (p for p in trained if p in self._projected):
                assert self._projection is not None
                self._projection.update(parameter, self._state_of(parameter), group, key=self._index[parameter])
            plain = [p for p in trained if p not in self._projected]
            if not plain:
                continue
            states = [self._state_of(p) for p in plain]
            weights: list[Tensor] = [state.get("master", p) for state, p in zip(states, plain, strict=True)]
            adamw(
                weights,
                [p.grad.to(w.dtype) for p, w in zip(plain, weights, strict=True) if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state[STEP] for state in states],
                fused=weights[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, weight in zip(plain, weights, strict=True):
                if weight is not parameter:
                    parameter.copy_(weight)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if state:
            return state
        if self._projection is not None and parameter in self._projected:
            state.update(self._projection.start(parameter))
            return state
        weight = parameter
        if self._master_weights and parameter.element_size() < 4:
            weight = state["master"] = parameter.detach().float()
        state[STEP] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    def _total_norm(self, norms: Tensor) -> Tensor:
        """Global gradient norm of the units from their RMS values, shape (units,)."""
        return (norms.square() * norms.new_tensor([unit.size for unit in self.units])).nansum().sqrt()

    def _rms_gradients(self) -> Tensor:
        """RMS of each active unit's accumulated and clipped gradient, shape (units,), NaN elsewhere."""
        norms = torch.full((len(self.units),), torch.nan, device=self.units[0].parameters[0].device)
        for index in self.active_units:
            unit = self.units[index]
            gradients = [p.grad for p in unit.parameters if p.grad is not None]
            norms[index] = torch.nn.utils.get_total_norm(gradients).float() / unit.size**0.5
        return norms

    def _drop_while_probing(self, parameter: Tensor) -> None:
        """Free a gradient the moment it was measured, so that probing never holds more than a few of them."""
        if self.sampler.probing:
            parameter.grad = None

    # ---------------------------------------------------------------------------------------------- the switch

    def _switch(self, units: tuple[int, ...]) -> None:
        """Make ``units`` the active ones: states of those that leave go first, so that both never add up."""
        self.switches += 1
        self._workers.check_agreement(units)
        for index in sorted(set(self.active_units) - set(units)):
            self._release(self.units[index])
        self._host.synchronize()
        for index in sorted(set(units) - set(self.active_units)):
            self._reclaim(self.units[index])
        self._activate(units)

    def _activate(self, units: tuple[int, ...]) -> None:
        """Let exactly ``units`` and the always-trained parts require gradients; frozen ones hold none."""
        self.active_units = units
        for index, unit in enumerate(self.units):
            for parameter in unit.parameters:
                parameter.requires_grad_(index in units)
                if index not in units:
                    parameter.grad = None

    def _release(self, unit: Unit) -> None:
        """A unit leaves the active set: forget its states, leave them, or move them to the host."""
        for parameter in unit.parameters:
            if self.inactive_states == "reset":
                self.state.pop(parameter, None)
            elif self.offload == "resident":
                state = self.state.get(parameter, {})
                for name, tensor in _tensors(state).items():
                    state[name] = self._host.evict(self._index[parameter], name, tensor)

    def _reclaim(self, unit: Unit) -> None:
        """A unit enters the active set: bring its states back."""
        if self.offload == "resident":
            for parameter in unit.parameters:
                state = self.state.get(parameter, {})
                for name, tensor in _tensors(state).items():
                    state[name] = self._host.fetch(tensor)

    def _active(self) -> list[Unit]:
        return [self.units[index] for index in self.active_units] + self.constant_units

    def _units_on_host(self) -> set[str]:
        """Names of the units whose states are on the host: with offloading, everything that is not active."""
        if self.offload == "none":
            return set()
        return {unit.name for index, unit in enumerate(self.units) if index not in self.active_units}

    # --------------------------------------------------------------------------------------------- the state

    def _parameters_in_order(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout, with the sampler's state and the active units under ``"layerwise"``.

        Holds tensors and plain values only: ``torch.load(..., weights_only=True)`` reads it.
        """
        state = super().state_dict()
        state["layerwise"] = {
            "sampler": self.sampler.state_dict(),
            "active_units": list(self.active_units),
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
        self._activate(tuple(own["active_units"]))
        self.state.clear()
        self._host = HostStore(self._parameters_in_order()[0].device)
        on_host = self._units_on_host()
        unit_of = {p: unit.name for unit in (*self.units, *self.constant_units) for p in unit.parameters}
        parameters = self._parameters_in_order()
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            state = {STEP: saved[STEP].to("cpu" if parameter in self._projected else parameter.device, copy=True)}
            for name, tensor in _tensors(saved).items():
                if unit_of[parameter] in on_host:
                    state[name] = self._host.evict(index, name, tensor)
                else:
                    state[name] = tensor.to(parameter.device, copy=True)
                    if index in own["on_host"]:
                        self._host.reserve(index, name, tensor)
            self.state[parameter] = state
        self._host.synchronize()


def _outside_of_the_base(model: Any) -> list[nn.Parameter]:
    """Parameters of a peft model that its base model does not hold."""
    if not hasattr(model, "get_base_model"):
        return []
    base = set(model.get_base_model().parameters())
    return [p for p in model.parameters() if p not in base]


def _tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a parameter's state that cost memory."""
    return {name: tensor for name, tensor in state.items() if name != STEP}


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
