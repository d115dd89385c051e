"""A sweep small enough for tests: the built-in random model, generated problems, few steps; ``lora`` goes wrong."""

from grass_ray.commands.sweep import main
from grass_ray.experiment.flags import SweepDefaults
from grass_ray.experiment.sweep import Sweep

SWEEP = Sweep(
    name="mini",
    question="Does a sweep run from end to end?",
    defaults=SweepDefaults(
        models=("tiny",),
        methods=("full", "grass", "lora"),
        tasks=("generated",),
        seeds=(0,),
        settings=(
            "training.steps=300",
            "training.batch_size=4",
            "training.warmup_steps=1",
            "training.checkpoint_every_steps=50",
            "data.source.train_rows=64",
            "data.source.test_rows=8",
            "evaluation.limit=4",
        ),
        method_settings={
            "lora": ("method.optimizer.lr=1e30",),  # a loss that is no number any more after one update
            "grass": ("method.sampler.period=10", "method.sampler.probing_steps=4", "method.sampler.refresh_period=40"),
        },
    ),
)

if __name__ == "__main__":
    main(SWEEP)
