"""Let a learning-rate schedule stand still while the optimizer only measures.

A probing step updates nothing, so it must not use up a step of warm-up or decay::

    schedule = hold_while_probing(get_scheduler("cosine", optimizer, 10, updates), optimizer)
    trainer = Trainer(..., optimizers=(optimizer, schedule))

``updates`` counts the steps after probing. Where you call ``schedule.step()`` yourself, ``if not optimizer.probed``
does the same.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch.optim.lr_scheduler import LRScheduler

from grass_ray.optim.layerwise_adamw import LayerwiseAdamW

Schedule = TypeVar("Schedule", bound=LRScheduler)


def hold_while_probing(schedule: Schedule, optimizer: LayerwiseAdamW) -> Schedule:
    """Make ``schedule.step()`` do nothing after a step of ``optimizer`` that only measured.

    Args:
        schedule: any schedule of torch or transformers over ``optimizer``; it may then be given to Trainer or
            Accelerate. Its state dictionary is the one it had without this.
        optimizer: the LayerwiseAdamW itself, not Accelerate's wrapper around it.

    Returns:
        The same object, which is still an instance of its class.

    Raises:
        TypeError: ``optimizer`` cannot say whether it only measured.
    """
    if not isinstance(optimizer, LayerwiseAdamW):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}; hold_while_probing needs the LayerwiseAdamW itself "
            "(before accelerator.prepare, or its .optimizer afterwards)"
        )
    kind = type(schedule)

    def step(self: LRScheduler, *arguments: Any, **options: Any) -> None:
        if not optimizer.probed:
            kind.step(self, *arguments, **options)

    # a subclass made for this object, not an attribute: state_dict() returns every attribute, and must stay plain data
    schedule.__class__ = type(f"Holding{kind.__name__}", (kind,), {"step": step, "__doc__": kind.__doc__})
    return schedule
