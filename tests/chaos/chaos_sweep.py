"""The sweep that is disturbed: the built-in random model on made-up problems, long enough to be killed in it."""

from grass_ray.commands.sweep import main
from grass_ray.experiment.flags import SweepDefaults
from grass_ray.experiment.sweep import Sweep

SWEEP = Sweep(
    name="chaos",
    question="Does a disturbed sweep end with the numbers of an undisturbed one?",
    defaults=SweepDefaults(
        models=("tiny",),
        methods=("full", "lisa", "grass"),
        tasks=("generated",),
        seeds=(0,),
        settings=(
            "training.steps=300",
            "training.batch_size=4",
            "training.warmup_steps=1",
            "training.checkpoint_every_steps=25",
            "data.source.train_rows=64",
            "data.source.test_rows=8",
            "evaluation.limit=8",
        ),
        method_settings={
            "lisa": ("method.sampler.period=10",),
            "grass": ("method.sampler.period=10", "method.sampler.probing_steps=4", "method.sampler.refresh_period=40"),
        },
    ),
)

if __name__ == "__main__":
    main(SWEEP)
