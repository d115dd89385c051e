"""Moments in 8 bits: what the numbers are, equal bits wherever they live, and what they save."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from small import make_optimizer
from test_offload import CHUNK, MODES, STREAMED, assert_same, make_odd_llama, train
from torch import Tensor, nn

from grass_ray import AllLayersSampler, GradNormSampler, LayerwiseAdamW, LayerwiseOptions, UniformSampler
from grass_ray.config import MethodConfig, ModelConfig, OptimizerConfig, UniformSamplerConfig
from grass_ray.memory.plan import Planner
from grass_ray.memory.step import StepShape
from grass_ray.optim.chunks import total_bytes
from grass_ray.optim.kernels import Precision, adamw, state_layout
from grass_ray.optim.quantized import BLOCK, pack, packed, unpack, unpacked

SIGNED, UNSIGNED = 127, 255
DTYPES = (torch.float32, torch.bfloat16)


def spread(count: int, *, decades: float = 2.0, seed: int = 0) -> Tensor:
    """Numbers of both signs over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 10 ** (decades * torch.rand(count, generator=generator) - 6)


# ---------------------------------------------------------------------------------------------------------- the numbers


def rounded(value: float) -> tuple[float, int]:
    """A positive number with three bits after the point, exact halves upwards, and its power of two."""
    mantissa, exponent = math.frexp(value)
    short = math.floor(mantissa * 16 + 0.5)
    return math.ldexp(short, exponent - 4), exponent if short == 16 else exponent - 1


def reference(values: list[float], powers: int, *, signed: bool) -> list[float]:
    """One block, number by number; ``powers`` of two below the highest there is zero, or the smallest number."""
    near = [rounded(abs(value)) if value else (0.0, -200) for value in values]
    top = max(power for _, power in near)
    lowest = math.ldexp(1.0, top - powers)
    if signed:
        return [
            math.copysign(number, v) if number > lowest else 0.0 for (number, _), v in zip(near, values, strict=True)
        ]
    return [max(number, lowest) for number, _ in near]


@pytest.mark.parametrize(("span", "powers"), [(SIGNED, 15), (UNSIGNED, 31)])
def test_each_number_is_the_nearest_with_three_bits(span: int, powers: int) -> None:
    values = spread(3 * BLOCK + 7, decades=14.0)
    values[5] = 0.0
    if span == UNSIGNED:
        values = values.abs()
    codes, exponents = pack(values, span)
    assert codes.dtype == exponents.dtype == torch.uint8
    assert exponents.shape == (4,)
    found = unpack(codes, exponents, span)
    for begin in range(0, values.numel(), BLOCK):
        block = values[begin : begin + BLOCK].tolist()
        assert found[begin : begin + BLOCK].tolist() == reference(block, powers, signed=span == SIGNED)


@pytest.mark.parametrize("span", [SIGNED, UNSIGNED])
def test_packing_what_was_unpacked_changes_nothing(span: int) -> None:
    """Also with random bits: a number that can be held stays."""
    random = torch.randint(0, 2**31 - 1, (5000,), dtype=torch.int32)
    for codes, exponents in itertools.product(
        (torch.arange(5000) * 37 % 256, torch.zeros(5000)), (torch.arange(20) * 12, torch.zeros(20))
    ):
        values = unpack(codes.to(torch.uint8), exponents.to(torch.uint8), span)
        again = unpack(*pack(values, span), span)
        assert torch.equal(again, values)
        assert torch.equal(unpack(*pack(values, span, random), span), values)
    assert not unpack(torch.zeros(300, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), span).any()


def test_second_moments_are_right_on_average_and_never_zero() -> None:
    values = spread(2 * BLOCK).square()
    generator = torch.Generator().manual_seed(3)
    several = []
    for _ in range(400):
        random = torch.randint(0, 2**31 - 1, values.shape, dtype=torch.int32, generator=generator)
        several.append(unpack(*pack(values, UNSIGNED, random), UNSIGNED))
    error = (torch.stack(several).mean(0) - values) / values
    # a coin between neighbours an eighth apart at most: 400 of them are off by 0.003 (one standard deviation)
    assert float(error.abs().max()) < 0.015
    assert abs(float(error.mean())) < 5e-4
    values[::2] *= 1e-12
    assert (unpack(*pack(values, UNSIGNED), UNSIGNED) > 0).all()


