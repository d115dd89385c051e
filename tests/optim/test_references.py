"""LayerwiseAdamW against what others published: badam's optimizer, peft with torch's AdamW, float32 master weights.

``precision="exact"`` holds a float32 master as a bfloat16 weight and a remainder of 16 bits, which leaves one choice:
a master exactly between two bfloat16 numbers goes to the one farther from zero, where torch's cast takes the even one.
The references below round as it does; everything else is bitwise equal.
"""

from __future__ import annotations

import itertools
from typing import Any

import peft
import pytest
import torch
from small import backward, make_llama, make_optimizer
from torch import nn

from grass_ray import AllLayersSampler, CyclicSampler, LayerwiseAdamW, UniformSampler
from grass_ray.layerwise.schedules import Step

EVERYTHING = {"train_embeddings": True, "train_head": True, "train_norm": True}


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)  # dropout
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def rounded(master: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 of float32 numbers, halves away from zero, by arithmetic on their exponents."""
    _, exponent = torch.frexp(master.double())
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 8)
    whole = (master.double().abs() / unit + 0.5).floor() * unit
    return whole.copysign(master.double()).to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- badam


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:BAdam expect model")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cyclic_in_exact_precision_is_badam(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """badam 1.4's BlockOptimizer around torch.optim.AdamW: ascending, three blocks, into the second cycle.

    What differs from the package: it counts from one, so that its first block trains one step less than the others
    (a period that changes stands for that here); it decays biases and norms too, by mistake (no decay here); and it
    knows nothing of its own position in its state_dict. With the same kernel below, torch's fused one, everything else
    is bitwise the same. Its cast to bfloat16 is replaced (see the top of this file).
    """
    badam = pytest.importorskip("badam", reason="not installed; pip install --no-deps badam")

    def cast_back(self: Any) -> None:
        for low, high in zip(self.param_idx2lp.values(), self.param_idx2hp.values(), strict=True):
            low.data.copy_(rounded(high.data) if low.dtype == torch.bfloat16 else high.data)

    monkeypatch.setattr(badam.BlockOptimizer, "_update_param", cast_back)
    every = 4
    ours, theirs = make_llama(layers=3).to(dtype), make_llama(layers=3).to(dtype)
    start = make_llama(layers=3).to(dtype)
    optimizer = make_optimizer(
        ours,
        CyclicSampler(1, Step([every - 1, every], [0.01], steps=100)),
        lr=1e-3,
        inactive_states="reset",
        precision="exact",
    )
    base = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    reference = badam.BlockOptimizer(
        base, list(theirs.named_parameters()), switch_block_every=every, switch_mode="ascending", verbose=0
    )
    for step in range(18):
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()], step
        train(ours, optimizer, range(step, step + 1))
        train(theirs, reference, range(step, step + 1))
    assert optimizer.switches == 4
    assert_same_weights(ours, theirs)
    moved = {name for (name, a), b in zip(ours.named_parameters(), start.parameters(), strict=True) if (a != b).any()}
    # steps of at most 1e-3 leave bfloat16's norms where they are or not; every matrix of the layers moves
    assert {name for name, p in ours.named_parameters() if "layers" in name and p.ndim == 2} <= moved
    assert not any("layers" not in name for name in moved)


def test_badams_fencepost_is_what_sets_it_apart() -> None:
    """Equal periods give another trajectory: the comparison above sees one step's difference."""
    models = []
    for first in (3, 4):
        model = make_llama(layers=3)
        sampler = CyclicSampler(1, Step([first, 4], [0.01], steps=100))
        optimizer = make_optimizer(model, sampler, lr=1e-3, inactive_states="reset")
        train(model, optimizer, range(8))
        models.append(model)
    left, right = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert (left - right).abs().max() > 1e-4


# -------------------------------------------------------------------------------------------------------------- peft


def make_adapted(dora: bool) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_dora=dora,
    )
    torch.manual_seed(0)
    return peft.get_peft_model(make_llama(), config)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("offload", ["none", "resident"])
def test_all_layers_of_a_peft_model_is_torchs_adamw_bitwise(dora: bool, offload: str) -> None:
    """LoRA and DoRA with dropout, decay on the matrices; DoRA's magnitudes are vectors and never decay."""
    ours, theirs = make_adapted(dora), make_adapted(dora)
    assert_same_weights(ours, theirs)
    optimizer = LayerwiseAdamW(ours, AllLayersSampler(), lr=1e-2, weight_decay=0.1, offload=offload)  # type: ignore[arg-type]
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    kinds = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    assert all(any(kind in name for kind in kinds) for name in trained)
    decayed = [p for p in trained.values() if p.ndim == 2]
    rest = [p for p in trained.values() if p.ndim != 2]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, weight_decay=0.1, fused=True)
    train(ours, optimizer, range(12))
    train(theirs, reference, range(12))
    assert_same_weights(ours, theirs)
    before = dict(make_adapted(dora).named_parameters())
    changed = {name for name, p in ours.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained)


