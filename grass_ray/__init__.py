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
    from grass_ray.layerwise.samplers import AllLayersSampler as AllLayersSampler
    from grass_ray.layerwise.samplers import GradNormSampler as GradNormSampler
    from grass_ray.layerwise.samplers import UniformSampler as UniformSampler
    from grass_ray.optim.layerwise_adamw import LayerwiseAdamW as LayerwiseAdamW

__version__ = "0.1.0"

_LAZY = {
    "AllLayersSampler": "grass_ray.layerwise.samplers",
    "GradNormSampler": "grass_ray.layerwise.samplers",
    "UniformSampler": "grass_ray.layerwise.samplers",
    "LayerwiseAdamW": "grass_ray.optim.layerwise_adamw",
}

__all__ = ["AllLayersSampler", "GradNormSampler", "LayerwiseAdamW", "UniformSampler", "__version__"]


def __getattr__(name: str) -> object:
    """Import the library on first use, so that ``grass-ray --help`` loads no torch."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'grass_ray' has no attribute {name!r}")
