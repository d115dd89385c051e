"""A step multiplies no matrices that it could leave out, counted one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grass_ray.config import ModelConfig, RunConfig
from grass_ray.methods import METHODS
from grass_ray.overrides import parse
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.run import Run


@pytest.mark.parametrize("seed", range(4))
def test_a_step_multiplies_no_matrix_in_vain(seed: int) -> None:
    """No weight gradients of frozen layers, no input gradients below the lowest active one, no head without labels."""
    settings = ["method.sampler.num_active_layers=2", "method.sampler.probing_steps=1", "training.warmup_steps=0"]
    config = RunConfig(method=METHODS["grass"].config, model=ModelConfig(name="tiny"), seed=seed)
    state = Run.prepare(config.override(parse(settings))).state
    optimizer, batches = state.optimizer, state.batches
    accumulate_gradients(state.model, batches[0], state.device)
    optimizer.step()  # it only measures
    optimizer.zero_grad()
    active = optimizer.active_layers
    assert len(active) == 2
    (batch,) = batches[1]
    with FlopCounterMode(display=False) as counter:
        accumulate_gradients(state.model, [batch], state.device)

    layers = state.model.model.layers
    linears = {name: m.weight.numel() for name, m in layers[0].named_modules() if isinstance(m, nn.Linear)}
    layer, tokens = 2 * sum(linears.values()), batch.input_ids.numel()
    expected = tokens * layer * len(layers)  # forward
    expected += tokens * layer * len(active)  # gradients of weights
    expected += (
        tokens * layer * (len(layers) - active[0])
    )  # gradients of inputs; the lowest layer's own norm needs them
    expected += 2 * (2 * len(batch.labelled_tokens()) * state.model.lm_head.weight.numel())
    counted = counter.get_flop_counts()["Global"]
    matmuls = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    assert sum(counted.get(operation, 0) for operation in matmuls) == expected