@pytest.mark.parametrize("case", ["falling", "noise", "constant", "apart"])
def test_second_moments_follow_float32_ones(case: str) -> None:
    """Gradients that fall tenfold, stay, or fall in one half of every block and rise in the other."""
    means: dict[str, list[float]] = {}
    for precision in ("int8", "exact"):
        generator = torch.Generator().manual_seed(1)
        layout = state_layout(torch.float32, precision)  # type: ignore[arg-type]
        weight = torch.randn(32, 64, generator=generator)
        shapes = layout.shapes(weight.shape)
        state = {name: torch.zeros(shapes[name], dtype=dtype) for name, dtype, _ in layout.tensors}
        step = torch.zeros(())
        group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        constant = torch.randn(32, 64, generator=generator) * 1e-3
        for t in range(1000):
            step += 1
            gradient = torch.randn(32, 64, generator=generator) * 1e-3
            if case == "constant":
                gradient = constant
            if t >= 150 and case != "noise":
                gradient = gradient * (0.1 if case != "apart" else torch.tensor([0.1, 3.0]).repeat(32))
            adamw([weight], [gradient], [state], [step], group)
        v = unpacked(state)["exp_avg_sq"]
        means[precision] = [float(half.mean()) for half in (v[:, ::2], v[:, 1::2])]
    assert means["int8"] == pytest.approx(means["exact"], rel=0.03)


# -------------------------------------------------------------------------------------------------- wherever they live


def build(model: nn.Module, mode: Any, **settings: Any) -> LayerwiseAdamW:
    sampler = GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=2)
    options = {"lr": 1e-3, "weight_decay": 0.1, "chunk_bytes": CHUNK, "ring_slots": 2, **settings}
    return make_optimizer(model, sampler, precision="int8", offload=mode, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inactive", ["keep", "reset"])
def test_every_mode_gives_the_same_bits(dtype: torch.dtype, inactive: str) -> None:
    """Also with weights on the host, and for chunks of any size."""
    scenes: list[tuple[str, dict[str, Any]]] = [
        *((mode, {}) for mode in MODES),
        ("lazy", {"chunk_bytes": 16 * 1024, "ring_slots": 1}),
        ("lazy", {"weights": "streamed"}),
        ("resident", {"weights": "streamed"}),
    ]
    models, states = [], []
    for mode, settings in scenes:
        model = make_odd_llama(dtype=dtype)
        optimizer = build(model, mode, inactive_states=inactive, train_norm=True, **settings)
        train(model, optimizer, range(11))
        optimizer.synchronize()
        models.append(model)
        states.append(optimizer.state_dict()["state"])
    for model, state in zip(models[1:], states[1:], strict=True):
        assert_same(models[0], model)
        for index, saved in states[0].items():
            assert saved.keys() == state[index].keys()
            assert all(torch.equal(tensor, state[index][name]) for name, tensor in saved.items())
    kinds = {name: tensor.dtype for saved in states[0].values() for name, tensor in saved.items() if tensor.ndim == 2}
    remainder = {"remainder": torch.int16} if dtype == torch.bfloat16 else {}
    assert kinds == {"exp_avg": torch.uint8, "exp_avg_sq": torch.uint8, **remainder}


@pytest.mark.parametrize("saved_in", MODES)
def test_resume_in_any_mode(saved_in: Any) -> None:
    whole = make_odd_llama(dtype=torch.bfloat16)
    optimizer = build(whole, saved_in)
    snapshots = []
    for step in range(8):
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        snapshots.append((copy.deepcopy(whole.state_dict()), buffer.getvalue()))
        train(whole, optimizer, range(step, step + 1))
    for step, (weights, state) in enumerate(snapshots):
        resumed = make_odd_llama(dtype=torch.bfloat16)
        other = build(resumed, MODES[(MODES.index(saved_in) + step) % len(MODES)])
        resumed.load_state_dict(weights)
        other.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        train(resumed, other, range(step, 8))
        assert_same(whole, resumed)


def test_a_state_of_another_precision_is_refused() -> None:
    model = make_odd_llama(dtype=torch.bfloat16)
    optimizer = make_optimizer(model, UniformSampler(2, 3), lr=1e-3, precision="rem16")
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match=r"exp_avg \[72, 72\] torch.bfloat16.* keeps .*exp_avg_exponent \[21\] "):
        make_optimizer(model, UniformSampler(2, 3), lr=1e-3, precision="int8").load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_not_finite_change_nothing(mode: Any) -> None:
    model = make_odd_llama(dtype=torch.bfloat16)
    optimizer = make_optimizer(model, AllLayersSampler(), lr=1e-3, precision="int8", offload=mode, chunk_bytes=CHUNK)
    train(model, optimizer, range(3))
    weights, before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in optimizer.active_parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for index, saved in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, before[index][name]) for name, tensor in saved.items())


