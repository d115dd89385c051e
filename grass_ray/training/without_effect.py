"""Settings that can change nothing in a run: a refresh that no draw follows, a warm-up longer than the training.

Such a run is what was asked for, and mostly not what was meant; whoever starts it says so at the door.
"""

from __future__ import annotations

from collections.abc import Iterator

from grass_ray.config import (
    AllLayersConfig,
    ConfigPart,
    GradNormSamplerConfig,
    MatrixNormSamplerConfig,
    RewardSamplerConfig,
    RunConfig,
)
from grass_ray.layerwise.schedules import count_at
from grass_ray.training.sampling import plain_schedule


def settings_without_effect(config: RunConfig) -> list[str]:
    """One line a setting: its key and value, and why it changes nothing in this run. Empty for an untrained one."""
    if not config.training.steps:
        return []
    return [*_of_the_clock(config), *_of_grass(config), *_of_states(config), *_of_the_loop(config)]


def _of_the_clock(config: RunConfig) -> Iterator[str]:
    """Schedules and periods that go beyond the training."""
    sampler, steps = config.method.sampler, config.training.steps
    for name, value in sampler:
        if isinstance(value, ConfigPart) and (length := getattr(value, "steps", None) or 0) > steps:
            yield (
                f"method.sampler.{name}.steps={length}: training ends after {steps} steps, so the schedule never "
                "reaches its end"
            )
    # a first sweep of MISA switches at every step whatever the period
    period = None if isinstance(sampler, MatrixNormSamplerConfig) else getattr(sampler, "period", None)
    if period is not None and len(draw_steps(config)) == 1:
        yield (
            f"method.sampler.period={_shown(period)}: training ends after {steps} steps, so the first active set "
            "trains throughout"
        )
    if isinstance(sampler, RewardSamplerConfig) and sampler.refresh_period >= steps:
        yield (
            f"method.sampler.refresh_period={sampler.refresh_period}: training ends after {steps} steps, so the "
            "importance is never updated and every draw is uniform"
        )


def _of_grass(config: RunConfig) -> Iterator[str]:
    """What measures, and what is done with it."""
    sampler, steps = config.method.sampler, config.training.steps
    if not isinstance(sampler, GradNormSamplerConfig):
        return
    if sampler.exploration == 1:
        yield (
            "method.sampler.exploration=1: every draw is uniform, so what is measured, and the temperature, change "
            "nothing"
        )
        return
    refreshed = sampler.refresh_period is not None and draw_steps(config)[-1] >= sampler.refresh_period
    kept = "what probing measured, as in grass-static" if sampler.probing_steps else "uniform"
    if sampler.refresh_period is not None and not refreshed:
        yield (
            f"method.sampler.refresh_period={sampler.refresh_period}: nothing is drawn after a refresh before training "
            f"ends after {steps} steps, so the probabilities stay {kept}"
        )
    elif not refreshed and not sampler.probing_steps:
        yield (
            "method.sampler.refresh_period=null with probing_steps=0: nothing is ever measured, so every draw is "
            "uniform whatever the temperature"
        )
    if sampler.staleness != "none" and not refreshed:
        yield f"method.sampler.staleness={sampler.staleness}: it corrects at refreshes, and none comes before a draw"
    if sampler.probing_steps > steps:
        yield f"method.sampler.probing_steps={sampler.probing_steps}: more steps only measure than train ({steps})"


def _of_states(config: RunConfig) -> Iterator[str]:
    """What happens to states that never leave, and to projections that are never renewed."""
    method, steps = config.method, config.training.steps
    if isinstance(method.sampler, AllLayersConfig):
        if method.inactive_states == "reset":
            yield "method.inactive_states=reset: nothing is ever inactive"
        if method.offload == "resident":
            yield "method.offload=resident: nothing is ever inactive, so all states stay on the device as with none"
    projection = method.optimizer.projection
    if projection is not None and projection.refresh_period >= steps:
        yield (
            f"method.optimizer.projection.refresh_period={projection.refresh_period}: training ends after {steps} "
            "steps, so the first projections stay"
        )


def _of_the_loop(config: RunConfig) -> Iterator[str]:
    """The learning rate's schedule, and checkpoints on the way."""
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


def draw_steps(config: RunConfig) -> list[int]:
    """Training steps, from 0, before which a sampler with a period draws."""
    steps = config.training.steps
    period = plain_schedule(getattr(config.method.sampler, "period", None), steps)
    found = [0]
    while period is not None and (coming := found[-1] + count_at(period, found[-1])) < steps:
        found.append(coming)
    return found


def _shown(value: object) -> str:
    return value.kind if isinstance(value, ConfigPart) else f"{value}"  # type: ignore[attr-defined]
