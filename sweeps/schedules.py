"""How should GRASS choose its layers: how many, how often, from how fresh a measurement, how sharply?

Settings are judged by the loss on training rows held out for it; only the winner meets the test. The best settings are
written as summary/best.yaml, which every sweep takes as --settings.

python sweeps/schedules.py                                             # a grid of periods
python sweeps/schedules.py --search optuna --num-samples 24 --scheduler asha
python sweeps/schedules.py --scheduler pbt --num-samples 8             # schedules that change in mid-training
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment import DataConfig, EvaluationConfig, LogUniform, OneOf, Preset, Sweep, TrainingConfig

SHARP = LogUniform(low=0.1, high=1.0)
SPACE = {
    "method.sampler.num_active_layers": OneOf(
        options={
            "constant": LogUniform(low=1, high=4, whole=True),
            "more": {"kind": "linear", "start": 1, "end": LogUniform(low=2, high=4, whole=True)},
        }
    ),
    "method.sampler.probing_steps": (2, 5, 10),
    "method.sampler.period": OneOf(
        options={
            "constant": LogUniform(low=3, high=40, whole=True),
            "slower": {"kind": "linear", "start": 3, "end": LogUniform(low=10, high=40, whole=True)},
        }
    ),
    "method.sampler.refresh_period": (10, 20, 50, 100, None),
    "method.sampler.temperature": OneOf(
        options={
            "constant": LogUniform(low=0.1, high=4.0),
            "linear": {"kind": "linear", "start": LogUniform(low=1.0, high=4.0), "end": SHARP},
            "cosine": {"kind": "cosine", "start": LogUniform(low=1.0, high=4.0), "end": SHARP},
        }
    ),
    "method.sampler.ema": LogUniform(low=0.1, high=1.0),
}

SWEEP = Sweep(
    name="schedules",
    question="How should GRASS choose its layers?",
    models=("smollm2-135m",),
    methods=("grass",),
    tasks=("generated",),
    seeds=(0, 1, 2),
    data=DataConfig(validation_rows=64),
    training=TrainingConfig(steps=200, checkpoint_every_steps=50),
    settings={"method.sampler.probing_steps": 5},
    grid={"method.sampler.period": (5, 10, 20), "method.sampler.refresh_period": (20, 50, None)},
    space=SPACE,
    search="grid",
    smoke=Preset(
        seeds=(0,),
        training=TrainingConfig(steps=20, checkpoint_every_steps=None),
        evaluation=EvaluationConfig(limit=20),
        grid={"method.sampler.period": (5, 10), "method.sampler.refresh_period": (10, None)},
    ),
)

if __name__ == "__main__":
    main(SWEEP)
