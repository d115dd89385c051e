"""A search small enough for tests: the built-in random model, generated problems, few steps."""

from grass_ray.commands.sweep import main
from grass_ray.experiment import (
    DataConfig,
    EvaluationConfig,
    GeneratedSource,
    LogUniform,
    OneOf,
    Sweep,
    TrainingConfig,
)

SWEEP = Sweep(
    name="mini-search",
    question="Does a search run from end to end?",
    models=("tiny",),
    methods=("grass",),
    tasks=("generated",),
    seeds=(0,),
    data=DataConfig(source=GeneratedSource(train_rows=64, test_rows=8), validation_rows=16),
    training=TrainingConfig(steps=36, batch_size=4, warmup_steps=1),
    evaluation=EvaluationConfig(limit=4),
    settings={"method.optimizer.lr": 1e-2},
    method_settings={"grass": {"method.sampler.probing_steps": 2}},
    space={
        "method.sampler.period": LogUniform(low=2, high=10, whole=True),
        "method.sampler.temperature": OneOf(
            options={
                "constant": LogUniform(low=0.1, high=4.0),
                "falling": {
                    "kind": "linear",
                    "start": LogUniform(low=1.0, high=4.0),
                    "end": LogUniform(low=0.1, high=1.0),
                },
            }
        ),
    },
)

if __name__ == "__main__":
    main(SWEEP)
