"""The sampler that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grass_ray.config import (
    AllLayersConfig,
    CosineScheduleConfig,
    CyclicSamplerConfig,
    LinearScheduleConfig,
    MethodConfig,
    StepScheduleConfig,
)
from grass_ray.layerwise.grad_norm import GradNormSampler
from grass_ray.layerwise.matrix_norm import MatrixNormSampler
from grass_ray.layerwise.outliers import OutlierSampler
from grass_ray.layerwise.rewards import RewardSampler
from grass_ray.layerwise.samplers import AllLayersSampler, CyclicSampler, Sampler, UniformSampler
from grass_ray.layerwise.schedules import Cosine, Linear, Step


def build_sampler(method: MethodConfig, seed: int, training_steps: int) -> Sampler:
    """The sampler a method's row describes; schedules without a length span ``training_steps``."""
    config = method.sampler
    if isinstance(config, AllLayersConfig):
        return AllLayersSampler()
    given = {name: value for name, value in config if name not in ("kind", "hold_lr")}
    settings = {name: plain_schedule(value, training_steps) for name, value in given.items()}
    if isinstance(config, CyclicSamplerConfig):
        settings["training_steps"] = training_steps
    return SAMPLERS[config.kind](**settings, seed=seed)


SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    "uniform": UniformSampler,
    "grad_norm": GradNormSampler,
    "outlier": OutlierSampler,
    "cyclic": CyclicSampler,
    "reward": RewardSampler,
    "matrix_norm": MatrixNormSampler,
}


def plain_schedule(value: Any, training_steps: int) -> Any:
    """A setting as samplers take it: schedules of the configuration become schedules over steps."""
    match value:
        case LinearScheduleConfig():
            return Linear(value.start, value.end, steps=value.steps or max(training_steps, 1))
        case CosineScheduleConfig():
            return Cosine(value.start, value.end, steps=value.steps or max(training_steps, 1))
        case StepScheduleConfig():
            return Step(value.values, value.at_progress, steps=value.steps or max(training_steps, 1))
        case _:
            return value