# ---------------------------------------------------------------------------------------------------- master weights


def plain_master_weights(model: nn.Module, steps: int, lr: float) -> None:
    """Mixed precision as everyone writes it: AdamW on float32 copies, gradients cast up, weights cast down."""
    copies = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    groups = [
        {"params": [c for c in copies.values() if c.ndim == 2]},
        {"params": [c for c in copies.values() if c.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.1, fused=True)
    for step in range(steps):
        backward(model, step)
        for parameter, copy in copies.items():
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in copies.items():
                parameter.copy_(rounded(copy))


def test_exact_precision_is_a_float32_adamw_bitwise() -> None:
    ours, theirs = make_llama().to(torch.bfloat16), make_llama().to(torch.bfloat16)
    optimizer = make_optimizer(ours, AllLayersSampler(), lr=1e-3, weight_decay=0.1, precision="exact", **EVERYTHING)
    train(ours, optimizer, range(12))
    plain_master_weights(theirs, 12, 1e-3)
    assert_same_weights(ours, theirs)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def test_precision_collects_steps_that_rounding_swallows() -> None:
    """Steps of 3e-6 are below half a bfloat16 rounding of most weights; 60 of them are not."""
    moved = {}
    for precision in ("weights", "rem16", "exact"):
        model, start = make_llama(layers=1).to(torch.bfloat16), make_llama(layers=1).to(torch.bfloat16)
        optimizer = LayerwiseAdamW(model, AllLayersSampler(), lr=3e-6, precision=precision)  # type: ignore[arg-type]
        for _ in range(60):
            train(model, optimizer, range(1))
        pairs = zip(optimizer.stack.layers, (layer.parameters() for layer in start.model.layers), strict=True)
        both = [(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
        moved[precision] = sum(int((a != b).sum()) for a, b in both) / sum(a.numel() for a, _ in both)
    assert moved["exact"] > 0.3
    assert moved["rem16"] == pytest.approx(moved["exact"], rel=0.05)
    assert moved["weights"] < 0.5 * moved["exact"]


def test_precision_means_nothing_where_weights_are_float32() -> None:
    models, sizes = [], set()
    for precision in ("weights", "rem16", "exact"):
        model = make_llama()
        optimizer = LayerwiseAdamW(model, AllLayersSampler(), lr=1e-3, precision=precision)  # type: ignore[arg-type]
        train(model, optimizer, range(3))
        sizes.add(optimizer.state_bytes())
        models.append(model)
    assert len(sizes) == 1
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], models[2])


@pytest.mark.parametrize("inactive_states", ["keep", "reset"])
def test_a_layer_that_comes_back_finds_its_own_master_weights(inactive_states: str) -> None:
    """keep: the float32 copy goes on where it was, on the host meanwhile; reset: a new copy of what was rounded."""
    layers = 2
    ours, theirs = (make_llama(layers=layers).to(torch.bfloat16) for _ in range(2))
    optimizer = make_optimizer(
        ours,
        UniformSampler(1, 2, seed=1),
        lr=1e-3,
        offload="resident",
        inactive_states=inactive_states,  # type: ignore[arg-type]
        precision="exact",
    )
    copies: dict[int, tuple[torch.optim.AdamW, list[nn.Parameter]]] = {}
    orders = []
    for step in range(16):
        (active,) = optimizer.active_layers
        orders.append(active)
        if inactive_states == "reset":
            copies = {layer: kept for layer, kept in copies.items() if layer == active}
        weights = list(theirs.model.layers[active].parameters())
        if active not in copies:
            fresh = [nn.Parameter(p.detach().float()) for p in weights]
            copies[active] = (torch.optim.AdamW(fresh, lr=1e-3, weight_decay=0.0, fused=True), fresh)
        train(ours, optimizer, range(step, step + 1))
        reference, masters = copies[active]
        backward(theirs, step)
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        reference.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(rounded(master))
        theirs.zero_grad()
    assert len(list(itertools.groupby(orders))) > 4, "layers come back"
    assert_same_weights(ours, theirs)