def test_exported_moments_are_torchs() -> None:
    """``adamw_state_dict`` has what the codes stand for, and packing it gives the codes back."""
    model = make_odd_llama()
    optimizer = make_optimizer(model, AllLayersSampler(), lr=1e-3, precision="int8")
    train(model, optimizer, range(4))
    exported = optimizer.adamw_state_dict()["state"]
    for index, saved in optimizer.state_dict()["state"].items():
        assert {name: tensor.dtype for name, tensor in exported[index].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), torch.float32
        )
        assert exported[index]["exp_avg"].shape == saved["exp_avg"].shape
        if saved["exp_avg"].dtype == torch.uint8:
            assert all(torch.equal(t, saved[name]) for name, t in packed({**saved, **exported[index]}).items())


# ------------------------------------------------------------------------------------------------------- what they save


def layer_bytes(model: nn.Module, precision: Precision) -> int:
    return sum(
        state_layout(p.dtype, precision, p.ndim).nbytes(p.numel())
        for p in model.model.layers[0].parameters()  # type: ignore[union-attr, operator]
    )


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 2.0), (torch.bfloat16, 4.0)])
def test_bytes_of_a_parameter(dtype: torch.dtype, expected: float) -> None:
    """Two codes, two bytes of the master, and an exponent of each moment for 256 elements; exact takes 10 or 8."""
    layout, exact = (state_layout(dtype, precision) for precision in ("int8", "exact"))
    assert layout.nbytes(4096 * 4096) == (expected + 2 / 256) * 4096 * 4096
    assert exact.nbytes(1) == (8 if dtype == torch.float32 else 10)


@pytest.mark.parametrize("mode", STREAMED)
def test_traffic_and_host_bytes_are_counted_exactly(mode: Any) -> None:
    """Each step brings the active states once each way; chunks are as large as the plan says."""
    moved, held = {}, {}
    for precision in ("int8", "exact"):
        model = make_odd_llama(dtype=torch.bfloat16)
        optimizer = make_optimizer(
            model, UniformSampler(2, 100), lr=1e-3, precision=precision, offload=mode, chunk_bytes=16 * 1024
        )
        train(model, optimizer, range(5))
        host = optimizer._placement.host
        chunks = [chunk for unit in host.units for chunk in host.chunks(unit)]
        assert optimizer.state_bytes()[1] == total_bytes(chunks)
        assert optimizer.stats.bytes_out == 5 * total_bytes(chunks)
        used = sum(chunk.layout.nbytes(s.stop - s.start) for chunk in chunks for s in chunk.segments)
        assert used == 2 * layer_bytes(model, precision)  # type: ignore[arg-type]
        moved[precision], held[precision] = optimizer.stats.bytes_out, used
    assert held["int8"] < 0.42 * held["exact"]
    assert moved["int8"] < 0.5 * moved["exact"]


def test_resident_states_are_as_large_as_the_layout_says() -> None:
    for dtype in DTYPES:
        model = make_odd_llama(dtype=dtype)
        optimizer = make_optimizer(model, UniformSampler(2, 2, seed=1), lr=1e-3, precision="int8", offload="resident")
        train(model, optimizer, range(5))
        device = sum(tensor.nbytes for tensor in optimizer.resident_states())
        assert device == optimizer.state_bytes()[0] == 2 * layer_bytes(model, "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_knows(dtype: Any) -> None:
    """States on the device, and host blocks."""
    plans = {}
    for precision in ("int8", "exact"):
        method = MethodConfig(
            name="own",
            sampler=UniformSamplerConfig(num_active_layers=1),
            optimizer=OptimizerConfig(precision=precision),
        )
        planner = Planner(ModelConfig(name="tiny", dtype=dtype), "cpu")
        plans[precision] = {plan.offload: plan for plan in planner.plan_modes(method, StepShape(rows=1, tokens=8))}
    int8, exact = plans["int8"], plans["exact"]
    for mode in ("none", "resident"):
        assert int8[mode].states < 0.5 * exact[mode].states
    assert int8["resident"].host_bytes < 0.7 * exact["resident"].host_bytes  # small blocks have a least size


def test_options_name_it() -> None:
    with pytest.raises(ValueError, match="precision is '8bit'; available: weights, rem16, exact, int8"):
        LayerwiseAdamW(make_odd_llama(), UniformSampler(2, 3), precision="8bit", options=LayerwiseOptions())  # type: ignore[arg-type]
