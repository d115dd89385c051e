"""grass_ray: fair, fault-tolerant experiments on memory-efficient LLM fine-tuning (GRASS, arXiv 2604.07808).

In any PyTorch loop::

    from grass_ray import GradNormSampler, LayerwiseAdamW

    optimizer = LayerwiseAdamW(model, GradNormSampler(num_active_layers=2, period=20), lr=1e-5)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grass_ray.layerwise.all_layers import AllLayersSampler as AllLayersSampler
    from grass_ray.layerwise.converging import ConvergingSampler as ConvergingSampler
    from grass_ray.layerwise.cyclic import CyclicSampler as CyclicSampler
    from grass_ray.layerwise.fixed import FixedSampler as FixedSampler
    from grass_ray.layerwise.frequency import FrequencySampler as FrequencySampler
    from grass_ray.layerwise.grad_norm import GradNormSampler as GradNormSampler
    from grass_ray.layerwise.matrix_norm import MatrixNormSampler as MatrixNormSampler
    from grass_ray.layerwise.outliers import OutlierSampler as OutlierSampler
    from grass_ray.layerwise.rewards import RewardSampler as RewardSampler
    from grass_ray.layerwise.uniform import UniformSampler as UniformSampler
    from grass_ray.optim.holding import hold_while_probing as hold_while_probing
    from grass_ray.optim.layerwise_adamw import LayerwiseAdamW as LayerwiseAdamW
    from grass_ray.optim.momentum import SGD as SGD
    from grass_ray.optim.momentum import Muon as Muon
    from grass_ray.optim.options import LayerwiseOptions as LayerwiseOptions
    from grass_ray.optim.projection import Apollo as Apollo
    from grass_ray.optim.projection import GaLore as GaLore

__version__ = "0.1.0"

_LAZY = {
    "AllLayersSampler": "grass_ray.layerwise.all_layers",
    "Apollo": "grass_ray.optim.projection",
    "ConvergingSampler": "grass_ray.layerwise.converging",
    "CyclicSampler": "grass_ray.layerwise.cyclic",
    "FixedSampler": "grass_ray.layerwise.fixed",
    "FrequencySampler": "grass_ray.layerwise.frequency",
    "GaLore": "grass_ray.optim.projection",
    "GradNormSampler": "grass_ray.layerwise.grad_norm",
    "LayerwiseAdamW": "grass_ray.optim.layerwise_adamw",
    "LayerwiseOptions": "grass_ray.optim.options",
    "MatrixNormSampler": "grass_ray.layerwise.matrix_norm",
    "Muon": "grass_ray.optim.momentum",
    "OutlierSampler": "grass_ray.layerwise.outliers",
    "RewardSampler": "grass_ray.layerwise.rewards",
    "SGD": "grass_ray.optim.momentum",
    "UniformSampler": "grass_ray.layerwise.uniform",
    "hold_while_probing": "grass_ray.optim.holding",
}

__all__ = [
    "SGD",
    "AllLayersSampler",
    "Apollo",
    "ConvergingSampler",
    "CyclicSampler",
    "FixedSampler",
    "FrequencySampler",
    "GaLore",
    "GradNormSampler",
    "LayerwiseAdamW",
    "LayerwiseOptions",
    "MatrixNormSampler",
    "Muon",
    "OutlierSampler",
    "RewardSampler",
    "UniformSampler",
    "__version__",
    "hold_while_probing",
]


def __getattr__(name: str) -> object:
    """Import the library on first use, so that ``grass-ray --help`` loads no torch."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'grass_ray' has no attribute {name!r}")
