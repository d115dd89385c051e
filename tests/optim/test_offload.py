"""The offload engine: exact in every mode, bounded in memory, and every wait of its protocol needed."""

from __future__ import annotations

import copy
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from recording_streams import RecordingStreams
from small import backward, make_batch, make_llama, make_optimizer
from torch import nn

from grass_ray import AllLayersSampler, GaLore, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.config import PLACEMENTS, MethodConfig, ModelConfig, Offload, UniformSamplerConfig
from grass_ray.layerwise.stack import find_decoder_stack
from grass_ray.memory.plan import Planner
from grass_ray.memory.step import StepShape
from grass_ray.optim import host_store, streaming
from grass_ray.optim.chunks import BOUNDARY, SMALLEST_CHUNK_BYTES, cut
from grass_ray.optim.kernels import Precision, adamw, join, split, state_layout
from grass_ray.optim.placement import Footprint, OnDevice, Resident, placement_class
from grass_ray.optim.quantized import write_moments
from grass_ray.optim.room import Room
from grass_ray.optim.rounding import MIX_1, MIX_2, PLACE, STEP, round_stochastically
from grass_ray.optim.streamed import Lazy
from grass_ray.optim.units import Unit

MODES = ("none", "resident", "blocking", "overlap", "lazy")
STREAMED = MODES[2:]
CHUNK = 64 * 1024


def make_odd_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama whose parameters have odd sizes and span several chunks."""
    return make_llama(hidden=72, vocabulary=61, tied=tied).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, accumulation: int = 1) -> None:
    for step in steps:
        for micro in range(accumulation):
            backward(model, accumulation * step + micro, vocabulary=61)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_bytes", [16 * 1024, CHUNK, 1024 * 1024])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "rem16"), (torch.bfloat16, "rem16"), (torch.bfloat16, "int8")]
)
def test_every_element_is_in_exactly_one_chunk(chunk_bytes: int, dtype: torch.dtype, precision: Any) -> None:
    parameters = [nn.Parameter(torch.empty(size, dtype=dtype)) for size in (1, 1023, 1024, 70_001, 5, 40_000)]
    layout = state_layout(dtype, precision)
    chunks = cut("unit", parameters, layout, chunk_bytes)
    seen = {p: torch.zeros(p.numel(), dtype=torch.int64) for p in parameters}
    for chunk in chunks:
        assert chunk.nbytes & (chunk.nbytes - 1) == 0
        assert chunk.count <= chunk.capacity
        assert layout.nbytes(chunk.capacity) <= chunk.nbytes <= chunk_bytes
        block = torch.zeros(chunk.nbytes, dtype=torch.uint8)
        for segment, views in zip(chunk.segments, chunk.views(block), strict=True):
            seen[segment.parameter][segment.start : segment.stop] += 1
            assert segment.start % BOUNDARY == 0
            for name, kind, share in layout.tensors:
                assert views[name].dtype == kind
                assert views[name].numel() == -(-(segment.stop - segment.start) // share)
                assert not views[name].any(), "state tensors of a chunk must not overlap"
                views[name].fill_(1)
    assert all(bool((count == 1).all()) for count in seen.values())
    used = sum(layout.nbytes(p.numel()) for p in parameters)
    assert sum(chunk.nbytes for chunk in chunks) < used + 2 * min(chunk_bytes, SMALLEST_CHUNK_BYTES) + 0.35 * used


def test_real_layers_waste_next_to_nothing() -> None:
    """LLaMA2-7B: 202,383,360 parameters a layer in 64 MiB chunks."""
    parameter = nn.Parameter(torch.empty(202_383_360, dtype=torch.bfloat16, device="meta"))
    for precision, most in (("weights", 0.01), ("rem16", 0.01), ("exact", 0.01), ("int8", 0.01)):
        layout = state_layout(torch.bfloat16, precision)  # type: ignore[arg-type]
        chunks = cut("layer", [parameter], layout)
        exact = layout.nbytes(parameter.numel())
        assert 0 <= sum(chunk.nbytes for chunk in chunks) / exact - 1 < most, precision


def test_bad_chunk_sizes_are_refused() -> None:
    layout = state_layout(torch.float32, "rem16")
    for chunk_bytes in (1000, 3 * 1024 * 1024, 4096):
        with pytest.raises(ValueError, match=rf"chunk_bytes is {chunk_bytes}; it must be a power of two that holds"):
            cut("unit", [nn.Parameter(torch.empty(10))], layout, chunk_bytes)
    with pytest.raises(ValueError, match="not contiguous"):
        cut("unit", [nn.Parameter(torch.empty(4, 6).T)], layout, CHUNK)


# ---------------------------------------------------------------------------------------------------------- remainders


def test_weight_and_remainder_give_every_master_back() -> None:
    """All bit patterns on a grid, and a dense range around one: no round trip loses a bit."""
    coarse = torch.arange(-(2**31), 2**31, 997, dtype=torch.int64).to(torch.int32)
    dense = torch.arange(0x3F7F0000, 0x3F810000, dtype=torch.int64).to(torch.int32)
    for bits in (coarse, dense):
        upper, remainder = split(bits.view(torch.float32))
        assert torch.equal(join(upper, remainder).view(torch.int32), bits)
    ordinary = torch.randn(100_000)
    assert (
        torch.equal(split(ordinary)[0], ordinary.to(torch.bfloat16))
        or (
            (split(ordinary)[0].float() - ordinary).abs() <= (ordinary.to(torch.bfloat16).float() - ordinary).abs()
        ).all()
    )


def plain_master_adamw(model: nn.Module, gradients: list[list[torch.Tensor]], lr: float) -> list[torch.Tensor]:
    """torch's AdamW on float32 copies of bfloat16 weights, from recorded gradients."""
    masters = [p.detach().float().requires_grad_(True) for p in model.parameters()]
    reference = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0, fused=True)
    for step in gradients:
        for master, gradient in zip(masters, step, strict=True):
            master.grad = gradient.float()
        reference.step()
    return masters


