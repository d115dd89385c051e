"""How often should GRASS draw its layers, and how often measure them again?

Settings are judged by the loss on training rows held out for it; the best ones are written as summary/best.yaml, which
every sweep takes as --settings.

python sweeps/schedules.py
"""

from grass_ray.cluster.options import SweepDefaults
from grass_ray.cluster.sweep import Sweep

SWEEP = Sweep(
    name="schedules",
    question="How often should GRASS draw its layers, and how often measure them again?",
    defaults=SweepDefaults(
        models=("smollm2-135m",),
        methods=("grass",),
        tasks=("generated",),
        seeds=(0, 1, 2),
        settings=(
            "training.steps=200",
            "method.sampler.probing_steps=5",
            "training.checkpoint_every_steps=50",
            "data.validation_rows=64",
        ),
        grid={"method.sampler.period": (5, 10, 20), "method.sampler.refresh_period": (20, 50, None)},
    ),
    smoke=SweepDefaults(
        seeds=(0,),
        settings=("training.steps=20", "training.checkpoint_every_steps=null", "evaluation.limit=20"),
        grid={"method.sampler.period": (5, 10), "method.sampler.refresh_period": (10, None)},
    ),
)

if __name__ == "__main__":
    SWEEP.main()
