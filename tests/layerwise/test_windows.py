"""The mean over a measuring window: the plain one bit for bit on clean values, and what spoils it not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from grass_ray import GradNormSampler, MatrixNormSampler
from grass_ray.layerwise.windows import OUTLIER, Window, means, steps_ago, window_of_sums

NAN = math.nan


def window(*steps: list[float], dtype: torch.dtype = torch.float32) -> Window:
    made = Window(len(steps[0]))
    for step in steps:
        made.add(torch.tensor(step, dtype=dtype))
    return made


def mean_of(*values: float) -> float:
    return means(window(*[[value] for value in values]).table())[0]


def clean(steps: int, units: int, spread: float, seed: int = 0) -> Tensor:
    """Lognormal norms, of which none is five times a median in a window."""
    noise = torch.randn(steps, units, generator=torch.Generator().manual_seed(seed)).clamp(max=math.log(4.9) / spread)
    values = torch.exp(noise * spread) * torch.logspace(-6, 2, units)
    return values.where(values <= 4.9 * values.median(dim=0).values, values.median(dim=0).values)


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_clean_windows_have_the_plain_mean_bit_for_bit(steps: int, spread: float) -> None:
    """As it was computed until now: a float32 sum of the steps, one after another, over their number."""
    values = clean(steps, 22, spread)
    values[values.shape[0] // 2, 3] = NAN
    total, count = torch.zeros(22), torch.zeros(22)
    for step in values:
        total, count = total + step.nan_to_num(nan=0.0), count + ~step.isnan()
    expected = [a / b if b else NAN for a, b in zip(total.tolist(), count.tolist(), strict=True)]
    found = means(window(*values.tolist()).table())
    assert str(found) == str(expected)


@pytest.mark.parametrize("size", [6.0, 100.0, 1e6, 3e38])
@pytest.mark.parametrize("steps", [3, 10, 100])
def test_one_outlier_counts_as_five_times_the_median(size: float, steps: int) -> None:
    assert mean_of(*[1.0] * (steps - 1), size) == pytest.approx((steps - 1 + OUTLIER) / steps)


def test_many_outliers_are_held_as_long_as_they_are_fewer_than_half() -> None:
    assert mean_of(*[1.0] * 6, *[100.0] * 4) == pytest.approx((6 + 4 * OUTLIER) / 10)


def test_with_two_values_the_smaller_one_is_trusted_and_one_alone_is_what_it_is() -> None:
    assert mean_of(1.0, 100.0) == pytest.approx((1 + OUTLIER) / 2)
    assert mean_of(100.0) == 100.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
def test_what_is_not_finite_was_not_measured(bad: float) -> None:
    assert mean_of(1.0, bad, 3.0) == 2.0
    assert math.isnan(mean_of(bad, bad))
    assert steps_ago(window([bad, 1.0], [1.0, bad], [bad, bad]).table()) == [1, 2]


def test_zeros_do_not_make_the_others_outliers() -> None:
    """A part of the model that one batch in ten reaches."""
    assert mean_of(*[0.0] * 9, 2.0) == pytest.approx(0.2)
    assert mean_of(0.0, 0.0) == 0.0


def test_a_sum_beyond_float32_was_not_measured() -> None:
    assert math.isnan(mean_of(*[2e38] * 10))


def test_an_empty_window_has_no_means() -> None:
    assert str(means(Window(2).table())) == "[nan, nan]"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_any_dtype_add_up_in_float32(dtype: torch.dtype) -> None:
    """4,096 and 4,096 ones in float16 would stay at 2,048."""
    made = window(*[[1.0, 4096.0]] * 4096, dtype=dtype)
    assert means(made.table()) == [1.0, 4096.0]
    assert json.loads(json.dumps(Window.restore(2, made.state_dict()).state_dict())) == made.state_dict()


def test_the_norms_given_may_be_overwritten_afterwards() -> None:
    norms = torch.ones(2)
    made = Window(2)
    made.add(norms)
    norms.fill_(9.0)
    assert means(made.table()) == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
def test_norms_of_another_number_of_units_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"norms of shape \(.*\) for 2 units; give one a unit"):
        Window(2).add(torch.ones(shape))


def test_the_state_is_what_was_measured_and_no_more() -> None:
    state = window([NAN, 1.0, NAN], [NAN, 3.0, 2.0], [math.inf, NAN, NAN]).state_dict()
    assert state == {"steps": 3, "values": [[0, 1, 1.0], [1, 1, 3.0], [1, 2, 2.0]]}


def test_windows_of_earlier_versions_keep_their_means() -> None:
    state = window_of_sums([6.0, 0.0, 5.0], [3.0, 0.0, 1.0])
    assert str(means(Window.restore(3, state).table())) == "[2.0, nan, 5.0]"
    assert window_of_sums(None, None) == {"steps": 0, "values": []}


# ------------------------------------------------------------------------------------------------------- of a sampler


@pytest.mark.parametrize("size", [100.0, 1e30, math.inf, NAN])
def test_one_bad_batch_in_ten_of_probing_hardly_moves_the_draw(size: float) -> None:
    """With a plain mean 100 times gives that layer a probability of 0.99995."""
    chance = torch.Generator().manual_seed(0)
    sampler, undisturbed = (GradNormSampler(2, 20, probing_steps=10) for _ in range(2))
    sampler.start([1] * 22)
    undisturbed.start([1] * 22)
    for step in range(10):
        norms = 1 + 0.3 * torch.rand(22, generator=chance)
        undisturbed.observe(norms.clone())
        if step == 4:
            norms[7] *= size
        sampler.observe(norms)
    found, expected = sampler.probabilities(), undisturbed.probabilities()
    assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / 2 < 0.08
    assert found[7] < 0.12


def test_steps_with_nothing_finite_leave_importance_as_it_was() -> None:
    sampler = GradNormSampler(1, 1, probing_steps=1, refresh_period=2)
    sampler.start([1] * 3)
    sampler.observe(torch.tensor([1.0, 2.0, 3.0]))
    for bad in (NAN, math.inf):
        sampler.observe(torch.full((3,), bad))
    assert sampler.refreshes == 2
    assert sampler.importance() == (1.0, 2.0, 3.0)
    nothing = GradNormSampler(1, 1, probing_steps=2)
    nothing.start([1] * 3)
    for bad in (NAN, math.inf):
        nothing.observe(torch.full((3,), bad))
    assert nothing.probabilities() == pytest.approx([1 / 3] * 3)
    assert nothing.due


def test_an_importance_of_zero_is_one() -> None:
    for staleness in ("none", "level"):
        sampler = GradNormSampler(1, 1, probing_steps=1, refresh_period=1, staleness=staleness)  # type: ignore[arg-type]
        sampler.start([1] * 3)
        sampler.observe(torch.zeros(3))
        assert sampler.probabilities() == pytest.approx([1 / 3] * 3)
        sampler.observe(torch.tensor([1.0, NAN, NAN]))
        assert sampler.importance() == (0.5, 0.0, 0.0)
        assert sampler.probabilities()[0] > 0.5


def test_a_bad_step_does_not_enter_a_matrix_mean() -> None:
    sampler = MatrixNormSampler(1.0, 3)
    sampler.start([4, 4])
    sampler.sample()
    for rms in (1.0, math.inf, 100.0):
        sampler.observe(torch.tensor([rms, 1.0]))
    sampler.sample()
    assert sampler.importance() == pytest.approx(((2 + 2 * OUTLIER) / 2, 2.0)), "Frobenius: twice the RMS"
