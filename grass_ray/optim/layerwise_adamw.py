"""LayerwiseAdamW: AdamW that trains a few layers at a time and chooses them itself.

A drop-in ``torch.optim.Optimizer``; probing, sampling, freezing, switching and moving states all happen in ``step``::

    optimizer = LayerwiseAdamW(model, GradNormSampler(num_active_layers=2, period=20), lr=1e-5)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

While ``optimizer.probing`` is True the gradients are measured and dropped, nothing is updated, and a learning-rate
schedule should stand still. A model sharded by FSDP2 (``fully_shard``) trains the same way, each worker holding the
states of its own rows. GRASS: arXiv 2604.07808; AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from grass_ray.layerwise.importance import GradNormMeter
from grass_ray.layerwise.sampler import Measure, Sampler
from grass_ray.optim.chunks import CHUNK_BYTES
from grass_ray.optim.data_parallel import Reduction, Workers
from grass_ray.optim.hooks import WeakHook, remove
from grass_ray.optim.kernels import Precision
from grass_ray.optim.loss_scaling import LossScale
from grass_ray.optim.ownership import Takeover
from grass_ray.optim.parts import take_apart
from grass_ray.optim.placement import STEP, Offload, States, make_placement
from grass_ray.optim.projection import Projection
from grass_ray.optim.proof import Proof
from grass_ray.optim.refusals import refuse_checkpoint_api
from grass_ray.optim.sharded import clip
from grass_ray.optim.state_dict import adamw_layout, check_fits, check_shard, gather, of_unit, rows_of, saved_states
from grass_ray.optim.streaming import OffloadStats
from grass_ray.optim.streams import Streams
from grass_ray.optim.sync import GradientSync, ShardedGradients, WholeGradients
from grass_ray.optim.units import Granularity, Unit
from grass_ray.optim.watch import Watch, has_gradient

# "auto" keeps the active states resident while they take less than this share of the free device memory
RESIDENT_SHARE = 0.25


class LayerwiseAdamW(torch.optim.Optimizer):
    """AdamW over the layers a sampler draws.

    Parameters that do not require a gradient when the optimizer is built stay frozen for ever (a peft model's base
    weights, layers that the sampler shall not draw from); all others belong to it, and those outside the active set are
    frozen by it. Under ``torch.amp.GradScaler`` importance is measured at the scale of the loss itself, and a step that
    the scaler skips is not measured. Where torch.distributed is
    initialised the gradients of the active set are averaged over the workers inside ``step``: pass the bare model,
    not one wrapped in DistributedDataParallel. Or give its layers and then itself to FSDP2's ``fully_shard`` first.

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
        precision: what bfloat16 weights keep as state (:mod:`grass_ray.optim.kernels`): ``"weights"``, ``"rem16"`` or
            ``"exact"``; the same for all other weights.
        offload: where states of sampled units live. ``"none"``: on the device, all that were ever active.
            ``"resident"``: active ones on the device, all others on the host, moved at a switch. ``"blocking"``,
            ``"overlap"``, ``"lazy"``: all on the host, streamed through a small ring at every step
            (:mod:`grass_ray.optim.streaming`). ``"auto"``: resident while the active states are small beside the free
            device memory, else lazy. All give bitwise the same weights.
        inactive_states: ``"keep"`` the states of a layer that leaves the active set, or ``"reset"`` them to zero.
        train_embeddings: train the embeddings (and a head tied to them) at every step.
        train_head: train an untied LM head at every step.
        train_norm: train the final norm at every step.
        granularity: what the sampler picks from: decoder layers, layers and both ends (``"block"``), or weight
            matrices.
        layers: the name of the list of decoder layers, for models where it cannot be found.
        process_group: the data-parallel workers; None takes torch.distributed's default group where there is one.
        gradient_reduction: the active gradients become their ``"mean"`` over the workers, or their ``"sum"`` where the
            loop has divided each loss by the labels of all workers.
        chunk_bytes: size of a slot of the ring and of a full host block, a power of two.
        ring_slots: slots of the ring.
        streams: where streamed work runs; None takes CUDA streams, or one thing after another on a CPU.

    Attributes:
        active_units: indices of the units that train now.
        switches: active sets drawn after the first one.
        grad_norm: global gradient norm of the last step, before clipping.
        probed: whether the last step only measured.
        offload: the mode in force (``"auto"`` resolved).
        stats: what moving states cost so far.
        workers: the data-parallel workers.
        last_micro_batch: set it before a step's last backward, and gradients travel to the other workers while
            backward goes on; ``step`` sets it back. Left alone, they travel when ``step`` begins.

    Raises:
        ValueError: no decoder stack, no trainable layer, more active layers than trainable ones, a setting out of
            range, float16 weights that should train, or a model sharded in another way than by rows over
            ``process_group``.
    """

    # torch.amp.GradScaler then always calls step(), and tells it the scale and whether a gradient is not finite
    _step_supports_amp_scaling = True

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
        precision: Precision = "rem16",
        offload: Offload = "auto",
        inactive_states: Literal["keep", "reset"] = "keep",
        train_embeddings: bool = False,
        train_head: bool = False,
        train_norm: bool = False,
        granularity: Granularity = "layer",
        layers: str | None = None,
        process_group: Any | None = None,
        gradient_reduction: Reduction = "mean",
        chunk_bytes: int = CHUNK_BYTES,
        ring_slots: int = 4,
        streams: Streams | None = None,
    ) -> None:
        _check(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        if offload not in get_args(Offload):
            raise ValueError(f"offload is {offload!r}; available: {', '.join(get_args(Offload))}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision is {precision!r}; available: {', '.join(get_args(Precision))}")
        if projection is not None and offload in ("blocking", "overlap", "lazy"):
            raise ValueError(f"offload is {offload!r}, but projected states are small and not streamed; use resident")
        if ring_slots < 1:
            raise ValueError(f"ring_slots is {ring_slots}; it must be at least 1")
        if inactive_states not in ("keep", "reset"):
            raise ValueError(f"inactive_states is {inactive_states!r}; available: keep, reset")
        if granularity == "block" and (train_embeddings or train_head or train_norm):
            raise ValueError("granularity 'block' samples embeddings, head and norm; train_* flags cannot hold them")
        always = {"embeddings": train_embeddings, "head": train_head, "norm": train_norm}
        with Takeover(model) as takeover:
            parts = take_apart(
                model,
                sampler,
                granularity=granularity,
                layers=layers,
                train=[name for name, trains in always.items() if trains],
                projection=projection,
            )
        stack, shards, units, constant, managed = parts.stack, parts.shards, parts.units, parts.constant, parts.managed
        super().__init__(parts.groups(), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.sampler = sampler
        self.max_grad_norm = max_grad_norm
        self.inactive_states = inactive_states
        self.stack = stack
        self.units = units
        self.constant_units = constant
        self.grad_norm: Tensor | None = None
        self.active_units: tuple[int, ...] = ()
        self.switches = 0
        self.probed = False
        self.last_micro_batch = False
        if shards is not None:
            process_group = shards.of_all(process_group)
        self.workers = Workers(process_group, gradient_reduction)
        self._shards = shards
        self._unit_of: dict[Tensor, Unit] = {p: unit for unit in (*units, *constant) for p in unit.parameters}
        self._index = {p: index for index, p in enumerate(self._parameters_in_order())}
        self._device = managed[0].device
        self._interrupted = False
        self._retired = False
        # whether backward brought a gradient that probing did not keep
        self._dropped = False
        self._watch = Watch(model, parts.unmanaged)
        self._proof: Proof | None = None
        self._model = weakref.ref(model)
        # hooks on the model, which must not outlive the optimizer
        self._handles: list[Any] = []
        weakref.finalize(self, remove, self._handles).atexit = False
        self.stats = OffloadStats()
        projected = {p for layer in stack.layers for p in layer if projection is not None and p.ndim == 2}
        self._states = States(self.state, precision, projection, projected, self._index)
        self.offload = self._choose_offload(offload)
        self._placement = make_placement(
            self.offload,
            self._states,
            self._device,
            self.stats,
            chunk_bytes=chunk_bytes,
            ring_slots=ring_slots,
            streams=streams,
        )
        if self.offload in ("blocking", "overlap", "lazy"):
            self._install_gates(model)
        measures = sampler.grad_norms == "arriving" or sampler.probing
        layerwise = [unit.parameters for unit in units]
        self._meter = GradNormMeter(layerwise, sharded=shards is not None) if measures else None
        if self._meter is not None:
            self._meter.dropping = sampler.probing
            self._handles.extend(self._meter.handles)
            if self._meter.witness is not None:
                # last, so that the places of all others stay: a scaler unscales what is in a group
                self.param_groups[-1]["params"].append(self._meter.witness)
        self._never_seen = torch.full((len(units),), torch.nan, device=self._device)
        self._sync: GradientSync = (
            WholeGradients(self.workers, units, constant)
            if shards is None
            else ShardedGradients(self.workers, shards, self._device)
        )
        if shards is not None:
            self._handles.extend(shards.watch(managed, weakref.WeakMethod(self._watch_gathered)))
        elif sampler.probing:
            for parameter in managed:
                self._after_gradient(parameter, LayerwiseAdamW._drop_while_probing)
        if self.workers.count > 1:
            for parameter in managed:
                self._after_gradient(parameter, LayerwiseAdamW._reduce)
        if self.offload == "lazy":
            for unit in units:
                for parameter in unit.parameters:
                    self._after_gradient(parameter, LayerwiseAdamW._prefetch_unit)
        everything = set(managed)
        for parameter in model.parameters():
            if parameter not in everything:
                parameter.requires_grad_(False)
                parameter.grad = None
        if sampler.probing:
            self._activate(tuple(range(len(units))))
        else:
            self._activate(sampler.sample() if sampler.due else ())
        self.workers.check_agreement(self.active_units)
        takeover.complete(self, parts.given)
        _SAMPLERS[sampler] = weakref.ref(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: which parameters are trained is decided when the optimizer is built.

        Raises:
            ValueError: always, once the optimizer is built.
        """
        if hasattr(self, "units"):
            raise ValueError(
                "LayerwiseAdamW trains parts of its model, chosen when it is built (train_embeddings, train_head, "
                "train_norm and the sampler); train other parameters with an optimizer of their own"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled: hooks and states belong to the parameters of one model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "LayerwiseAdamW cannot be copied or pickled: it belongs to the parameters of its model. Copy the model, "
            "build another optimizer on the copy, and give it load_state_dict(optimizer.state_dict())"
        )

    def retire(self) -> None:
        """Take every hook away: another optimizer is built on the model, and ``step`` raises from now on."""
        self.synchronize()
        self._retired = True
        remove(self._handles)

    # ------------------------------------------------------------------------------------------------ the step

    def prove(self) -> Proof:
        """From now on compare all weights at switches, to prove that exactly the active units change.

        Reads every weight once per check, and waits for the device. A mistake is said in a warning.

        Returns:
            The proof: its ``mistakes`` so far, and :meth:`~grass_ray.optim.proof.Proof.check` for a last look.
        """
        self.synchronize()
        model = self._model()
        frozen = [] if model is None else [p for p in model.parameters() if p not in self._unit_of]
        self._proof = Proof(self.units, frozen, self.workers if self.sharded else None)
        return self._proof

    def _check_proof(self) -> None:
        if self._proof is not None and self._proof.due:
            self.synchronize()
            self._proof.check()
            self._watch.mistakes(self._proof.mistakes)

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

        Gradients that are not finite change nothing: weights, states and counters stay as they are, and ``grad_norm``
        tells.

        Raises:
            RuntimeError: nothing is active (a sampler that must measure first got no ``probe``), the workers
                disagree about what is, an earlier step was interrupted in the middle of its update or switch, the model
                was sharded, wrapped, frozen, moved or cast after the optimizer was built, or another optimizer has
                taken over the model or the sampler.
        """
        self._refuse_misuse()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._nothing_arrived():
            self._watch.no_gradient_at_all()
            self.grad_norm = torch.zeros((), device=self._device)
            return loss
        self.probed = self.sampler.probing
        scale = LossScale.of(self, self._device)
        if scale is not None:
            self._unscale(scale)
        norms = self._never_seen if self._meter is None else self._measured(self._meter, scale)
        self.last_micro_batch = False
        if self.probed:
            self.zero_grad(set_to_none=True)
            self.grad_norm = self._total_norm(norms)
            if self._proof is not None:
                self._proof.note(())
        else:
            norms = self._train(norms, scale)
        self.sampler.observe(norms)
        if self._meter is not None:
            self._meter.dropping = self.sampler.probing
        if self.sampler.due:
            self._switch(self.sampler.sample())
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throw away gradients, and what was measured of them since the last step."""
        super().zero_grad(set_to_none)
        self._dropped = False
        if self._meter is not None:
            self._meter.clear()

    def _nothing_arrived(self) -> bool:
        """Whether no backward reached this optimizer's parameters; several workers go through a step together."""
        if self.workers.count > 1 or not self._active():
            return False
        if self.sampler.probing:
            return not self._dropped
        return not has_gradient(self.active_parameters())

    def _unscale(self, scale: LossScale) -> None:
        """Bring gradients that a loss scaler has scaled to the scale of the loss itself.

        Raises:
            RuntimeError: they were averaged over workers that may have different scales.
        """
        if self._shards is not None or self._sync.under_way:
            raise RuntimeError(
                "a loss scaler (GradScaler) works with whole gradients that wait for step(): not with a model sharded "
                "by FSDP2, and not with last_micro_batch; train in bfloat16, which needs no scaler, or leave them out"
            )
        scale.unscale(self.active_parameters())

    def _measured(self, meter: GradNormMeter, scale: LossScale | None) -> Tensor:
        """The step's RMS gradient of each unit over all workers, at the scale of the loss, shape (units,)."""
        unseen = set(meter.unseen())
        if self.probed:
            self._watch.without_gradient([unit for index, unit in enumerate(self.units) if index in unseen])
        # a loop divides each micro-batch's loss by their number: at the scale of the step's loss, however it is cut
        micro_batches = meter.micro_batches
        inverse = meter.inverse_scale() if scale is not None else 1.0
        norms = meter.collect() * micro_batches * inverse
        if scale is not None and scale.inverse is not None:
            norms = norms * scale.inverse
        return self.workers.average(norms, summed=self.workers.reduction == "sum")

    def _train(self, norms: Tensor, scale: LossScale | None) -> Tensor:
        """Average over the workers, clip and update; the norms to be observed, all NaN where nothing was updated."""
        active = self.active_parameters()
        under_way = self._sync.under_way
        self._watch.without_gradient(
            [unit for unit in self._active() if unit.name not in under_way and not has_gradient(unit.parameters)]
        )
        self._sync.finish(self._active())
        (norm,) = self._sync.norms([active])
        self.grad_norm = norm
        self._watch.first_step(lambda: float(norm))
        if self.max_grad_norm is not None:
            clip(active, self.max_grad_norm, norm)
        if self.sampler.grad_norms == "clipped":
            norms = self._rms_gradients()
        skip = ~torch.isfinite(norm)
        if scale is not None:
            skip = skip | (scale.found_inf > 0)
        self._update(active, skip.to(torch.float32))
        if self._proof is not None:
            moves = any(float(group["lr"]) > 0 for group in self.param_groups)
            self._proof.note(self.active_units if moves else (), skip)
        return norms.masked_fill(skip, torch.nan)

    def _update(self, active: list[nn.Parameter], skip: Tensor) -> None:
        """Step every active unit, unless ``skip`` is 1."""
        self._interrupted = True
        counters = []
        for parameter in active:
            if parameter.grad is not None:
                state = self._states.start(parameter, counter_only=self._placement.offloaded(self._unit_of[parameter]))
                if parameter not in self._states.projected:
                    counters.append(state[STEP])
        if counters:
            # a list: a scalar tensor would be read by the host
            torch._foreach_add_(counters, [1.0 - skip] * len(counters))
        # units further up first: backward reached them first, and their states may be on their way
        units = sorted(self._active(), key=lambda unit: -1 if unit.layer is None else unit.layer, reverse=True)
        self._placement.update(units, self.param_groups, skip)
        self._interrupted = False

    @property
    def sharded(self) -> bool:
        """Whether every worker has some rows of each parameter (FSDP2), and not all."""
        return self._shards is not None

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
        """The state tensors that are on the device now, and the ring that others are streamed through."""
        return self._placement.on_device((*self.units, *self.constant_units))

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of optimizer states (on the device, on the host)."""
        return sum(t.numel() * t.element_size() for t in self.resident_states()), self._placement.host.bytes

    def synchronize(self) -> None:
        """Let the current stream wait for updates that are still under way (``offload="lazy"``).

        Forward passes of the model and its ``state_dict`` do this by themselves; call it before reading weights in any
        other way.
        """
        self._placement.synchronize()

    def _after_gradient(self, parameter: nn.Parameter, react: Callable[[LayerwiseAdamW, Tensor], None]) -> None:
        """Call ``react`` whenever the parameter's gradient was accumulated, as long as this optimizer lives.

        Python's garbage collector does not see what such hooks hold: with a reference to the optimizer, and through it
        to the model, neither would ever be freed.
        """
        me = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            optimizer = me()
            if optimizer is not None:
                react(optimizer, parameter)

        self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _reduce(self, parameter: Tensor) -> None:
        if self.sharded or (self.last_micro_batch and not self.sampler.probing):
            self._sync.arrived(parameter, self._unit_of[parameter], self._active())

    def _total_norm(self, norms: Tensor) -> Tensor:
        """Global gradient norm of the units from their RMS values, shape (units,); NaN where none was measured."""
        total = (norms.square() * norms.new_tensor([unit.size for unit in self.units])).nansum().sqrt()
        return total.masked_fill(norms.isnan().all(), torch.nan)

    def _rms_gradients(self) -> Tensor:
        """RMS of each active unit's accumulated and clipped gradient, shape (units,), NaN elsewhere."""
        norms = torch.full((len(self.units),), torch.nan, device=self._device)
        active = [self.units[index] for index in self.active_units]
        for index, norm in zip(self.active_units, self._sync.norms([unit.parameters for unit in active]), strict=True):
            norms[index] = norm.float() / self.units[index].size ** 0.5
        return norms

    def _watch_gathered(self, parameter: nn.Parameter, gathered: nn.Parameter) -> None:
        """Measure, and drop while probing, the gradients of a sharded parameter before they are reduced."""
        if self._meter is not None:
            self._meter.watch(parameter, gathered)
            self._handles.append(self._meter.handles[-1])
        if self.sampler.probing:
            self._after_gradient(gathered, LayerwiseAdamW._drop_while_probing)

    def _drop_while_probing(self, parameter: Tensor) -> None:
        """Free a gradient the moment it was measured, so that probing never holds more than a few of them."""
        if self.sampler.probing:
            parameter.grad = None
            self._dropped = True

    # ---------------------------------------------------------------------------------------------- the switch

    def _switch(self, units: tuple[int, ...]) -> None:
        """Make ``units`` the active ones: states of those that leave go first, so that both never add up."""
        self._check_proof()
        started = time.perf_counter()
        self._interrupted = True
        self.switches += 1
        self.workers.check_agreement(units)
        leave = self._placement.forget if self.inactive_states == "reset" else self._placement.leave
        for index in sorted(set(self.active_units) - set(units)):
            leave(self.units[index])
        self._placement.host.synchronize(self._device)
        for index in sorted(set(units) - set(self.active_units)):
            self._placement.enter(self.units[index])
        self._activate(units)
        self._interrupted = False
        self.stats.switch_s += time.perf_counter() - started
        self.stats.exposed_s += time.perf_counter() - started
        self.stats.pinned = self._placement.host.pinned

    def _activate(self, units: tuple[int, ...]) -> None:
        """Let exactly ``units`` and the always-trained parts require gradients; frozen ones hold none."""
        self.active_units = units
        self._watch.new_active_set()
        for index, unit in enumerate(self.units):
            for parameter in unit.parameters:
                parameter.requires_grad_(index in units)
                if index not in units:
                    parameter.grad = None
        if not self.sampler.probing:
            self._placement.activate([self.units[index] for index in units])

    def _active(self) -> list[Unit]:
        return [self.units[index] for index in self.active_units] + self.constant_units

    # ------------------------------------------------------------------------------------------------ streaming

    def _choose_offload(self, offload: Offload) -> Offload:
        if offload != "auto":
            return offload
        if self._device.type != "cuda" or self._states.projection is not None:
            return "resident"
        free, _ = torch.cuda.mem_get_info(self._device)
        return "resident" if self._largest_active_bytes() <= RESIDENT_SHARE * free else "lazy"

    def _largest_active_bytes(self) -> int:
        """Bytes of the states of the largest set of units that the sampler may draw."""
        weights = [self._states.unit_bytes(unit) for unit in self.units]
        active_sets = self.sampler.largest_active_sets(weights)
        return max(sum(weights[unit] for unit in active) for active in active_sets)

    def _install_gates(self, model: nn.Module) -> None:
        """Forward passes wait for updates still under way: each layer for its own, the model for all outside layers."""
        by_layer: dict[int | None, list[str]] = {}
        for unit in self.units:
            by_layer.setdefault(unit.layer, []).append(unit.name)
        for layer, names in by_layer.items():
            module = model if layer is None else self.stack.modules[layer]
            self._handles.append(module.register_forward_pre_hook(WeakHook(self._placement.wait_for, names)))
        # the model must not hold the optimizer, which holds the ring and all states
        synchronize = WeakHook(self._placement.synchronize)
        if self._shards is not None:
            self._handles.extend(self._shards.before_forward(synchronize))
        self._handles.append(model.register_state_dict_pre_hook(synchronize))  # type: ignore[no-untyped-call]

    def _prefetch_unit(self, parameter: Tensor) -> None:
        if not self.sampler.probing:
            self._placement.prefetch(self._unit_of[parameter])

    def _refuse_misuse(self) -> None:
        """What a step must find: its model and its sampler as they were."""
        self._refuse_interrupted()
        self._refuse_late_shards()
        refuse_checkpoint_api()
        if self._retired:
            raise RuntimeError("another LayerwiseAdamW was built on this model after this one; step that one")
        if self.sampler not in _SAMPLERS or _SAMPLERS[self.sampler]() is not self:
            raise RuntimeError(
                "the sampler was given to another optimizer after this one, or put here after it was built; build each "
                "optimizer with a sampler of its own"
            )
        if self.units and not self.active_units:
            raise RuntimeError(
                f"{type(self.sampler).__name__} has not drawn yet: call optimizer.probe(measure) before the first "
                "step, or give the sampler its scores"
            )
        if self._shards is None:
            self._watch.check_active(self._active())
            self._watch.check_strangers(self._active())

    def _refuse_interrupted(self) -> None:
        if self._interrupted:
            raise RuntimeError(
                "an earlier step was interrupted in the middle of its update or switch, so weights and states do not "
                "belong to one step any more; go back to the last checkpoint (load_state_dict)"
            )

    def _refuse_late_shards(self) -> None:
        """Sharding puts new parameters into a model; the old ones never get a gradient again."""
        parameter = next(self.stack.modules[0].parameters())
        if self._shards is None and hasattr(parameter, "placements"):
            raise RuntimeError(
                "the model was sharded (fully_shard) after the optimizer was built, which still has the old weights; "
                "shard the model first, then build the optimizer"
            )

    # --------------------------------------------------------------------------------------------- the state

    def _parameters_in_order(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p in self._unit_of]

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout, with the sampler's state and the active units under ``"layerwise"``.

        Every mode writes the same: a parameter's ``step``, moments and remainder, each in its own dtype, those on the
        host straight from their blocks. Holds tensors and plain values only: ``torch.load(..., weights_only=True)``
        reads it. Of a sharded model: this worker's rows, and whose they are; see :meth:`full_state_dict`.

        Raises:
            RuntimeError: an earlier step was interrupted in the middle of its update.
        """
        self._refuse_interrupted()
        refuse_checkpoint_api()
        self._placement.synchronize_host()
        state = super().state_dict()
        for group in state["param_groups"]:
            group["params"] = [index for index in group["params"] if index < len(self._index)]
        state["state"] = saved_states(state["state"], self.units, self._placement, self._index)
        state["layerwise"] = {
            "sampler": self.sampler.state_dict(),
            "active_units": list(self.active_units),
            "switches": self.switches,
            "on_host": self._placement.host.units,
        }
        if self._shards is not None:
            state["layerwise"]["shard"] = self._shards.saved.to_dict()
        return state

    def full_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` as of a model that is not sharded; every worker must call it.

        :meth:`load_state_dict` takes it with any number of workers, sharded or not.

        Returns:
            On the first worker the state, on the CPU; an empty dictionary on all others, which only send theirs.
        """
        state = self.state_dict()
        if self._shards is None:
            return state if self.workers.rank == 0 else {}
        del state["layerwise"]["shard"]
        first = self.workers.rank == 0
        state["state"] = gather(state["state"], self._parameters_in_order(), self._shards, keep=first)
        return state if first else {}

    def adamw_state_dict(self) -> dict[str, Any]:
        """The states in the layout of ``torch.optim.AdamW`` over the same two parameter groups, for other trainers.

        Moments and counters only: what a remainder adds to a bfloat16 weight, and the sampler's place, have none there.
        Of a sharded model the whole states on the first worker, and nothing elsewhere; every worker must call it.
        """
        state = self.state_dict() if self._shards is None else self.full_state_dict()
        return adamw_layout(state, fused=self._device.type in ("cpu", "cuda")) if state else state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of any offload mode, bit for bit: each state goes where its unit's belongs.

        Of a sharded model every worker takes its own state, or all the same :meth:`full_state_dict`.

        Raises:
            ValueError: the state belongs to another model, to another optimizer, or to another worker.
        """
        refuse_checkpoint_api()
        if "layerwise" not in state_dict:
            raise ValueError("this state was not saved by LayerwiseAdamW: it has no 'layerwise' entry")
        own = state_dict["layerwise"]
        whole = "shard" not in own
        check_shard(own.get("shard"), self._shards)
        check_fits(state_dict, self.param_groups, self._index, self._states, units=len(self.units), whole=whole)
        self.sampler.load_state_dict(own["sampler"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.synchronize()
        self.switches = own["switches"]
        self._interrupted = False
        self._placement.clear()
        self._activate(tuple(own["active_units"]))
        states = state_dict["state"]
        if self._shards is not None and whole:
            states = {index: rows_of(saved, self._shards) for index, saved in states.items()}
        for place, unit in enumerate(self.units):
            saved = of_unit(states, unit, self._index)
            active, on_host = place in self.active_units, unit.name in own["on_host"]
            self._placement.load(unit, saved, active=active, on_host=on_host)
        for unit in self.constant_units:
            self._placement.hold(of_unit(states, unit, self._index))
        self._placement.host.synchronize(self._device)


# which optimizer a sampler serves
_SAMPLERS = WeakIdKeyDictionary()


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
