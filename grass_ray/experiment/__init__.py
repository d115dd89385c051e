"""What to run: sweeps, their flags and plans, search spaces and search algorithms. Needs no ray.

The names that a sweep's file needs are here.
"""

from grass_ray.config import DataConfig, EvaluationConfig, GeneratedSource, TrainingConfig
from grass_ray.experiment.space import LogUniform, OneOf
from grass_ray.experiment.sweep import Preset, Sweep

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "GeneratedSource",
    "LogUniform",
    "OneOf",
    "Preset",
    "Sweep",
    "TrainingConfig",
]
