"""GaLore and APOLLO against their authors' packages, against plain references, and through LayerwiseAdamW.

The packages are in the optional ``reference`` extra. They import bitsandbytes for their 8-bit optimizers, which are not
used here: an empty module stands in for it while they are imported.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from small import backward, make_llama, make_optimizer
from torch import Tensor, nn

from grass_ray import AllLayersSampler, Apollo, GaLore, LayerwiseAdamW, UniformSampler

ABSENT = "not installed; pip install --no-deps galore-torch apollo-torch"
STEPS = 12
LR = 1e-3
BETAS = (0.9, 0.999)
GROUP = {"lr": LR, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture
def _stub_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gone again before anything else asks whether bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "bitsandbytes.functional"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object  # type: ignore[attr-defined]
    yield
    monkeypatch.undo()


@pytest.fixture
def galore_torch(_stub_of_bitsandbytes: None) -> Any:
    return pytest.importorskip("galore_torch", reason=ABSENT)


@pytest.fixture
def apollo_torch(_stub_of_bitsandbytes: None) -> Any:
    return pytest.importorskip("apollo_torch", reason=ABSENT)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers with matrices of 32 x 32, 64 x 32, 32 x 64 and 16 x 32; norms stay frozen."""
    model = make_llama(layers=2).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    return model


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def with_projection(model: nn.Module, projection: GaLore | Apollo, **settings: Any) -> LayerwiseAdamW:
    defaults: dict[str, Any] = {"sampler": AllLayersSampler(), "lr": LR, "eps": 1e-6, "weight_decay": 0.1}
    return make_optimizer(model, projection=projection, **defaults | settings)


def distance(left: nn.Module, right: nn.Module) -> float:
    """The largest difference between two weights, as a share of how far their matrix moved."""
    starts = matrices(make_model(next(left.parameters()).dtype))
    with torch.no_grad():
        pairs = list(zip(matrices(left), matrices(right), starts, strict=True))
        return max(float((a - b).abs().max() / (a - start).abs().max()) for a, b, start in pairs)


# ------------------------------------------------------------------------------------------------- against the packages


