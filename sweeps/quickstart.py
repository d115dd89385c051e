"""Which fine-tuning method learns most from thirty steps? A small real model, made-up word problems, minutes on a CPU.

python sweeps/quickstart.py
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment.flags import SweepDefaults
from grass_ray.experiment.sweep import Sweep

# Thirty steps are few: GRASS measures for three steps first, draws layers every five and measures again every ten.
SHORT_SCHEDULE = ("method.sampler.period=5", "method.sampler.probing_steps=3", "method.sampler.refresh_period=10")

SWEEP = Sweep(
    name="quickstart",
    question="Which fine-tuning method learns most from thirty steps?",
    defaults=SweepDefaults(
        models=("smollm2-135m",),
        methods=("full", "lora", "lisa", "grass"),
        tasks=("generated",),
        seeds=(0,),
        settings=("training.steps=30", "training.batch_size=8", "evaluation.limit=100"),
        method_settings={
            "lisa": ("method.sampler.period=5",),
            "grass": SHORT_SCHEDULE,
            "grass-static": SHORT_SCHEDULE[:2],
            "grass-fresh": SHORT_SCHEDULE,
        },
    ),
    smoke=SweepDefaults(settings=("training.steps=12", "evaluation.limit=20")),
)

if __name__ == "__main__":
    main(SWEEP)
