"""Which fine-tuning method solves arithmetic word problems best? Six tests, answers generated step by step.

python sweeps/arithmetic.py --smoke --data-dir LLM-Adapters
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment.flags import SweepDefaults
from grass_ray.experiment.sweep import Sweep

SHORT_SCHEDULE = ("method.sampler.period=5", "method.sampler.probing_steps=3", "method.sampler.refresh_period=10")

SWEEP = Sweep(
    name="arithmetic",
    question="Which fine-tuning method solves arithmetic word problems best?",
    defaults=SweepDefaults(
        models=("smollm2-135m",),
        methods=("full", "lora", "lisa", "grass"),
        tasks=("arithmetic",),
        seeds=(0,),
        settings=(
            "training.steps=1800",
            "training.batch_size=16",
            "training.warmup_steps=100",
            "training.checkpoint_every_steps=200",
        ),
    ),
    smoke=SweepDefaults(
        tasks=("gsm8k", "addsub"),
        settings=(
            "training.steps=10",
            "training.batch_size=4",
            "training.warmup_steps=2",
            "training.checkpoint_every_steps=null",
            "evaluation.limit=6",
        ),
        method_settings={
            "lisa": ("method.sampler.period=5",),
            "grass": SHORT_SCHEDULE,
            "grass-static": SHORT_SCHEDULE[:2],
            "grass-fresh": SHORT_SCHEDULE,
        },
    ),
)

if __name__ == "__main__":
    main(SWEEP)