@pytest.mark.parametrize("rank", [1, 4, 16, 40])
def test_galore_follows_galore_torch(rank: int, galore_torch: Any) -> None:
    """12 steps with refreshes at 0, 5 and 10, both orientations, rank 40 above every shorter side.

    The package decays by ``p += p * -lr * wd`` and scales the projected update before the step; the order of rounding
    differs, nothing else. float64 shows that (both decompose in float32): in float32 rounding alone grows to 1e-3 of
    the way, since Adam makes much of directions with hardly any gradient. The package's plain AdamW for other
    parameters puts eps elsewhere than torch's: norms are frozen.
    """
    ours, theirs = make_model(torch.float64), make_model(torch.float64)
    train(ours, with_projection(ours, GaLore(rank=rank, refresh_period=5, scale=0.25)), range(STEPS))
    group = {"params": matrices(theirs), "rank": rank, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    for parameter in theirs.parameters():
        parameter.requires_grad_(parameter in set(matrices(theirs)))
    optimizer = galore_torch.GaLoreAdamW([group], lr=LR, weight_decay=0.1, no_deprecation_warning=True)
    train(theirs, optimizer, range(STEPS))
    assert distance(ours, theirs) < 1e-9


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("rank", [1, 8])
def test_apollo_follows_apollo_torch(
    rank: int, scale_front: bool, scaling: str, apollo_torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps with refreshes at 0, 5 and 10, both orientations, with the package's own random directions.

    Ours come from another generator, so that they are the same on every device; the rest is the same formula up to
    the order of rounding. float64, since a channel whose projected gradient is nearly 0 multiplies rounding; ours
    keeps the update's norm in float32 whatever the weights are, the package in the weights' dtype. With scale_front
    the package's 1e-8 in the limit on growth acts on another magnitude.
    """
    from apollo_torch.random_projector import next_seed, stable_randn

    def theirs_too(like: Tensor, key: int, refresh: int) -> Tensor:
        seed = key + 1  # the package counts parameters from 1, in the order of its groups
        for _ in range(refresh):
            seed = next_seed(seed)
        return stable_randn(like.shape, seed=seed) / math.sqrt(rank)

    ours, theirs = make_model(torch.float64), make_model(torch.float64)
    optimizer = with_projection(ours, Apollo(rank=rank, refresh_period=5, scale=4.0, scaling=scaling))  # type: ignore[arg-type]
    start = [p.detach().clone() for p in matrices(ours)]
    plain, plain_start = Apollo.directions, Apollo.start
    monkeypatch.setattr(Apollo, "directions", staticmethod(theirs_too))
    monkeypatch.setattr(
        Apollo, "start", lambda self, p: plain_start(self, p) | {"update_norm": torch.zeros((), dtype=p.dtype)}
    )
    train(ours, optimizer, range(STEPS))
    group = {
        "params": matrices(theirs),
        "rank": rank,
        "update_proj_gap": 5,
        "scale": 4.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": scaling,
    }
    for parameter in theirs.parameters():
        parameter.requires_grad_(parameter in set(matrices(theirs)))
    reference = apollo_torch.APOLLOAdamW([group], lr=LR, weight_decay=0.1, scale_front=scale_front)
    train(theirs, reference, range(STEPS))
    assert distance(ours, theirs) < (1e-3 if scale_front else 1e-9)
    monkeypatch.setattr(Apollo, "directions", staticmethod(plain))
    other = make_model(torch.float64)
    train(other, with_projection(other, Apollo(rank=rank, refresh_period=5, scale=4.0, scaling=scaling)), range(STEPS))  # type: ignore[arg-type]
    assert distance(other, theirs) > 1e-2, "the case must tell other directions apart"
    assert not any(torch.equal(a, b) for a, b in zip(start, matrices(ours), strict=True))


# ---------------------------------------------------------------------------------------------------------- by hand


SHAPES = [(6, 4), (4, 6), (5, 5)]


def gradients(shape: tuple[int, int], steps: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def updated(projection: GaLore | Apollo, weight: Tensor, grads: list[Tensor], **group: Any) -> tuple[Tensor, Any]:
    """The weight after one update a gradient, and the state."""
    parameter = nn.Parameter(weight.clone())
    state = projection.start(parameter)
    for gradient in grads:
        parameter.grad = gradient.clone()
        with torch.no_grad():
            projection.update(parameter, state, {**GROUP, **group}, key=3)
    return parameter.detach(), state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_galore_is_adam_in_the_top_singular_directions(shape: tuple[int, int], rank: int) -> None:
    """A plain reference in float64, new directions at steps 0, 3 and 6, moments carried over as they are."""
    grads = gradients(shape)
    weight = torch.ones(shape)
    reference = weight.double()
    tall = shape[0] >= shape[1]
    m = v = torch.zeros(())
    for step, gradient in enumerate(grads):
        if step % 3 == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            directions = (vh[:rank].T if tall else u[:, :rank]).double()
        small = gradient.double() @ directions if tall else directions.T @ gradient.double()
        m = 0.9 * m + 0.1 * small
        v = 0.999 * v + 0.001 * small**2
        normed = m / (v.sqrt() + 1e-6)
        back = normed @ directions.T if tall else directions @ normed
        step_size = LR * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        reference = reference - step_size * 0.5 * back
        reference = reference - LR * 0.1 * reference
    ours, _ = updated(GaLore(rank=rank, refresh_period=3, scale=0.5), weight, grads)
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=5e-7)
    assert (reference - weight).abs().max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_apollo_is_a_scaled_gradient_whose_norm_grows_slowly(shape: tuple[int, int], scaling: str) -> None:
    """A plain reference in float64 with the same directions; the gradients grow, so that the limit on growth acts."""
    grads = [gradient * 2**step for step, gradient in enumerate(gradients(shape))]
    weight = torch.ones(shape)
    reference = weight.double()
    tall = shape[0] >= shape[1]
    m = v = torch.zeros(())
    previous = None
    limited = 0
    for step, gradient in enumerate(g.double() for g in grads):
        if step % 3 == 0:
            like = torch.empty((2, shape[1]) if tall else (shape[0], 2))
            directions = Apollo.directions(like, 3, step // 3).double()
        small = gradient @ directions.T if tall else directions.T @ gradient
        m = 0.9 * m + 0.1 * small
        v = 0.999 * v + 0.001 * small**2
        normed = m / (v.sqrt() + 1e-6)
        update = torch.zeros_like(gradient)
        if scaling == "tensor":
            update = gradient * normed.norm() / small.norm()
        elif tall:
            for row in range(shape[0]):
                update[row] = gradient[row] * normed[row].norm() / small[row].norm()
        else:
            for column in range(shape[1]):
                update[:, column] = gradient[:, column] * normed[:, column].norm() / small[:, column].norm()
        norm = float(update.norm())
        if previous is not None and norm > 1.01 * previous:
            update, norm = update * 1.01 * previous / norm, 1.01 * previous
            limited += 1
        previous = norm
        step_size = LR * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        reference = reference - step_size * math.sqrt(9.0) * update
        reference = reference - LR * 0.1 * reference
    ours, _ = updated(Apollo(rank=2, refresh_period=3, scale=9.0, scaling=scaling), weight, grads)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-6)
    assert 0 < limited < 6, "the case must see the limit act and rest"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_update_of_galore_is_lr_by_scale_along_every_direction(shape: tuple[int, int]) -> None:
    """Adam's first step is the sign of what it sees: the update's singular values are those of signs."""
    (gradient,) = gradients(shape, 1)
    ours, state = updated(GaLore(rank=2, scale=0.5), torch.zeros(shape), [gradient], weight_decay=0.0, eps=1e-30)
    projector = state["projector"]
    if shape[0] >= shape[1]:
        expected = (gradient @ projector.T).sign() @ projector
    else:
        expected = projector @ (projector.T @ gradient).sign()
    torch.testing.assert_close(ours, -LR * 0.5 * expected)


def test_the_first_update_of_apollo_mini_is_the_gradient_scaled() -> None:
    """Signs have the norm of the square root of their number: lr sqrt(scale) sqrt(n) / ||R|| times G."""
    (gradient,) = gradients((6, 4), 1)
    projection = Apollo(rank=2, scale=4.0, scaling="tensor")
    ours, state = updated(projection, torch.zeros(6, 4), [gradient], weight_decay=0.0, eps=1e-30)
    small = gradient @ state["projector"].T
    torch.testing.assert_close(ours, -LR * 2.0 * math.sqrt(12) / small.norm() * gradient)


def test_random_directions_have_unit_expected_length_and_are_the_parameters_own() -> None:
    like = torch.empty(50, 400)
    directions = Apollo.directions(like, 1, 0)
    assert float(directions.square().sum(0).mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(directions, Apollo.directions(like, 1, 0))
    assert not torch.equal(directions, Apollo.directions(like, 2, 0))
    assert not torch.equal(directions, Apollo.directions(like, 1, 1))


@pytest.mark.parametrize("projection", [GaLore(rank=2, refresh_period=3), Apollo(rank=2, refresh_period=3)])
def test_directions_are_made_anew_every_refresh_period(projection: GaLore | Apollo) -> None:
    grads = gradients((6, 4))
    made = [updated(projection, torch.zeros(6, 4), grads[: step + 1])[1]["projector"] for step in range(7)]
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(made)] == [False, False, True] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"refresh_period": 0}, "refresh_period is 0; it must be at least 1"),
        ({"scale": 0.0}, "scale is 0.0; it must be above 0"),
        ({"rank": 0, "scale": -1.0}, "rank is 0.*; scale is -1.0"),
    ],
)
@pytest.mark.parametrize("kind", [GaLore, Apollo])
def test_refuses_bad_settings(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_refuses_an_unknown_scaling() -> None:
    with pytest.raises(ValueError, match="scaling is 'row'; available: channel, tensor"):
        Apollo(scaling="row")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- with the optimizer


PROJECTIONS = {"galore": GaLore(rank=4, refresh_period=3), "apollo": Apollo(rank=4, refresh_period=3)}


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("rank", [4, 1000])
def test_moments_are_of_the_small_size(kind: str, rank: int) -> None:
    """Per matrix: two moments of rank x longer side and a projector of rank x shorter side; a rank above it is cut."""
    model = make_model()
    projection = GaLore(rank=rank) if kind == "galore" else Apollo(rank=rank)
    optimizer = with_projection(model, projection)
    train(model, optimizer, range(1))
    expected = 0
    for matrix in matrices(model):
        short, long = sorted(matrix.shape)
        r = min(rank, short)
        state = optimizer.state[matrix]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape
        assert sorted(state["exp_avg"].shape) == sorted((r, long))
        assert sorted(state["projector"].shape) == sorted((r, short))
        expected += 4 * (2 * r * long + r * short + (kind == "apollo"))
    assert optimizer.state_bytes() == (expected, 0)
    plain = 4 * 2 * sum(p.numel() for p in matrices(model))
    assert (expected < plain / 3) == (rank == 4)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_only_matrices_of_the_layers_are_projected(kind: str) -> None:
    """Norms, embeddings and head follow torch's AdamW exactly: here those of a model whose layers are frozen."""
    others = {"train_embeddings": True, "train_head": True, "train_norm": True}
    model = make_llama(layers=2)
    optimizer = with_projection(model, PROJECTIONS[kind], **others)
    train(model, optimizer, range(2))
    projected = {p for p, state in optimizer.state.items() if "projector" in state}
    assert projected == set(matrices(model))
    for parameter in set(model.parameters()) - projected:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("offload", ["none", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_and_the_state_is_plain_data(kind: str, offload: str, dtype: torch.dtype) -> None:
    """From every step, between refreshes and at them; the packages' projector objects cannot be loaded so."""

    def build() -> tuple[nn.Module, LayerwiseAdamW]:
        model = make_model(dtype)
        return model, with_projection(
            model, PROJECTIONS[kind], sampler=UniformSampler(1, 2, seed=1), offload=offload, lr=1e-2
        )

    whole, optimizer = build()
    saved = []
    for step in range(9):
        buffer = io.BytesIO()
        torch.save((whole.state_dict(), optimizer.state_dict()), buffer)
        saved.append(buffer.getvalue())
        train(whole, optimizer, range(step, step + 1))
    assert {p.dtype for p in matrices(whole)} == {dtype}
    for step, content in enumerate(saved):
        resumed, other = build()
        model_state, optimizer_state = torch.load(io.BytesIO(content), weights_only=True)
        resumed.load_state_dict(model_state)
        other.load_state_dict(optimizer_state)
        train(resumed, other, range(step, 9))
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), step


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_offloading_moves_the_projector_too_and_changes_no_number(kind: str) -> None:
    models = {}
    for offload in ("none", "resident"):
        model = models[offload] = make_model()
        optimizer = with_projection(model, PROJECTIONS[kind], sampler=UniformSampler(1, 2, seed=1), offload=offload)
        train(model, optimizer, range(9))
        resident, host = optimizer.state_bytes()
        if offload == "none":
            everything = resident
            assert host == 0
        else:
            assert resident == everything / 2, "one of two equal layers"
            assert host == everything, "both have been away"
            (active,) = optimizer.active_units
            for parameter in optimizer.units[1 - active].parameters:
                assert set(optimizer.state[parameter]) <= {"step"}, "nothing is left on the device"
    for a, b in zip(models["none"].parameters(), models["resident"].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_the_clock_of_refreshes_is_the_matrixs_own(kind: str) -> None:
    """A layer that trains only in every other period refreshes by the steps it trained."""
    model = make_model()
    optimizer = with_projection(model, PROJECTIONS[kind], sampler=UniformSampler(1, 2, seed=1), offload="none")
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for step in range(16):
        (active,) = optimizer.active_units
        parameter = optimizer.units[active].parameters[0]
        train(model, optimizer, range(step, step + 1))
        seen[active].append(optimizer.state[parameter]["projector"].clone())
    for made in seen.values():
        assert len(made) > 4
        fresh = [index for index in range(1, len(made)) if not torch.equal(made[index], made[index - 1])]
        assert fresh == list(range(3, len(made), 3))
