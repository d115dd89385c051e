"""Shard the model of a run over its workers with FSDP2, for models that do not fit on one device.

Each worker holds some rows of every weight, its gradient and its optimizer states. The weights of a decoder layer are
gathered for its forward and backward pass; gradients of frozen layers are not reduced. Up to the order of summation
the results equal those of workers that hold the whole model. Evaluation uses the shards, too, so all workers evaluate
all examples together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grass_ray.config import ConfigError, RunConfig
from grass_ray.layerwise.stack import find_decoder_stack


def check_shardable(config: RunConfig, workers: int) -> None:
    """Check that the model of a run can be sharded.

    Raises:
        ConfigError: there is only one worker, or the method needs whole weight matrices, streams its weights, or trains
            parameters outside the base model.
    """
    mistakes = []
    name = config.method.name
    if workers < 2:
        mistakes.append("there is one worker, and sharding needs two or more (--workers-per-trial 2)")
    if config.method.optimizer.projection is not None:
        mistakes.append(f"{name} updates whole matrices, of which a worker has some rows")
    if config.method.weights == "streamed":
        mistakes.append("method.weights=streamed needs whole weights, of which a worker has some rows")
    if config.method.adapter is not None and not config.method.adapter.can("shard"):
        mistakes.append(f"{name} trains vectors outside of the model that is sharded")
    if mistakes:
        raise ConfigError(f"the model cannot be sharded (FSDP2): {'; '.join(mistakes)}; or leave --parallel shard out")


def shard_model(model: Any, device: torch.device) -> None:
    """Apply ``fully_shard`` to each decoder layer and then to the rest of the base model. Collective.

    Layers are moved to the device one at a time, so the whole model is never on one device.

    Args:
        model: a model on the CPU with identical weights on all ranks. Adapters must be inside the base model.
        device: the device of this rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in find_decoder_stack(model).modules:
        fully_shard(layer, mesh=mesh)
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    fully_shard(base, mesh=mesh)