@pytest.mark.parametrize("mode", MODES)
def test_exact_precision_is_adamw_on_float32_masters(mode: Any) -> None:
    """Bit for bit, in every mode: the bfloat16 weight is the rounded master, the remainder the rest."""
    model = make_odd_llama(dtype=torch.bfloat16)
    start = copy.deepcopy(model)
    optimizer = make_optimizer(
        model,
        AllLayersSampler(),
        lr=1e-5,
        precision="exact",
        offload=mode,
        chunk_bytes=CHUNK,
        train_embeddings=True,
        train_head=True,
        train_norm=True,
    )
    recorded = []
    for step in range(20):
        backward(model, step, vocabulary=61)
        recorded.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    masters = plain_master_adamw(start, recorded, 1e-5)
    state = optimizer.state_dict()["state"]
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for parameter, master in zip(model.parameters(), masters, strict=True):
        held = join(parameter.data, state[index[parameter]]["remainder"])
        assert torch.equal(held, master.data)


def test_remainders_keep_what_plain_bfloat16_loses() -> None:
    """At lr 1e-5 most weights never move in bfloat16; with a remainder the masters follow float32 AdamW closely."""
    moved = {}
    for precision in ("weights", "rem16"):
        model = make_odd_llama(dtype=torch.bfloat16)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = LayerwiseAdamW(model, AllLayersSampler(), lr=1e-5, precision=precision, offload="none")  # type: ignore[arg-type]
        train(model, optimizer, range(30))
        layers = {p for layer in optimizer.stack.layers for p in layer}
        pairs = [(a, b) for a, b in zip(before, model.parameters(), strict=True) if b in layers]
        still = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
        moved[precision] = 1 - still
    assert moved["rem16"] > 1.5 * moved["weights"]


# ------------------------------------------------------------------------------------------------ stochastic rounding


