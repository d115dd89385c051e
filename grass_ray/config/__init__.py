"""The configuration of a run: typed, immutable, unknown keys are refused.

A :class:`RunConfig` holds everything that determines the numbers of a run, and reads the YAML it writes::

    config = RunConfig.from_yaml(path)
    config = config.override({"method.sampler.temperature": 0.2, "training.steps": 100})
    config.save(folder / "config.yaml")

Importing this package loads no torch, so that command lines start at once.
"""

from __future__ import annotations

from grass_ray.config.adapters import (
    AdapterConfig,
    AnyAdapterConfig,
    LoraConfig,
    PeftConfig,
    PrefixConfig,
    PromptConfig,
)
from grass_ray.config.base import ConfigPart
from grass_ray.config.code import Code, find_code, installed_code, text_of
from grass_ray.config.data import (
    CustomFields,
    CustomSource,
    DataConfig,
    DatasetColumns,
    DatasetSource,
    FolderSource,
    GeneratedSource,
    HubSource,
    Shape,
    SourceConfig,
)
from grass_ray.config.files import (
    check_ordinary,
    from_json,
    part_folder,
    read_text,
    sync,
    to_json,
    whole_file,
    write_whole,
)
from grass_ray.config.imported import ImportedPart
from grass_ray.config.method import (
    PLACEMENTS,
    AnyProjectionConfig,
    ApolloConfig,
    GaLoreConfig,
    ImportedProjectionConfig,
    InactiveSGDConfig,
    MethodConfig,
    MuonConfig,
    Offload,
    OptimizerConfig,
    ProjectionConfig,
    SGDConfig,
    Weights,
)
from grass_ray.config.run import (
    EvaluationConfig,
    GradientCheckpointing,
    LmEvalConfig,
    ModelConfig,
    Parallel,
    RunConfig,
    TrainingConfig,
    as_text,
    fingerprint_of,
    recomputed_layers,
    slug,
)
from grass_ray.config.samplers import (
    AllLayersConfig,
    AnySamplerConfig,
    ConvergingSamplerConfig,
    CyclicSamplerConfig,
    FixedSamplerConfig,
    FrequencySamplerConfig,
    GradNormSamplerConfig,
    ImportedSamplerConfig,
    MatrixNormSamplerConfig,
    OutlierSamplerConfig,
    RewardSamplerConfig,
    SamplerConfig,
    UniformSamplerConfig,
)
from grass_ray.config.schedules import (
    AnyScheduleConfig,
    CosineScheduleConfig,
    LinearScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
)
from grass_ray.errors import ConfigError
from grass_ray.reading import read_yaml

__all__ = [
    "PLACEMENTS",
    "AdapterConfig",
    "AllLayersConfig",
    "AnyAdapterConfig",
    "AnyProjectionConfig",
    "AnySamplerConfig",
    "AnyScheduleConfig",
    "ApolloConfig",
    "Code",
    "ConfigError",
    "ConfigPart",
    "ConvergingSamplerConfig",
    "CosineScheduleConfig",
    "CustomFields",
    "CustomSource",
    "CyclicSamplerConfig",
    "DataConfig",
    "DatasetColumns",
    "DatasetSource",
    "EvaluationConfig",
    "FixedSamplerConfig",
    "FolderSource",
    "FrequencySamplerConfig",
    "GaLoreConfig",
    "GeneratedSource",
    "GradNormSamplerConfig",
    "GradientCheckpointing",
    "HubSource",
    "ImportedPart",
    "ImportedProjectionConfig",
    "ImportedSamplerConfig",
    "InactiveSGDConfig",
    "LinearScheduleConfig",
    "LmEvalConfig",
    "LoraConfig",
    "MatrixNormSamplerConfig",
    "MethodConfig",
    "ModelConfig",
    "MuonConfig",
    "Offload",
    "OptimizerConfig",
    "OutlierSamplerConfig",
    "Parallel",
    "PeftConfig",
    "PrefixConfig",
    "ProjectionConfig",
    "PromptConfig",
    "RewardSamplerConfig",
    "RunConfig",
    "SGDConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "Shape",
    "SourceConfig",
    "StepScheduleConfig",
    "TrainingConfig",
    "UniformSamplerConfig",
    "Weights",
    "as_text",
    "check_ordinary",
    "find_code",
    "fingerprint_of",
    "from_json",
    "installed_code",
    "part_folder",
    "read_text",
    "read_yaml",
    "recomputed_layers",
    "slug",
    "sync",
    "text_of",
    "to_json",
    "whole_file",
    "write_whole",
]
