"""Which fine-tuning method learns most from thirty steps? A small real model, made-up word problems, minutes on a CPU.

python sweeps/quickstart.py
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment import EvaluationConfig, Preset, Sweep, TrainingConfig

# Thirty steps are few: GRASS measures for three steps first, draws layers every five and measures again every ten.
SHORT = {"method.sampler.period": 5, "method.sampler.probing_steps": 3, "method.sampler.refresh_period": 10}

SWEEP = Sweep(
    name="quickstart",
    question="Which fine-tuning method learns most from thirty steps?",
    models=("smollm2-135m",),
    methods=("full", "lora", "lisa", "grass"),
    tasks=("generated",),
    seeds=(0,),
    training=TrainingConfig(steps=30, batch_size=8),
    evaluation=EvaluationConfig(limit=100),
    method_settings={
        "lisa": {"method.sampler.period": 5},
        "grass": SHORT,
        "grass-static": {**SHORT, "method.sampler.refresh_period": None},
        "grass-fresh": SHORT,
    },
    smoke=Preset(training=TrainingConfig(steps=12), evaluation=EvaluationConfig(limit=20)),
)

if __name__ == "__main__":
    main(SWEEP)