def hash_of(place: int, step: int) -> int:
    """The hash by its definition, in Python's own integers."""
    h = (place * PLACE + step * STEP) % 2**32
    h = (h ^ (h >> 16)) * MIX_1 % 2**32
    h = (h ^ (h >> 15)) * MIX_2 % 2**32
    return h ^ (h >> 16)


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    values = torch.rand(4096) * 1e-6
    rounded = torch.stack([round_stochastically(values, torch.tensor(float(step))).float() for step in range(1, 401)])
    below = (values.view(torch.int32) >> 16 << 16).view(torch.float32)
    above = ((values.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    error = (rounded.mean(0) - values) / (above - below)
    # the mean of 400 coins has a standard deviation of at most 0.025
    assert float(error.abs().max()) < 0.13
    assert abs(float(error.mean())) < 1e-3
    exact = values.bfloat16()
    assert torch.equal(round_stochastically(exact.float(), torch.tensor(3.0)), exact)
    assert torch.equal(round_stochastically(torch.zeros(9), torch.tensor(3.0)), torch.zeros(9).bfloat16())


@pytest.mark.parametrize("first", [0, 1024, 2**31 - 2, 2**32 - 3])
def test_rounding_depends_on_place_and_step_alone(first: int) -> None:
    values = torch.rand(3000) * 1e-6
    for step in (1.0, 70_000.0):
        t = torch.tensor(step)
        whole = round_stochastically(values, t, first)
        pieces = [round_stochastically(values[start : start + 1024], t, first + start) for start in (0, 1024, 2048)]
        assert torch.equal(torch.cat(pieces), whole)
        expected = [
            (bits + (hash_of(first + i, int(step)) & 0xFFFF)) >> 16
            for i, bits in enumerate(values.view(torch.int32)[:50].tolist())
        ]
        assert whole[:50].view(torch.int16).tolist() == expected


@pytest.mark.parametrize("case", ["falling", "noise", "constant"])
def test_second_moments_follow_float32_ones(case: str) -> None:
    """Rounded to the nearest they stand still: after a tenfold fall of the gradients v stayed ten times too large."""
    updates, means = {}, {}
    for precision in ("rem16", "exact"):
        generator = torch.Generator().manual_seed(1)
        layout = state_layout(torch.bfloat16, precision)  # type: ignore[arg-type]
        weight = (torch.randn(1024, generator=generator) * 0.02).bfloat16()
        state = {name: torch.zeros(1024, dtype=dtype) for name, dtype in layout.dtypes}
        step = torch.zeros(())
        group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        constant = torch.randn(1024, generator=generator) * 1e-3
        for t in range(1500):
            step += 1
            before = join(weight, state["remainder"])
            fresh = torch.randn(1024, generator=generator) * (1e-4 if case == "falling" and t >= 150 else 1e-3)
            adamw([weight], [(constant if case == "constant" else fresh).bfloat16()], [state], [step], group)
        updates[precision] = float((join(weight, state["remainder"]) - before).abs().mean())
        means[precision] = float(state["exp_avg_sq"].float().mean())
    assert means["rem16"] == pytest.approx(means["exact"], rel=0.01)
    # the first moment, a mean over ten steps, still rounds to the nearest
    assert updates["rem16"] == pytest.approx(updates["exact"], rel=0.03)


def test_every_mode_rounds_alike() -> None:
    """Chunks of any size and whole parameters have the same random bits."""
    models = {}
    for mode, chunk_bytes in (*((mode, CHUNK) for mode in MODES), ("lazy", 16 * 1024)):
        model = models[mode, chunk_bytes] = make_odd_llama(dtype=torch.bfloat16)
        optimizer = make_optimizer(model, UniformSampler(2, 3), lr=1e-3, offload=mode, chunk_bytes=chunk_bytes)  # type: ignore[arg-type]
        train(model, optimizer, range(10))
        states = optimizer.state_dict()["state"]
        models[mode, chunk_bytes] = (model, [states[i]["exp_avg_sq"] for i in sorted(states)])
    reference, moments = models["none", CHUNK]
    for model, own in models.values():
        assert_same(reference, model)
        assert all(torch.equal(a, b) for a, b in zip(moments, own, strict=True))


# --------------------------------------------------------------------------------------------------------- every mode


class Counted(Resident):
    """A mode of one's own (CONTRIBUTING.md): resident, and counts how often units leave."""

    left = 0

    def leave(self, unit: Unit) -> None:
        super().leave(unit)
        self.left += 1


def test_an_offload_mode_is_a_class_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACEMENTS, "counted", "test_offload.Counted")
    weights = {}
    for mode in ("none", "counted"):
        model = weights[mode] = make_llama()
        optimizer = make_optimizer(model, UniformSampler(1, 2, seed=4), lr=1e-3, offload=mode)
        train(model, optimizer, range(9))
    assert_same(weights["none"], weights["counted"])
    assert optimizer.switches >= optimizer._placement.left > 0
    sampled = MethodConfig(name="own", sampler=UniformSamplerConfig())
    plans = Planner(ModelConfig(name="tiny"), "cpu").plan_modes(sampled, StepShape(rows=1, tokens=8))
    assert plans[-1].offload == "counted"
    assert plans[-1].to_dict() == plans[1].to_dict() | {"offload": "counted"}


def test_every_mode_of_the_configuration_has_a_class_that_says_what_it_takes() -> None:
    assert (*PLACEMENTS, "auto") == get_args(Offload)
    kept = {"active": 40, "inactive": 20, "blocks": 80, "ring": 16}
    assert {mode: placement_class(mode).footprint(**kept) for mode in PLACEMENTS} == {
        "none": Footprint(states=60),
        "resident": Footprint(states=40, host=80),
        **dict.fromkeys(STREAMED, Footprint(states=0, staging=16, host=80)),
    }
    reset = kept | {"inactive": 0}
    assert OnDevice.footprint(**reset) == Resident.footprint(**reset) == Footprint(states=40)


def test_what_a_step_did_adds_up() -> None:
    model = make_llama()
    sampler = GradNormSampler(2, 3, probing_steps=2, refresh_period=3, seed=2)
    optimizer = make_optimizer(model, sampler, lr=1e-3, offload="lazy", chunk_bytes=CHUNK)
    assert optimizer.last is None
    done = []
    for step in range(11):
        active, layers = optimizer.active_units, optimizer.active_layers
        train(model, optimizer, range(step, step + 1))
        assert optimizer.last is not None
        assert (optimizer.last.active_units, optimizer.last.active_layers) == (active, layers)
        done.append(optimizer.last)
    assert [info.probed for info in done] == [True, True, *[False] * 9]
    assert sum(info.refreshed for info in done) == sampler.refreshes == 4
    assert sum(info.switched for info in done) == optimizer.switches == 4
    assert sum(info.bytes_in for info in done) == optimizer.stats.bytes_in > 0
    assert sum(info.bytes_out for info in done) == optimizer.stats.bytes_out > 0
    assert sum(info.stall_s for info in done) == pytest.approx(optimizer.stats.exposed_s)
    assert done[-1].probabilities == sampler.probabilities()
    model = make_llama()
    other = make_optimizer(model, GradNormSampler(2, 3, probing_steps=2, refresh_period=3), offload="lazy")
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(11, 12))
    assert other.last is not None
    assert not other.last.refreshed
    assert not other.last.switched


@pytest.mark.parametrize("moved", [{"train_head": True}, {"granularity": "matrix", "ring_slots": 2}])
def test_an_option_among_the_arguments_is_told_its_place(moved: dict[str, Any]) -> None:
    names = ", ".join(f"{name}=..." for name in moved)
    with pytest.raises(TypeError, match=re.escape(f"pass options=LayerwiseOptions({names})")):
        LayerwiseAdamW(make_llama(), UniformSampler(2, 3), **moved)
    with pytest.raises(TypeError, match="LayerwiseAdamW has no argument rate, speed"):
        LayerwiseAdamW(make_llama(), UniformSampler(2, 3), speed=1, rate=2, **moved)


