"""Which fine-tuning method solves arithmetic word problems best? Six tests, answers generated step by step.

python sweeps/arithmetic.py --smoke --data-dir LLM-Adapters
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment import EvaluationConfig, Preset, Sweep, TrainingConfig

SHORT = {"method.sampler.period": 5, "method.sampler.probing_steps": 3, "method.sampler.refresh_period": 10}

SWEEP = Sweep(
    name="arithmetic",
    question="Which fine-tuning method solves arithmetic word problems best?",
    models=("smollm2-135m",),
    methods=("full", "lora", "lisa", "grass"),
    tasks=("arithmetic",),
    seeds=(0,),
    training=TrainingConfig(steps=1800, batch_size=16, warmup_steps=100, checkpoint_every_steps=200),
    smoke=Preset(
        tasks=("gsm8k", "addsub"),
        training=TrainingConfig(steps=10, batch_size=4, warmup_steps=2, checkpoint_every_steps=None),
        evaluation=EvaluationConfig(limit=6),
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
