"""The mean gradient norm against its definition, under accumulation and freezing."""

from __future__ import annotations

import pytest
import torch
from small import backward, make_batch, make_llama

from grass_ray import GradNormSampler, LayerwiseAdamW
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


def make_pair() -> tuple[torch.nn.Parameter, torch.nn.Parameter, GradNormMeter]:
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    return a, b, GradNormMeter([(a, b)])


def test_a_parameter_left_out_of_a_micro_batch_is_keyed_by_it() -> None:
    """Experts that some micro-batches do not reach: each micro-batch has its own RMS, whatever the order."""
    reaches_a = (4 * 9 / 8) ** 0.5
    reaches_both = ((4 * 1e-6 + 4 * 16) / 8) ** 0.5
    for first in (True, False):
        a, b, meter = make_pair()
        losses = [lambda a=a: (3 * a).sum(), lambda a=a, b=b: (0.001 * a + 4 * b).sum()]
        for loss in losses if first else reversed(losses):
            loss().backward()
        assert meter.micro_batches == 2
        assert float(meter.collect()) == pytest.approx((reaches_a + reaches_both) / 2, rel=1e-6)


def test_layers_that_some_micro_batches_skip_are_averaged_over_their_own() -> None:
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    meter = GradNormMeter([(a,), (b,)])
    (a + 2 * b).sum().backward()
    (5 * a).sum().backward()
    torch.testing.assert_close(meter.collect(), torch.tensor([3.0, 2.0]))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e38])
def test_a_micro_batch_that_is_not_finite_is_left_out_whole(bad: float) -> None:
    """The layers it spared as well: half of a micro-batch is another measurement than a whole one."""
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    meter = GradNormMeter([(a,), (b,)])
    (2 * a + 4 * b).sum().backward()
    (9 * a + bad * 4 * b).sum().backward()
    (4 * a + 6 * b).sum().backward()
    torch.testing.assert_close(meter.collect(), torch.tensor([3.0, 5.0]))
    (9 * a + bad * 4 * b).sum().backward()
    assert meter.collect().isnan().all()


def test_gradients_thrown_away_are_forgotten() -> None:
    """By clear(), and by setting .grad to None behind the meter's back."""
    a, b, meter = make_pair()
    (100 * a + 100 * b).sum().backward()
    meter.clear()
    (2 * a + 2 * b).sum().backward()
    assert float(meter.collect()) == pytest.approx(2)
    a.grad = b.grad = None
    (100 * a + 100 * b).sum().backward()
    a.grad = b.grad = None
    for _ in range(2):
        (2 * a + 2 * b).sum().backward()
    assert meter.micro_batches == 2
    assert float(meter.collect()) == pytest.approx(2)


def test_the_number_of_micro_batches_does_not_change_the_scale() -> None:
    """The same rows in one micro-batch or in four of a quarter of the loss each: importance at one scale."""
    found = {}
    for cut in (1, 2, 4):
        model = make_llama()
        optimizer = LayerwiseAdamW(model, GradNormSampler(2, 2, probing_steps=4, normalise="none"), lr=1e-3)
        for step in range(4):
            for rows in make_batch(step, rows=4).chunk(cut):
                # equal rows: every micro-batch has the whole batch's gradient
                rows = make_batch(step, rows=1).expand(len(rows), -1)
                (model(input_ids=rows, labels=rows).loss / cut).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[cut] = optimizer.sampler.importance()
    assert found[2] == pytest.approx(found[1], rel=1e-5)
    assert found[4] == pytest.approx(found[1], rel=1e-5)
