"""Find settings that have no effect in a run, such as a warmup longer than the training.

They are valid but usually a mistake, so commands print them before a run starts.
"""

from __future__ import annotations

from collections.abc import Iterator

from grass_ray.config import RunConfig, ScheduleConfig, SGDConfig
from grass_ray.layerwise.sampler import Sampler


def settings_without_effect(config: RunConfig) -> list[str]:
    """Return one line per setting without effect: its key, its value and why. Empty if the run does not train."""
    if not config.training.steps:
        return []
    return [*_of_the_sampler(config), *_of_states(config), *_of_the_loop(config)]


def _of_the_sampler(config: RunConfig) -> Iterator[str]:
    """Schedules that are longer than the training, and what the sampler reports about its settings."""
    steps = config.training.steps
    for name, value in config.method.sampler:
        if isinstance(value, ScheduleConfig) and (length := value.length or 0) > steps:
            yield (
                f"method.sampler.{name}.steps={length}: training ends after {steps} steps, so the schedule never "
                "reaches its end"
            )
    sampler: Sampler = config.method.sampler.build(seed=config.seed, train_steps=steps)
    yield from (f"method.sampler.{line}" for line in sampler.without_effect(steps))


def _of_states(config: RunConfig) -> Iterator[str]:
    """Settings of inactive states if no layer is ever inactive, and of projections that are never updated."""
    method, steps = config.method, config.training.steps
    if method.sampler.trains_all:
        if method.inactive_states == "reset":
            yield "method.inactive_states=reset: nothing is ever inactive"
        if method.offload == "resident":
            yield "method.offload=resident: nothing is ever inactive, so all states stay on the device as with none"
    projection = method.optimizer.projection
    if isinstance(projection, SGDConfig) and method.optimizer.precision != "rem16":
        yield f"method.optimizer.precision={method.optimizer.precision}: it is AdamW's, and sgd updates all that trains"
    refresh_period = getattr(projection, "refresh_period", None)
    if refresh_period is not None and refresh_period >= steps:
        yield (
            f"method.optimizer.projection.refresh_period={refresh_period}: training ends after {steps} "
            "steps, so the first projections stay"
        )


def _of_the_loop(config: RunConfig) -> Iterator[str]:
    """The learning rate schedule and the interval of checkpoints."""
    training = config.training
    if training.warmup_steps >= training.steps:
        yield (
            f"training.warmup_steps={training.warmup_steps}: training ends after {training.steps} steps, so the "
            f"learning rate never reaches {config.method.optimizer.lr:g}, and lr_schedule={training.lr_schedule} "
            "changes nothing"
        )
    every = training.checkpoint_every_steps
    total = training.steps + getattr(config.method.sampler, "probing_steps", 0)
    if every is not None and every > total:
        yield f"training.checkpoint_every_steps={every}: the run ends after {total} steps, so none is written before"
