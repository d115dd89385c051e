"""The sweep that is disturbed: the built-in random model on made-up problems, long enough to be killed in it."""

from grass_ray.commands.sweep import main
from grass_ray.experiment import DataConfig, EvaluationConfig, GeneratedSource, Sweep, TrainingConfig

SWEEP = Sweep(
    name="chaos",
    question="Does a disturbed sweep end with the numbers of an undisturbed one?",
    models=("tiny",),
    methods=("full", "lisa", "grass"),
    tasks=("generated",),
    seeds=(0,),
    data=DataConfig(source=GeneratedSource(train_rows=64, test_rows=8)),
    training=TrainingConfig(steps=300, batch_size=4, warmup_steps=1, checkpoint_every_steps=25),
    evaluation=EvaluationConfig(limit=8),
    method_settings={
        "lisa": {"method.sampler.period": 10},
        "grass": {
            "method.sampler.period": 10,
            "method.sampler.probing_steps": 4,
            "method.sampler.refresh_period": 40,
        },
    },
)

if __name__ == "__main__":
    main(SWEEP)