SETTINGS = list(itertools.product([1, 3, 10], [1, 2, 4]))


@pytest.mark.parametrize(("period", "gamma"), SETTINGS)
def test_every_mode_gives_the_same_bits(period: int, gamma: int) -> None:
    """Over changing active sets; tied weights, accumulation and clipping each in some of the cases."""
    tied = gamma == 2
    accumulation = 4 if period == 3 else 1
    clip = 0.5 if gamma != 1 else None
    inactive = "reset" if period == 1 else "keep"
    models, states = {}, {}
    for mode in MODES:
        model = models[mode] = make_odd_llama(tied=tied)
        optimizer = make_optimizer(
            model,
            GradNormSampler(gamma, period, probing_steps=2, refresh_period=4, seed=2),
            lr=1e-3,
            weight_decay=0.1,
            max_grad_norm=clip,
            offload=mode,  # type: ignore[arg-type]
            inactive_states=inactive,  # type: ignore[arg-type]
            train_norm=True,
            train_embeddings=tied,
            chunk_bytes=CHUNK,
            ring_slots=2,
        )
        train(model, optimizer, range(60 if gamma == 2 else 24), accumulation=accumulation)
        states[mode] = optimizer.state_dict()
    for mode in MODES[1:]:
        assert_same(models["none"], models[mode])
        ours, theirs = states["none"]["state"], states[mode]["state"]
        active = states[mode]["layerwise"]["active_units"]
        assert active == states["none"]["layerwise"]["active_units"]
        for index, saved in ours.items():
            for name, tensor in saved.items():
                assert torch.equal(tensor, theirs[index][name]), (mode, index, name)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_borrowed_memory_changes_no_bit_and_is_given_back(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borrowed at any layer of backward; every forward, also one in between, ends with the ring alone."""
    models = {}
    chance = torch.Generator().manual_seed(0)
    for mode in ("none", "lazy"):
        model = models[mode] = make_odd_llama()
        sampler = GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=2)
        optimizer = make_optimizer(model, sampler, lr=1e-3, offload=mode, chunk_bytes=CHUNK, ring_slots=1)
        if mode == "lazy":
            monkeypatch.setattr(Room, "bytes", lambda *_, **__: CHUNK * int(torch.randint(0, 3, (), generator=chance)))
        most = 0
        for step in range(20):
            for micro in range(accumulation):
                batch = make_batch(accumulation * step + micro, vocabulary=61)
                loss = model(input_ids=batch, labels=batch).loss
                if mode == "lazy":
                    assert not optimizer._placement.streamer.borrowed  # type: ignore[attr-defined]
                loss.backward()
                most = max(most, len(optimizer._placement.streamer.borrowed) if mode == "lazy" else 0)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        assert (most > 2) == (mode == "lazy")
    assert_same(models["none"], models["lazy"])


@pytest.mark.parametrize("mode", STREAMED)
def test_streaming_is_torchs_adamw(mode: Any) -> None:
    ours, theirs = make_odd_llama(), make_odd_llama()
    optimizer = make_optimizer(
        ours, AllLayersSampler(), lr=1e-3, weight_decay=0.1, offload=mode, chunk_bytes=CHUNK, ring_slots=1
    )
    layers = [p for layer in find_decoder_stack(theirs).layers for p in layer]
    for parameter in set(theirs.parameters()) - set(layers):
        parameter.requires_grad_(False)
    norms = {"params": [p for p in layers if p.ndim == 1], "weight_decay": 0}
    groups = [{"params": [p for p in layers if p.ndim > 1]}, norms]
    train(ours, optimizer, range(12))
    train(theirs, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, fused=True), range(12))
    assert_same(ours, theirs)


@pytest.mark.parametrize("saved_in", MODES)
def test_resume_at_every_step_in_any_mode(saved_in: Any) -> None:
    def build(mode: Any) -> tuple[nn.Module, LayerwiseAdamW]:
        model = make_odd_llama()
        sampler = GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=5)
        return model, make_optimizer(model, sampler, lr=1e-3, offload=mode, chunk_bytes=CHUNK, train_norm=True)

    whole, optimizer = build(saved_in)
    snapshots = []
    for step in range(10):
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        snapshots.append((copy.deepcopy(whole.state_dict()), buffer.getvalue()))
        train(whole, optimizer, range(step, step + 1))
    for step, (saved_weights, saved_state) in enumerate(snapshots):
        mode = MODES[(MODES.index(saved_in) + step) % len(MODES)]
        resumed, other = build(mode)
        resumed.load_state_dict(saved_weights)
        other.load_state_dict(torch.load(io.BytesIO(saved_state), weights_only=True))
        train(resumed, other, range(step, 10))
        assert_same(whole, resumed)


@pytest.mark.parametrize("mode", MODES)
def test_torchs_adamw_goes_on_from_the_exported_states(mode: Any) -> None:
    """The standard layout, loaded into torch's optimizer over the same groups: the next steps are the same bits."""
    ours = make_odd_llama()
    optimizer = make_optimizer(ours, AllLayersSampler(), lr=1e-3, weight_decay=0.1, offload=mode, chunk_bytes=CHUNK)
    train(ours, optimizer, range(5))
    theirs = copy.deepcopy(ours)
    place = {id(p): q for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)}
    groups = [
        {"params": [place[id(p)] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    other = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    other.load_state_dict(copy.deepcopy(optimizer.adamw_state_dict()))
    train(ours, optimizer, range(5, 9))
    train(theirs, other, range(5, 9))
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", STREAMED)
def test_memory_on_the_device_is_the_ring(mode: Any) -> None:
    model = make_odd_llama()
    optimizer = make_optimizer(
        model, UniformSampler(2, 2), lr=1e-3, offload=mode, chunk_bytes=CHUNK, ring_slots=3, train_norm=True
    )
    norm = 2 * 4 * model.model.norm.weight.numel()
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        device, host = optimizer.state_bytes()
        assert device == 3 * CHUNK + norm
    layout = state_layout(torch.float32, "rem16")
    planned = sum(
        chunk.nbytes for layer in optimizer.stack.layers for chunk in cut("layer", list(layer), layout, CHUNK)
    )
    assert host == planned, "every layer was visited: host bytes are the plan's"
    assert optimizer.stats.bytes_in == optimizer.stats.bytes_out > 0


def test_lazy_fetches_ahead_during_backward_and_overlap_does_not() -> None:
    hidden = {}
    for mode in ("overlap", "lazy"):
        model = make_odd_llama()
        optimizer = make_optimizer(
            model,
            UniformSampler(1, 4),
            lr=1e-3,
            offload=mode,  # type: ignore[arg-type]
            chunk_bytes=1024 * 1024,
        )
        train(model, optimizer, range(8), accumulation=2)
        hidden[mode] = optimizer.stats.hidden_share
    assert hidden == {"overlap": 0.0, "lazy": 1.0}


# ----------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_not_finite_change_nothing(mode: Any) -> None:
    model = make_odd_llama()
    optimizer = make_optimizer(model, UniformSampler(2, 5, seed=1), lr=1e-3, offload=mode, chunk_bytes=CHUNK)
    train(model, optimizer, range(2))
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()["state"]))
    backward(model, 99, vocabulary=61)
    gradient = optimizer.active_parameters()[0].grad
    assert gradient is not None
    gradient[0] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.isfinite(optimizer.grad_norm)  # type: ignore[arg-type]
    after = dict(model.state_dict()), optimizer.state_dict()["state"]
    assert all(torch.equal(a, after[0][name]) for name, a in before[0].items())
    for index, state in before[1].items():
        assert all(torch.equal(tensor, after[1][index][name]) for name, tensor in state.items())
    train(model, optimizer, range(2, 4))
    assert any(not torch.equal(a, model.state_dict()[name]) for name, a in before[0].items())


@pytest.mark.parametrize("mode", STREAMED)
def test_an_interrupted_update_is_never_saved(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_odd_llama()
    optimizer = make_optimizer(model, UniformSampler(2, 5), lr=1e-3, offload=mode, chunk_bytes=CHUNK)
    train(model, optimizer, range(2))
    saved_weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = copy.deepcopy(saved)
    calls = itertools.count()

    def broken(*args: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "adamw", broken)
    backward(model, 2, vocabulary=61)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    for action in (optimizer.state_dict, optimizer.step):
        with pytest.raises(RuntimeError, match="interrupted in the middle of its update"):
            action()
    model.load_state_dict(saved_weights)
    optimizer.load_state_dict(saved)
    found = optimizer.state_dict()
    for index, state in expected["state"].items():
        assert all(torch.equal(tensor, found["state"][index][name]) for name, tensor in state.items())
    train(model, optimizer, range(2, 6))


@pytest.mark.parametrize("mode", STREAMED)
def test_an_exception_in_backward_harms_nothing(mode: Any) -> None:
    model, reference = make_odd_llama(), make_odd_llama()
    build = {"lr": 1e-3, "chunk_bytes": CHUNK}
    optimizer = make_optimizer(model, UniformSampler(2, 3, seed=1), offload=mode, **build)  # type: ignore[arg-type]
    other = make_optimizer(reference, UniformSampler(2, 3, seed=1), offload="none", **build)  # type: ignore[arg-type]
    for step in range(6):
        handle = optimizer.active_parameters()[0].register_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            backward(model, 50 + step, vocabulary=61)
        handle.remove()
        optimizer.zero_grad()
        train(model, optimizer, range(step, step + 1))
        train(reference, other, range(step, step + 1))
    assert_same(model, reference)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_host_memory_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "available_bytes", lambda: 100 * 2**20)
    with pytest.raises(MemoryError, match=r"layer_\d\d need \d+ MiB of host memory, but only 100 MiB are available"):
        LayerwiseAdamW(make_odd_llama(), UniformSampler(2, 3), offload="lazy")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="states of GaLore are not streamed; use resident"):
        make_optimizer(make_odd_llama(), UniformSampler(2, 3), offload="lazy", projection=GaLore(rank=4))
    with pytest.raises(ValueError, match="ring_slots is 0"):
        make_optimizer(make_odd_llama(), UniformSampler(2, 3), offload="lazy", ring_slots=0)
    with pytest.raises(ValueError, match="precision is 'half'; available: weights, rem16, exact, int8"):
        LayerwiseAdamW(make_odd_llama(), UniformSampler(2, 3), precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", ["none", "resident"])
def test_projected_states_travel_whole(offload: Any) -> None:
    model = make_odd_llama()
    optimizer = make_optimizer(
        model, UniformSampler(1, 2), lr=1e-3, offload=offload, projection=GaLore(rank=4, refresh_period=3)
    )
    train(model, optimizer, range(12))
    device, host = optimizer.state_bytes()
    assert (host > 0) == (offload == "resident")
    assert device > 0


def test_a_step_that_fails_while_it_borrows_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle of the update; then evaluation, and the last checkpoint."""
    monkeypatch.setattr(Room, "bytes", lambda *_, **__: CHUNK)
    model, twin = make_odd_llama(), make_odd_llama()
    optimizers = []
    for each in (model, twin):
        optimizers.append(
            make_optimizer(each, UniformSampler(2, 3, seed=3), lr=1e-3, offload="lazy", chunk_bytes=CHUNK, ring_slots=1)
        )
        train(each, optimizers[-1], range(4))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizers[0].state_dict())
    with monkeypatch.context() as patch:
        calls = itertools.count()
        broken = lambda *given: None if next(calls) < 3 else 1 / 0  # noqa: E731
        patch.setattr("grass_ray.optim.streaming.adamw", broken)
        backward(model, 4, vocabulary=61)
        assert optimizers[0]._placement.streamer.borrowed  # type: ignore[attr-defined]
        with pytest.raises(ZeroDivisionError):
            optimizers[0].step()
    with torch.no_grad():
        model(input_ids=make_batch(0, vocabulary=61))
    assert not optimizers[0]._placement.streamer.borrowed  # type: ignore[attr-defined]
    model.load_state_dict(weights)
    optimizers[0].load_state_dict(saved)
    optimizers[0].zero_grad()
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer, range(4, 9))
    assert_same(model, twin)


def test_states_that_were_fetched_ahead_are_forgotten_at_a_switch() -> None:
    """Layers that begin anew: what was fetched of them before the switch is not their state any more."""
    model = make_odd_llama()
    optimizer = make_optimizer(
        model, UniformSampler(2, 1000), lr=1e-3, offload="lazy", inactive_states="reset", chunk_bytes=CHUNK
    )
    train(model, optimizer, range(3))
    before = optimizer.active_units
    backward(model, 3, vocabulary=61)
    optimizer.zero_grad()
    optimizer._active.switch(tuple({0, 1, 2, 3} - set(before)))
    optimizer._active.switch(before)
    twin = copy.deepcopy(model).requires_grad_()
    fresh = make_optimizer(twin, UniformSampler(2, 1000), lr=1e-3, offload="none")
    fresh._active.switch(before)
    train(model, optimizer, range(4, 6))
    train(twin, fresh, range(4, 6))
    assert_same(model, twin)


# ------------------------------------------------------------------------------------------------ the hazard checker


def borrow_memory(placement: Lazy, streams: RecordingStreams) -> None:
    """Let slots be borrowed, whose memory the training itself uses before and after."""
    streamer = placement.streamer
    borrow, give_back = streamer._borrow, streamer.give_back

    def use(slots: Iterable[int]) -> None:
        for index in slots:
            with streams.on("compute", writes=[("slot", index)]):
                pass

    def borrowing(layer: int) -> bool:
        use([1 + max(slot.index for slot in (*streamer.borrowed, streamer._last_in_ring))])
        return borrow(layer)

    def giving_back(layer: int) -> None:
        before = {slot.index for slot in streamer.borrowed}
        give_back(layer)
        use(before - {slot.index for slot in streamer.borrowed})

    placement._slots_to_borrow = lambda: 12 - len(streamer.borrowed)  # type: ignore[method-assign]
    streamer._borrow = borrowing  # type: ignore[method-assign]
    streamer.give_back = giving_back  # type: ignore[method-assign]


def record_training(mode: Any, chunk_bytes: int, slots: int, without: str | None = None) -> RecordingStreams:
    """A short training with switches, in which the training's own work is noted too."""
    model = make_odd_llama()
    streams = RecordingStreams(without=without)

    def noting_forward(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any) -> None:
            with streams.on("compute", reads=[("weights", name)]):
                pass

        return note

    def noting_backward(name: str) -> Callable[..., None]:
        def note(gradient: torch.Tensor) -> None:
            with streams.on("compute", reads=[("weights", name)], writes=[("gradients", name)]):
                pass

        return note

    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.register_hook(noting_backward(f"layer_{index:02d}"))
    optimizer = make_optimizer(
        model,
        UniformSampler(2, 3, seed=3),
        lr=1e-3,
        offload=mode,
        chunk_bytes=chunk_bytes,
        ring_slots=slots,
        streams=streams,
    )
    if mode == "lazy":
        borrow_memory(optimizer._placement, streams)  # type: ignore[arg-type]
    for module, unit in zip(optimizer.stack.modules, optimizer.units, strict=True):
        module.register_forward_pre_hook(noting_forward(unit.name))
    for step in range(8):
        backward(model, step, vocabulary=61)
        optimizer.step()
        optimizer.zero_grad()
    saved = optimizer.state_dict()
    host = optimizer._placement.host
    blocks = [("block", chunk.name) for unit in host.units for chunk in host.chunks(unit)]
    with streams.on("host", reads=blocks):
        pass
    backward(model, 8, vocabulary=61)
    optimizer.load_state_dict(saved)
    with streams.on("compute", writes=[("slot", index) for index in range(slots)]):
        pass  # the memory of the ring before
    return streams


SCENES = [("lazy", CHUNK, 2), ("lazy", 1024 * 1024, 8), ("overlap", CHUNK, 2), ("overlap", 1024 * 1024, 8)]


@pytest.mark.parametrize(("mode", "chunk_bytes", "slots"), SCENES)
def test_no_two_accesses_can_collide(mode: Any, chunk_bytes: int, slots: int) -> None:
    streams = record_training(mode, chunk_bytes, slots)
    assert len(streams.operations) > 60
    assert {operation.stream for operation in streams.operations} == {"compute", "fetch", "update", "write", "host"}
    assert not streams.collisions()


def test_every_wait_is_needed() -> None:
    """Without any one kind of wait the checker finds a collision in one of the scenes."""
    reasons = set().union(*(record_training(*scene).reasons for scene in SCENES))
    assert len(reasons) == 9
    for reason in reasons:
        assert any(record_training(*scene, without=reason).collisions() for scene in SCENES), reason


def test_lazy_lets_updates_go_on_under_the_next_forward() -> None:
    """In lazy mode some forward does not come after every update before it; in overlap each does."""
    free = {}
    for mode in ("lazy", "overlap"):
        operations = record_training(mode, CHUNK, 2).operations
        free[mode] = any(
            operations[earlier].stream == "update" and earlier not in operation.after
            for later, operation in enumerate(operations)
            for earlier in range(later)
            if operation.stream == "compute" and not operation.writes
        )
    assert free == {"lazy": True, "overlap": False}


@pytest.mark.long
def test_the_cuda_kernel_is_the_reference_under_tritons_interpreter() -> None:
    """Runs the kernel's own source without a GPU, where triton is installed (it comes with CUDA builds of torch)."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch; pip install triton to run this")
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]; torch.set_num_threads(1)\n"
        "import test_offload; test_offload.compare_kernels('cpu')"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code, str(here), str(here.parent)], check=True, env=environment, timeout=300)


def compare_kernels(device: str) -> None:
    """The fused kernel against the plain one; compilers may contract float32 operations, hence the tolerance."""
    from grass_ray.optim.kernels import _through_float32
    from grass_ray.optim.triton_adamw import adamw_in_one_pass

    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    cases: list[tuple[torch.dtype, Precision, int]] = [
        (torch.bfloat16, "rem16", 0),
        (torch.bfloat16, "rem16", 2**31 - 700),
        (torch.bfloat16, "exact", 0),
        (torch.bfloat16, "int8", 0),
        (torch.bfloat16, "int8", 2**31 - 700),
        (torch.float32, "int8", 0),
    ]
    for dtype, precision, first in cases:
        weight = torch.randn(5001, device=device).to(dtype)
        moments = [torch.randn(5001, device=device) * 1e-3, torch.rand(5001, device=device) * 1e-6]
        layout = state_layout(dtype, precision)
        shapes = layout.shapes(weight.shape)
        state = {name: torch.zeros(shapes[name], dtype=kind, device=device) for name, kind, _ in layout.tensors}
        if precision == "int8":
            write_moments(state, moments, torch.zeros((), device=device), first)
        else:
            state["exp_avg"].copy_(moments[0])
            state["exp_avg_sq"].copy_(moments[1])
        if "remainder" in state:
            state["remainder"].random_(-32768, 32767)
        gradient = torch.randn(5001, device=device).to(dtype)
        step = torch.tensor(7.0, device=device)
        ours, theirs, skipped = ((weight.clone(), {k: v.clone() for k, v in state.items()}) for _ in range(3))
        adamw_in_one_pass(ours[0], gradient, ours[1], step, group, None, first)
        _through_float32(theirs[0], gradient, theirs[1], step, group, None, first)
        # contraction may move a moment over the edge between two roundings, in few places only
        for name in ("exp_avg_sq",) if precision != "int8" else layout.shapes(weight.shape):
            same = (ours[1][name] == theirs[1][name]).float().mean()
            assert same > (0.5 if name == "remainder" or precision == "exact" else 0.999), name
        before, after, reference = (
            join(w, s["remainder"]) if "remainder" in s else w for w, s in ((weight, state), ours, theirs)
        )
        torch.testing.assert_close(after, reference, rtol=1e-6, atol=1e-6)
        assert not torch.equal(after, before)
        adamw_in_one_pass(skipped[0], gradient, skipped[1], step, group, torch.ones_like(step), first)
        assert torch.equal(skipped[0], weight)
        assert all(torch.equal(skipped[1][name], tensor) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["weights", "rem16", "exact", "int8"])
@pytest.mark.parametrize("mode", STREAMED)
def test_gpu_modes_give_the_same_bits_whatever_the_streams_do(mode: Any, precision: Any) -> None:
    """With random delays injected into each stream."""
    device = torch.device("cuda")
    models = {}
    for each in ("resident", mode):
        model = models[each] = make_odd_llama(dtype=torch.bfloat16).to(device)
        optimizer = make_optimizer(
            model,
            GradNormSampler(2, 3, probing_steps=2, refresh_period=4),
            lr=1e-3,
            precision=precision,
            offload=each,
            chunk_bytes=CHUNK,
            ring_slots=2,
        )
        chance = torch.Generator().manual_seed(0)
        for step in range(30):
            batch = make_batch(step, vocabulary=61).to(device)
            model(input_ids=batch, labels=batch).loss.backward()
            if each == mode and mode != "blocking":
                for name in ("fetch", "update", "write"):
                    with optimizer._placement.streams.on(name):  # type: ignore[arg-type]
                        torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=chance)))
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
    torch.cuda.synchronize()
    assert_same(models["resident"], models[mode])


@pytest.mark.gpu
def test_gpu_kernel_is_the_reference() -> None:
    compare_kernels("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", [UniformSampler(2, 100), GradNormSampler(2, 100, probing_steps=1)])
def test_gpu_step_never_makes_the_host_wait(sampler: Any) -> None:
    model = make_odd_llama(dtype=torch.bfloat16).cuda()
    optimizer = make_optimizer(model, sampler, lr=1e-3, offload="lazy", chunk_bytes=CHUNK, max_grad_norm=1.0)
    batch = make_batch(0, vocabulary=61).cuda()
    for step in range(6):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_memory_stays_flat() -> None:
    model = make_llama(hidden=512, layers=8).cuda().bfloat16()
    optimizer = make_optimizer(model, UniformSampler(2, 5), lr=1e-3, offload="lazy", chunk_bytes=1024 * 1024)
    batch = make_batch(0).cuda()

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    while len(optimizer.state) < sum(1 for layer in optimizer.stack.layers for _ in layer):
        step()  # a layer's counters of steps come with its first visit and stay
    reserved = []
    for _ in range(30):
        step()
        reserved.append(torch.cuda.memory_reserved())
    assert len(set(reserved)) == 1


def overlapped_share(mode: Any, rows: int = 16) -> float:
    """Share of the copies' time during which a kernel runs on another stream, from a profiler trace."""
    model = make_llama(hidden=2048, layers=8).cuda().bfloat16()
    optimizer = make_optimizer(
        model, UniformSampler(2, 1000), lr=1e-3, offload=mode, chunk_bytes=32 * 1024 * 1024, ring_slots=8
    )
    batch = make_batch(0, rows=rows, tokens=1024).cuda()

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    events = [
        e
        for e in profiler.events()
        # an annotation spans a whole optimizer step, whatever runs in it
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    copies = [(start, end) for name, start, end in spans if "HtoD" in name or "DtoH" in name]
    kernels = sorted((start, end) for name, start, end in spans if "Memcpy" not in name and "Memset" not in name)
    total = sum(end - start for start, end in copies)
    covered = 0.0
    for start, end in copies:
        reached = start
        for begin, finish in kernels:
            begin, finish = max(begin, reached), min(finish, end)
            if finish > begin:
                covered += finish - begin
                reached = finish
    return covered / total


@pytest.mark.gpu
def test_gpu_copies_are_hidden_under_computation_and_blocking_ones_are_not() -> None:
    """Layers 3 and 4 of 8: 0.82 on an H200; what backward reaches late and forward needs early cannot all be hidden."""
    assert overlapped_share("lazy") >= 0.75
    assert overlapped_share("blocking") <= 0.1


@pytest.mark.gpu
def test_gpu_peak_is_the_ring_and_one_units_gradients() -> None:
    """Beyond the same step without any optimizer."""
    peaks = {}
    chunk = 4 * 1024 * 1024
    trains: list[bool] = []
    for mode in ("lazy", "nothing"):
        model = make_llama(hidden=1024, layers=8).cuda().bfloat16()
        batch = make_batch(0, rows=4, tokens=256).cuda()
        optimizer = None
        if mode == "lazy":
            optimizer = make_optimizer(
                model, UniformSampler(2, 1000), lr=1e-3, offload="lazy", chunk_bytes=chunk, ring_slots=4
            )
            gradients = 2 * sum(p.numel() for p in optimizer.stack.layers[0])
            trains = [p.requires_grad for p in model.parameters()]
        for parameter, active in zip(model.parameters(), trains, strict=True):
            parameter.requires_grad_(active)
        for step in range(6):
            if step == 3:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            model(input_ids=batch, labels=batch).loss.backward()
            if optimizer is not None:
                optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None
        torch.cuda.synchronize()
        peaks[mode] = torch.cuda.max_memory_allocated()
        del optimizer, model
        torch.cuda.empty_cache()
    assert peaks["lazy"] - peaks["nothing"] <= 4 * chunk + gradients + 2 * 1024 * 1024
