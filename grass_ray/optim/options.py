"""The settings of :class:`~grass_ray.optim.layerwise_adamw.LayerwiseAdamW` that most loops leave alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from grass_ray.config import Weights
from grass_ray.optim.chunks import CHUNK_BYTES
from grass_ray.optim.data_parallel import Reduction
from grass_ray.optim.inactive import InactiveSGD
from grass_ray.optim.kernels import Precision
from grass_ray.optim.projection import Projection
from grass_ray.optim.streams import Streams
from grass_ray.optim.units import Granularity


@dataclass(frozen=True, kw_only=True)
class LayerwiseOptions:
    """What :class:`~grass_ray.optim.layerwise_adamw.LayerwiseAdamW` trains besides the layers, and how.

    Args:
        projection: updates the layers' matrices in place of AdamW (:class:`~grass_ray.optim.projection.GaLore`,
            :class:`~grass_ray.optim.projection.Apollo`, :class:`~grass_ray.optim.momentum.Muon`), or all that trains
            (:class:`~grass_ray.optim.momentum.SGD`).
        inactive_states: ``"keep"`` the states of a layer that leaves the active set, or ``"reset"`` them to zero.
        train_embeddings: train the embeddings (and a head tied to them) at every step.
        train_head: train an untied LM head at every step.
        train_norm: train the final norm at every step.
        granularity: what the sampler picks from: decoder layers (``"layer"``), layers and both ends (``"block"``), or
            weight matrices (``"matrix"``).
        layers: name of the list of decoder layers, for models where it cannot be found.
        process_group: the data-parallel workers; None takes the default group of torch.distributed if there is one.
        gradient_reduction: the active gradients become their ``"mean"`` over the workers, or their ``"sum"`` if the
            loop has divided each loss by the number of labels of all workers.
        weights: where the weights of decoder layers live: ``"resident"``, all on the device; ``"streamed"``, those of
            layers that do not train in host memory, brought to the device ahead of each pass
            (:mod:`grass_ray.optim.weights`). The weights are the same bits.
        weight_slots: number of layers whose streamed weights are on the device at once.
        update_in_backward: update each unit as soon as the last backward of a step has brought its gradients, and free
            them, so that a step never holds those of all units; set ``last_micro_batch`` before that backward. A unit
            whose gradients are not finite stays as it is, the others are updated. Needs ``max_grad_norm=None``, one
            worker, and no loss scaler.
        inactive_updates: small updates of units that are not active, made in backward
            (:class:`~grass_ray.optim.inactive.InactiveSGD`; BREAD). Needs ``inactive_states="reset"``, resident
            weights, one worker, and no loss scaler.
        chunk_bytes: size of a slot of the ring and of a full host block, a power of two.
        ring_slots: number of slots of the ring.
        streams: where streamed work runs; None takes CUDA streams, or runs one thing after another on a CPU.

    Raises:
        ValueError: a setting is out of range, or two of them exclude each other.
    """

    projection: Projection | None = None
    inactive_states: Literal["keep", "reset"] = "keep"
    train_embeddings: bool = False
    train_head: bool = False
    train_norm: bool = False
    granularity: Granularity = "layer"
    layers: str | None = None
    process_group: Any | None = None
    gradient_reduction: Reduction = "mean"
    weights: Weights = "resident"
    weight_slots: int = 2
    update_in_backward: bool = False
    inactive_updates: InactiveSGD | None = None
    chunk_bytes: int = CHUNK_BYTES
    ring_slots: int = 4
    streams: Streams | None = None

    def __post_init__(self) -> None:
        if self.ring_slots < 1:
            raise ValueError(f"ring_slots is {self.ring_slots}; it must be at least 1")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights is {self.weights!r}; available: {', '.join(get_args(Weights))}")
        if self.weight_slots < 1:
            raise ValueError(f"weight_slots is {self.weight_slots}; it must be at least 1")
        if self.inactive_states not in ("keep", "reset"):
            raise ValueError(f"inactive_states is {self.inactive_states!r}; available: keep, reset")
        if self.inactive_updates is not None and (self.inactive_states == "keep" or self.weights == "streamed"):
            raise ValueError(
                "inactive_updates move weights whose states nobody updates, and that must be on the device; they need "
                "inactive_states='reset' and weights='resident'"
            )
        if self.granularity == "block" and self.always_trained:
            raise ValueError("granularity 'block' samples embeddings, head and norm; train_* flags cannot hold them")

    @property
    def always_trained(self) -> tuple[str, ...]:
        """Which of ``"embeddings"``, ``"head"`` and ``"norm"`` train at every step."""
        always = {"embeddings": self.train_embeddings, "head": self.train_head, "norm": self.train_norm}
        return tuple(name for name, trains in always.items() if trains)


def check_adamw(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
    precision: Precision,
) -> None:
    """Raise ValueError that lists every setting of AdamW that is out of range."""
    rules = [
        (lr > 0, f"lr is {lr}; it must be above 0"),
        (all(0 <= beta < 1 for beta in betas), f"betas are {betas}; each must be at least 0 and below 1"),
        (eps > 0, f"eps is {eps}; it must be above 0"),
        (weight_decay >= 0, f"weight_decay is {weight_decay}; it must not be negative"),
        (max_grad_norm is None or max_grad_norm > 0, f"max_grad_norm is {max_grad_norm}; it must be above 0 or None"),
        (precision in get_args(Precision), f"precision is {precision!r}; available: {', '.join(get_args(Precision))}"),
    ]
    mistakes = [message for holds, message in rules if not holds]
    if mistakes:
        raise ValueError("; ".join(mistakes))


def check_in_backward(options: LayerwiseOptions, max_grad_norm: float | None, workers: int) -> None:
    """Raise ValueError if updates shall happen inside backward, but something has to see all gradients first."""
    if workers > 1 and options.inactive_updates is not None:
        raise ValueError(
            f"inactive_updates need one worker, and there are {workers}: they use gradients as they arrive"
        )
    if not options.update_in_backward:
        return
    if max_grad_norm is not None:
        raise ValueError(
            f"update_in_backward needs max_grad_norm None, not {max_grad_norm}: the norm of all gradients is known "
            "only after backward"
        )
    if workers > 1:
        raise ValueError(
            f"update_in_backward needs one worker, and there are {workers}: gradients are those of all workers only "
            "after backward"
        )


def refuse_keywords(names: Collection[str]) -> None:
    """Raise TypeError for keywords that ``LayerwiseAdamW`` does not take; those of the options are told apart."""
    known = {field.name for field in fields(LayerwiseOptions)}
    if unknown := sorted(set(names) - known):
        raise TypeError(f"LayerwiseAdamW has no argument {', '.join(unknown)}")
    if names:
        moved = ", ".join(f"{name}=..." for name in names)
        raise TypeError(
            f"{', '.join(names)} {'are options' if len(names) > 1 else 'is an option'} of LayerwiseAdamW: pass "
            f"options=LayerwiseOptions({moved})"
        )
