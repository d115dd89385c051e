"""What does each part of GRASS give: the number of active layers, the temperature of the draw, fresh measurements?

python sweeps/ablation.py
"""

from grass_ray.cluster.options import SweepDefaults
from grass_ray.cluster.sweep import Sweep

SWEEP = Sweep(
    name="ablation",
    question="What does each part of GRASS give?",
    defaults=SweepDefaults(
        models=("smollm2-135m",),
        methods=("lisa", "grass-static", "grass"),
        tasks=("generated",),
        seeds=(0, 1, 2),
        settings=("training.steps=200", "training.checkpoint_every_steps=50"),
        grid={"method.sampler.num_active_layers": (1, 2, 4), "method.sampler.temperature": (0.2, 0.5, 2.0)},
    ),
    smoke=SweepDefaults(
        seeds=(0,),
        settings=("training.steps=20", "training.checkpoint_every_steps=null", "evaluation.limit=20"),
        grid={"method.sampler.num_active_layers": (2,), "method.sampler.temperature": (0.2, 2.0)},
    ),
)

if __name__ == "__main__":
    SWEEP.main()
