"""A sweep small enough for tests: the built-in random model, generated problems, few steps; ``lora`` goes wrong."""

from grass_ray.commands.sweep import main
from grass_ray.experiment import DataConfig, EvaluationConfig, GeneratedSource, Sweep, TrainingConfig

SWEEP = Sweep(
    name="mini",
    question="Does a sweep run from end to end?",
    models=("tiny",),
    methods=("full", "grass", "lora"),
    tasks=("generated",),
    seeds=(0,),
    data=DataConfig(source=GeneratedSource(train_rows=64, test_rows=8)),
    training=TrainingConfig(steps=300, batch_size=4, warmup_steps=1, checkpoint_every_steps=50),
    evaluation=EvaluationConfig(limit=4),
    method_settings={
        "lora": {"method.optimizer.lr": 1e30},  # a loss that is no number any more after one update
        "grass": {
            "method.sampler.period": 10,
            "method.sampler.probing_steps": 4,
            "method.sampler.refresh_period": 40,
        },
    },
)

if __name__ == "__main__":
    main(SWEEP)
