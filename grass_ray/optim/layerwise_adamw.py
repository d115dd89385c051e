"""LayerwiseAdamW: AdamW that trains a few layers at a time and chooses them itself.

A drop-in ``torch.optim.Optimizer``; probing, sampling, freezing, switching and moving states all happen in ``step``::

    optimizer = LayerwiseAdamW(model, GradNormSampler(num_active_layers=2, period=20), lr=1e-5)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

While ``optimizer.probing`` is True the gradients are measured and dropped, nothing is updated, and a learning-rate
schedule should stand still; layers are computed again in backward then (:mod:`grass_ray.optim.recompute`), so that
these steps take no more memory than others. A model sharded by FSDP2 (``fully_shard``) trains the same way, each worker
holding the states of its own rows. GRASS: arXiv 2604.07808; AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Never

import torch
from torch import Tensor, nn

from grass_ray.config import Offload
from grass_ray.layerwise.sampler import Measure, Sampler, check_complete
from grass_ray.optim.active_set import ActiveSet
from grass_ray.optim.gradients import Gradients
from grass_ray.optim.hooks import handles_of, remove
from grass_ray.optim.in_backward import BackwardUpdates, moves
from grass_ray.optim.kernels import Precision
from grass_ray.optim.loss_scaling import LossScale
from grass_ray.optim.options import LayerwiseOptions, check_adamw, check_in_backward, refuse_keywords
from grass_ray.optim.ownership import Takeover, check_not_retired, check_sampler, claim_sampler
from grass_ray.optim.parts import take_apart
from grass_ray.optim.placement import check_offload, placement_class, resolve_offload
from grass_ray.optim.proof import Proof
from grass_ray.optim.refusals import OneModelOptimizer, refuse_checkpoint_api
from grass_ray.optim.saving import StateSaver
from grass_ray.optim.sharded import clip
from grass_ray.optim.states import States
from grass_ray.optim.step_info import StepInfo, StepRecorder
from grass_ray.optim.streaming import OffloadStats
from grass_ray.optim.sync import make_sync
from grass_ray.optim.units import in_order_of_forward
from grass_ray.optim.watch import Watch
from grass_ray.optim.weights import make_weights


class LayerwiseAdamW(OneModelOptimizer):
    """AdamW over the layers a sampler draws.

    Parameters that do not require a gradient when the optimizer is built stay frozen (a peft model's base
    weights, layers that the sampler shall not draw from); all others belong to it, and those outside the active set are
    frozen by it. Under ``torch.amp.GradScaler`` importance is measured at the scale of the loss itself, and a step that
    the scaler skips is not measured. If torch.distributed is initialised, the gradients of the active set are averaged
    over the workers inside ``step``: pass the bare model, not one wrapped in DistributedDataParallel. Or first give its
    layers and then itself to FSDP2's ``fully_shard``.

    Args:
        model: a decoder language model, on its device.
        sampler: which layers train, and when that changes.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: term added to the denominator for numerical stability.
        weight_decay: decoupled; applies to matrices, never to norms and biases.
        max_grad_norm: clip the global norm of the active gradients inside ``step``; None does not clip.
        precision: what bfloat16 weights keep as state (:mod:`grass_ray.optim.kernels`): ``"weights"``, ``"rem16"``,
            ``"exact"`` or ``"int8"``, which holds for float32 weights, too; the same for all other weights.
        offload: where states of sampled units live. ``"none"``: on the device, all that were ever active.
            ``"resident"``: active ones on the device, all others on the host, moved at a switch. ``"blocking"``,
            ``"overlap"``, ``"lazy"``: all on the host, streamed through a small ring at every step
            (:mod:`grass_ray.optim.streaming`). ``"auto"``: resident if the active states are small compared with the
            free device memory, else lazy. All give bitwise the same weights.
        options: everything else (:class:`~grass_ray.optim.options.LayerwiseOptions`).

    Attributes:
        active_units: indices of the units that train now.
        switches: active sets drawn after the first one.
        grad_norm: global gradient norm of the last step, before clipping.
        probed: whether the last step only measured.
        last: what the last step did (:class:`~grass_ray.optim.step_info.StepInfo`); None before the first one.
        offload: the mode in force (``"auto"`` resolved).
        stats: what moving states and weights has cost so far.
        weights: where the layers' weights live (:mod:`grass_ray.optim.weights`).
        workers: the data-parallel workers.
        sharded: whether each worker has some rows of each parameter (FSDP2), and not all.
        last_micro_batch: set it before a step's last backward, and gradients travel to the other workers (or are used)
            while backward goes on; ``step`` sets it back. Left alone, that waits for ``step``.

    Raises:
        ValueError: no decoder stack, no trainable layer, more active layers than trainable ones, a setting out of
            range, float16 weights that should train, or a model sharded in another way than by rows over
            the process group.
        TypeError: an argument that is one of the options, or unknown; a sampler without what a ``Sampler`` has.
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
        precision: Precision = "rem16",
        offload: Offload = "auto",
        options: LayerwiseOptions | None = None,
        **others: Never,
    ) -> None:
        refuse_keywords(others)
        check_complete(sampler)
        options = options or LayerwiseOptions()
        check_adamw(lr, betas, eps, weight_decay, max_grad_norm, precision)
        check_offload(offload, options)
        with Takeover(model) as takeover:
            parts = take_apart(model, sampler, options)
        super().__init__(parts.groups(), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.sampler = sampler
        self.max_grad_norm = max_grad_norm
        self.stack, self.units, self.constant_units = parts.stack, parts.units, parts.constant
        self.grad_norm: Tensor | None = None
        self.probed = False
        self.last: StepInfo | None = None
        self.last_micro_batch = False
        self._sync = make_sync(parts, options)
        self.workers, self.sharded = self._sync.workers, self._sync.sharded
        check_in_backward(options, max_grad_norm, self.workers.count)
        index = {p: place for place, p in enumerate(p for group in self.param_groups for p in group["params"])}
        self._retired = False
        self._watch = Watch(model, parts.unmanaged, None if options.weights == "resident" else parts.device)
        self._model = weakref.ref(model)
        self._handles = handles_of(self)
        self.stats = stats = OffloadStats()
        self.weights = make_weights(model, parts, options, stats, self._handles)
        states = States(self.state, precision, options.projection, parts.projected, index)
        self.offload = resolve_offload(offload, sampler, self.units, states, parts.device)
        placement = self._placement = placement_class(self.offload)(states, parts.device, stats, options)
        self._handles += placement.hooks(model, self.stack.modules, self.units, self._sync.before_forward)
        self._active = ActiveSet(parts, sampler, placement, self.weights, self._watch, self.workers, stats, options)
        backward = BackwardUpdates(self._active, placement, self.param_groups) if options.update_in_backward else None
        self._gradients = Gradients(self, self._active, self._sync, self._watch, self._handles, backward)
        self._saver = StateSaver(self._active, states, placement, self._sync, index)
        if self._gradients.witness is not None:
            # last, so that the places of all others stay: a scaler unscales what is in a group
            self.param_groups[-1]["params"].append(self._gradients.witness)
        parts.freeze_others(model)
        self._handles.append(self._active.recompute)
        self._active.begin()
        self._recorder = StepRecorder(sampler, self.stats)
        takeover.complete(self, parts.given)
        claim_sampler(sampler, self)

    def retire(self) -> None:
        """Remove all hooks: another optimizer is built on the model, and ``step`` raises from now on."""
        self.synchronize()
        self._retired = True
        remove(self._handles)

    # ------------------------------------------------------------------------------------------------ the step

    def prove(self) -> Proof:
        """From now on compare all weights at switches, to prove that exactly the active units change.

        Reads every weight once per check, and waits for the device. A mistake is reported as a warning.

        Returns:
            The proof: its ``mistakes`` so far, and :meth:`~grass_ray.optim.proof.Proof.check` for a last look.
        """
        self.synchronize()
        return self._active.prove(self._model())

    def probe(self, measure: Measure) -> None:
        """Before a step's forward: let the sampler take extra measurements, and switch if they make a draw due."""
        self.sampler.probe(measure)
        self._active.switch_if_due()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Measure, average over the workers, clip and update the active layers; at a boundary draw the next ones.

        If a gradient is not finite, weights, states and counters stay as they are, and ``grad_norm`` is not finite.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Returns:
            The loss that ``closure`` returned; None without one.

        Raises:
            RuntimeError: nothing is active (a sampler that must measure first got no ``probe``), the workers
                disagree about what is, an earlier step was interrupted in the middle of its update or switch, the model
                was sharded, wrapped, frozen, moved or cast after the optimizer was built, or another optimizer has
                taken over the model or the sampler.
        """
        self._gradients.check_whole()
        refuse_checkpoint_api()
        check_not_retired(self._retired)
        check_sampler(self.sampler, self)
        self._active.check_drawn()
        self._sync.check_model(next(self.stack.modules[0].parameters()), self._watch, self._active.with_gradients)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = self.active_units, self.active_layers
        if self._gradients.nothing_arrived():
            self._watch.no_gradient_at_all()
            self.grad_norm = torch.zeros((), device=self._active.parts.device)
        else:
            self._advance()
        self.last = self._recorder.step(*trained, probed=self.probed, switches=self.switches)
        return loss

    def _advance(self) -> None:
        """Measure and drop the gradients, or update; then draw the next active set if it is due."""
        self.probed = self.sampler.probing
        scale = LossScale.of(self, self._active.parts.device)
        norms = self._gradients.measure(scale)
        self.last_micro_batch = False
        if self.probed:
            self.zero_grad(set_to_none=True)
            self.grad_norm = self._gradients.total_norm(norms)
            self._active.note_step(())
        else:
            norms = self._train(norms, scale)
        self.sampler.observe(norms)
        self._gradients.next_step()
        self._active.switch_if_due()

    def _train(self, norms: Tensor, scale: LossScale | None) -> Tensor:
        """Average over the workers, clip and update; the norms to be observed, all NaN if nothing was updated."""
        norm = self._gradients.finish()
        self.grad_norm = norm
        self._watch.first_step(lambda: float(norm))
        if self.max_grad_norm is not None:
            clip(self.active_parameters(), self.max_grad_norm, norm)
        if self.sampler.grad_norms == "clipped":
            norms = self._gradients.accumulated_norms()
        skip = ~torch.isfinite(norm) if scale is None else ~torch.isfinite(norm) | (scale.found_inf > 0)
        waiting = self._gradients.waiting
        with self._active.uninterrupted:
            self._placement.update(in_order_of_forward(waiting), self.param_groups, skip.to(torch.float32))
        self._active.note_step(self.active_units if waiting and moves(self.param_groups) else (), skip)
        return norms.masked_fill(skip, torch.nan)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throw away gradients, and what was measured of them since the last step."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

    # -------------------------------------------------------------------------------------------- what trains now

    @property
    def probing(self) -> bool:
        """Whether the next step only measures; a learning-rate schedule should stand still meanwhile."""
        return self.sampler.probing

    @property
    def active_units(self) -> tuple[int, ...]:
        """Indices of the units that train now, ascending."""
        return self._active.indices

    @property
    def switches(self) -> int:
        """Active sets drawn after the first one."""
        return self._active.switches

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers in which something trains now, ascending."""
        layers = {self.units[index].layer for index in self.active_units}
        return tuple(sorted(layer for layer in layers if layer is not None))

    def active_parameters(self) -> list[nn.Parameter]:
        """The parameters that train now."""
        return self._active.parameters

    def resident_states(self) -> Iterator[Tensor]:
        """The state tensors that are on the device now, and the ring that others are streamed through."""
        return self._placement.on_device((*self.units, *self.constant_units))

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of optimizer states (on the device, on the host)."""
        return sum(t.numel() * t.element_size() for t in self.resident_states()), self._placement.host.bytes

    def synchronize(self) -> None:
        """Let the current stream wait for updates under way (``offload="lazy"``), and streamed weights be on the host.

        Forward passes of the model and its ``state_dict`` do this by themselves; call it before reading or changing
        weights in any other way.
        """
        self._placement.synchronize()
        self.weights.rest()

    # --------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Torch's layout, with the sampler's state and the active units under ``"layerwise"``.

        Every mode writes the same: a parameter's ``step``, moments and remainder, each in its own dtype, those on the
        host straight from their blocks. Holds tensors and plain values only: ``torch.load(..., weights_only=True)``
        reads it. If the model is sharded: this worker's rows, and which ones they are; see :meth:`full_state_dict`.

        Raises:
            RuntimeError: an earlier step was interrupted in the middle of its update.
        """
        self._active.uninterrupted.check()
        refuse_checkpoint_api()
        self._placement.synchronize_host()
        return self._saver.save(super().state_dict())

    def full_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` as of a model that is not sharded. Collective: call on every rank.

        :meth:`load_state_dict` takes it with any number of workers, sharded or not.

        Returns:
            On rank 0 the state, on the CPU if the model is sharded; an empty dictionary on all other ranks.
        """
        return self._saver.whole(self.state_dict())

    def adamw_state_dict(self) -> dict[str, Any]:
        """The states in the layout of ``torch.optim.AdamW`` over the same two parameter groups, for other trainers.

        Moments and counters only: what a remainder adds to a bfloat16 weight, and the sampler's place, have none there.
        If the model is sharded: the whole states on rank 0, and nothing elsewhere. Collective: call on every rank then.
        """
        return self._saver.adamw(self.state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict` of any offload mode, bit for bit: each state goes where its unit's belongs.

        If the model is sharded, every worker takes its own state, or all take the same :meth:`full_state_dict`.

        Raises:
            ValueError: the state belongs to another model, to another optimizer, or to another worker.
        """
        refuse_checkpoint_api()
        self._saver.load(state_dict, self.param_groups)
        self._gradients.next_step()
        self._recorder.begin(switches=self.switches)
