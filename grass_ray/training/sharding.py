"""Shard a run's model over its workers with FSDP2, for models that outgrow one device.

Every worker holds some rows of every weight, of its gradient and of its states. A decoder layer's weights are gathered
for its forward and its backward; frozen layers cost no reduction. The numbers are those of workers that hold the whole
model, up to the order of sums; evaluation keeps the shards, so every worker answers every question, in step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grass_ray.config import ConfigError, RunConfig
from grass_ray.layerwise.stack import find_decoder_stack


def check_shardable(config: RunConfig, workers: int) -> None:
    """Find out whether a run works on shards.

    Raises:
        ConfigError: there is one worker, or the method needs whole weight matrices or trains something outside of the
            base model.
    """
    mistakes = []
    name = config.method.name
    if workers < 2:
        mistakes.append("there is one worker, and sharding needs two or more (--workers-per-trial 2)")
    if config.method.optimizer.projection is not None:
        mistakes.append(f"{name} projects whole matrices, of which a worker has some rows")
    if config.method.adapter is not None and not config.method.adapter.shardable:
        mistakes.append(f"{name} trains vectors outside of the model that is sharded")
    if mistakes:
        raise ConfigError(f"the model cannot be sharded (FSDP2): {'; '.join(mistakes)}; or leave --parallel shard out")


def shard_model(model: Any, device: torch.device) -> None:
    """Give each decoder layer, then the rest of the base model, to ``fully_shard``, over all workers.

    A layer is on the device as a whole only until it is cut, so that the model never is.

    Args:
        model: on the CPU, the same weights on every worker; a peft adapter's are inside the base model.
        device: of this worker.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in find_decoder_stack(model).modules:
        fully_shard(layer, mesh=mesh)
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    fully_shard(base, mesh=mesh)
