"""Build the optimizer and the learning rate schedule that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grass_ray.config import MethodConfig, RunConfig
from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.layerwise_adamw import LayerwiseAdamW
from grass_ray.optim.options import LayerwiseOptions


def build_optimizer(model: Any, sampler: Sampler, method: MethodConfig) -> LayerwiseAdamW:
    """Build the optimizer that a method describes.

    Args:
        model: adapters included.
        sampler: chooses what trains.
        method: a row of the methods' table.

    Raises:
        ValueError: the method cannot train this model.
    """
    settings = method.optimizer
    return LayerwiseAdamW(
        model,
        sampler,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        precision=settings.precision,
        offload=method.offload,
        options=optimizer_options(method),
    )


def optimizer_options(method: MethodConfig) -> LayerwiseOptions:
    """What the optimizer of a method trains besides the layers, and how. Raises :class:`ValueError`."""
    projection = method.optimizer.projection
    return LayerwiseOptions(
        projection=None if projection is None else projection.build(),
        inactive_states=method.inactive_states,
        train_embeddings=method.train_embeddings,
        train_head=method.train_head,
        train_norm=method.train_norm,
        granularity=method.granularity,
        weights=method.weights,
        update_in_backward=method.update_in_backward,
        inactive_updates=None if method.inactive_updates is None else method.inactive_updates.make(),
        # the loop divides by the labels of all workers
        gradient_reduction="sum",
    )


def build_schedule(optimizer: LayerwiseAdamW, config: RunConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the learning rate schedule of a run; the sampler may hold it within its cycles."""
    from transformers import get_scheduler

    training = config.training
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        names[training.lr_schedule],
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=max(training.steps, 1),
    )
    if optimizer.sampler.lr_cycle_steps > 1:
        _hold_within_cycles(schedule, optimizer.sampler.lr_cycle_steps, training.warmup_steps)
    return schedule


def _hold_within_cycles(schedule: Any, cycle_steps: int, warmup_steps: int) -> None:
    """After the warm-up, give every step the learning rate of its cycle's first step."""

    def held(of_step: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: of_step(step if step < warmup_steps else max(step - step % cycle_steps, warmup_steps))

    schedule.lr_lambdas = [held(of_step) for of_step in schedule.lr_lambdas]
