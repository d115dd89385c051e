"""The mean gradient norm against its definition, under accumulation and freezing."""

from __future__ import annotations

import torch
from small import backward, make_llama

from grass_ray.layerwise.importance import GradNormMeter
from grass_ray.layerwise.stack import find_decoder_stack


def rms(parameters: tuple[torch.nn.Parameter, ...]) -> float:
    """sqrt(||g||^2 / N) by the definition."""
    squares = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)
    return (squares / sum(p.numel() for p in parameters)) ** 0.5


def test_one_micro_batch_is_the_rms_gradient() -> None:
    model = make_llama()
    layers = find_decoder_stack(model).layers
    meter = GradNormMeter(layers)
    backward(model, 0)
    expected = torch.tensor([rms(layer) for layer in layers])
    torch.testing.assert_close(meter.collect(), expected, rtol=1e-5, atol=0)
    assert meter.collect().isnan().all(), "collecting must begin anew"


def test_accumulation_averages_the_micro_batches_own_norms() -> None:
    """Not the norm of the sum: a hook sees each micro-batch's gradient before it is accumulated."""
    model = make_llama()
    layers = find_decoder_stack(model).layers
    meter = GradNormMeter(layers)
    singles = []
    for step in range(3):
        model.zero_grad(set_to_none=True)
        backward(model, step)
        singles.append([rms(layer) for layer in layers])
    meter.collect()
    model.zero_grad(set_to_none=True)
    for step in range(3):
        backward(model, step)
    measured = meter.collect()
    torch.testing.assert_close(measured, torch.tensor(singles).mean(0), rtol=1e-5, atol=0)
    of_the_sum = torch.tensor([rms(layer) for layer in layers])
    assert not torch.allclose(measured, of_the_sum, rtol=0.05)


def test_frozen_layers_are_nan_and_measured_again_after_thawing() -> None:
    model = make_llama()
    layers = find_decoder_stack(model).layers
    meter = GradNormMeter(layers)
    for frozen in (1, 3):
        for index, layer in enumerate(layers):
            for parameter in layer:
                parameter.requires_grad_(index != frozen)
        backward(model, 0)
        assert [bool(value) for value in meter.collect().isnan()] == [index == frozen for index in range(4)]
