"""What does each part of GRASS give? One part is changed at a time, everything else stays as it is.

Adaptive or static importance is ``grass`` against ``grass-static``, importance at all against ``lisa``; then the number
of active layers, the temperature of the draw, the normalisation of the norms, where inactive states live and whether
they live on, and whether embeddings train.

python sweeps/ablation.py
"""

from grass_ray.commands.sweep import main
from grass_ray.experiment import EvaluationConfig, Preset, Sweep, TrainingConfig

SWEEP = Sweep(
    name="ablation",
    question="What does each part of GRASS give?",
    models=("smollm2-135m",),
    methods=("lisa", "grass-static", "grass"),
    tasks=("generated",),
    seeds=(0, 1, 2),
    training=TrainingConfig(steps=200, checkpoint_every_steps=50),
    one_at_a_time={
        "method.sampler.num_active_layers": (1, 2, 4),
        "method.sampler.temperature": (0.2, 0.5, 2.0),
        "method.sampler.normalise": ("mean", "none"),
        "method.offload": ("none", "resident", "blocking", "overlap", "lazy"),
        "method.inactive_states": ("keep", "reset"),
        "method.train_embeddings": (False, True),
    },
    smoke=Preset(
        methods=("grass-static", "grass"),
        seeds=(0,),
        training=TrainingConfig(steps=20, checkpoint_every_steps=None),
        evaluation=EvaluationConfig(limit=20),
        one_at_a_time={
            "method.sampler.normalise": ("none",),
            "method.offload": ("none", "overlap"),
            "method.train_embeddings": (False, True),
        },
    ),
)

if __name__ == "__main__":
    main(SWEEP)
