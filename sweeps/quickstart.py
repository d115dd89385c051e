"""Which fine-tuning method learns most from forty steps? A small real model, generated word problems, minutes on a CPU.

python sweeps/quickstart.py
"""

from grass_ray.cluster.options import SweepDefaults
from grass_ray.cluster.sweep import Sweep

# Forty steps are few: GRASS measures for four steps first, draws layers every six and measures again every twelve.
SHORT_SCHEDULE = ("method.sampler.period=6", "method.sampler.probing_steps=4", "method.sampler.refresh_period=12")

SWEEP = Sweep(
    name="quickstart",
    question="Which fine-tuning method learns most from forty steps?",
    defaults=SweepDefaults(
        models=("smollm2-135m",),
        methods=("full", "lora", "lisa", "grass"),
        tasks=("generated",),
        seeds=(0,),
        settings=("training.steps=40", "training.batch_size=8", "evaluation.limit=100"),
        method_settings={
            "lisa": ("method.sampler.period=6",),
            "grass": SHORT_SCHEDULE,
            "grass-static": SHORT_SCHEDULE[:2],
        },
    ),
    smoke=SweepDefaults(settings=("training.steps=12", "evaluation.limit=20")),
)

if __name__ == "__main__":
    SWEEP.main()
