"""Which fine-tuning method answers commonsense questions best, trained on all eight tasks together?

python sweeps/commonsense.py --smoke --data-dir LLM-Adapters
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment import EvaluationConfig, Preset, Sweep, TrainingConfig

SHORT = {"method.sampler.period": 5, "method.sampler.probing_steps": 3, "method.sampler.refresh_period": 10}

SWEEP = Sweep(
    name="commonsense",
    question="Which fine-tuning method answers commonsense questions best?",
    models=("smollm2-135m",),
    methods=("full", "lora", "lisa", "grass"),
    tasks=("commonsense",),
    seeds=(0,),
    training=TrainingConfig(steps=2000, batch_size=16, warmup_steps=100, checkpoint_every_steps=200),
    smoke=Preset(
        tasks=("boolq", "arc_easy", "arc_challenge", "openbookqa"),
        training=TrainingConfig(steps=12, batch_size=4, warmup_steps=2, checkpoint_every_steps=None),
        evaluation=EvaluationConfig(limit=16),
        method_settings={
            "lisa": {"method.sampler.period": 5},
            "grass": SHORT,
            "grass-static": {**SHORT, "method.sampler.refresh_period": None},
            "grass-fresh": SHORT,
        },
    ),
)

if __name__ == "__main__":
    main(SWEEP)
