"""SGD and Muon through LayerwiseAdamW, against torch's own optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import backward, make_llama, make_optimizer, short_run
from torch import Tensor, nn

from grass_ray import SGD, AllLayersSampler, LayerwiseAdamW, Muon, UniformSampler
from grass_ray.config import ConfigError
from grass_ray.optim.kernels import join
from grass_ray.optim.projection import Projection
from grass_ray.training.sharding import check_shardable
from grass_ray.training.without_effect import settings_without_effect

STEPS = 12
LR = 1e-2
ALL: dict[str, Any] = {"train_embeddings": True, "train_head": True, "train_norm": True}
RULES = [SGD(), SGD(momentum=0.5, nesterov=True), Muon(), Muon(nesterov=False, adjust_lr="original")]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return make_llama(layers=2).to(dtype)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def with_rule(model: nn.Module, rule: Projection, **settings: Any) -> LayerwiseAdamW:
    defaults: dict[str, Any] = {"sampler": AllLayersSampler(), "lr": LR, **ALL}
    return make_optimizer(model, projection=rule, **defaults | settings)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def of_torch(model: nn.Module, rule: Projection, decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """Torch's optimizers for the same training: of Muon one for the matrices of the layers, AdamW for the rest."""
    parameters = dict(model.named_parameters())
    if isinstance(rule, SGD):
        return [torch.optim.SGD(parameters.values(), lr=LR, momentum=rule.momentum, nesterov=rule.nesterov)]
    assert isinstance(rule, Muon)
    matrices = {name: p for name, p in parameters.items() if "layers" in name and p.ndim == 2}
    others = [p for name, p in parameters.items() if name not in matrices]
    settings = {"momentum": rule.momentum, "nesterov": rule.nesterov, "adjust_lr_fn": rule.adjust_lr}
    vectors, ends = ([p for p in others if p.ndim == dimensions] for dimensions in (1, 2))
    decays = [{"params": vectors, "weight_decay": 0.0}, {"params": ends, "weight_decay": decay}]
    return [
        torch.optim.Muon(matrices.values(), lr=LR, weight_decay=decay, **settings),
        torch.optim.AdamW(decays, lr=LR, fused=True),
    ]


def train_by_torch(model: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    for step in range(STEPS):
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_float32_weights_are_those_of_torch_bit_for_bit(rule: Projection) -> None:
    ours, theirs = make_model(), make_model()
    decay = 0.1 if isinstance(rule, Muon) else 0.0
    train(ours, with_rule(ours, rule, weight_decay=decay), range(STEPS))
    train_by_torch(theirs, of_torch(theirs, rule, decay))
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))
    assert not torch.equal(weights(ours)[0], weights(make_model())[0])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_bfloat16_weights_are_rounded_float32_masters(rule: Any) -> None:
    """A matrix whose gradients are given: what torch makes of a float32 copy if its moment is rounded."""
    weight = nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).bfloat16())
    master = nn.Parameter(weight.detach().float())
    state = rule.start(weight)
    (optimizer, *_) = of_torch(nn.ParameterDict({"layers": master}), rule)
    group = {"lr": LR, "weight_decay": 0.0}
    small = 0
    for step in range(60):
        weight.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(1 + step)).bfloat16() * 1e-3
        master.grad = weight.grad.float()
        before = weight.detach().clone()
        with torch.no_grad():
            rule.update(weight, state, group, key=0)
        optimizer.step()
        moment = optimizer.state[master]["momentum_buffer"]
        moment.copy_(moment.bfloat16())
        small += int((weight == before).sum())
        assert torch.equal(join(weight, state["remainder"]), master)
    assert small, "no step was below the resolution, so nothing was shown"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [SGD(), Muon()], ids=repr)
def test_states_on_the_host_give_the_same_weights_and_a_resume_too(rule: Projection, dtype: torch.dtype) -> None:
    def run(stop: int | None, **settings: Any) -> tuple[list[Tensor], int]:
        def make(model: nn.Module) -> LayerwiseAdamW:
            return with_rule(model, rule, sampler=UniformSampler(1, 2), **settings)

        model = make_model(dtype)
        optimizer = make(model)
        train(model, optimizer, range(stop or STEPS))
        if stop is not None:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], file)
            model = make_model(dtype)
            optimizer = make(model)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            train(model, optimizer, range(stop, STEPS))
        return weights(model), optimizer.state_bytes()[1]

    expected, _ = run(None, offload="none")
    _, on_host = run(None, offload="resident")
    assert on_host
    for stop in (None, 3, 6, 11):
        found, host = run(stop, offload="resident")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), stop
        assert host == on_host, "blocks of units that were active when the state was saved are there again"


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 2), (torch.bfloat16, 2 / 3)], ids=str)
def test_muon_keeps_half_of_the_states_of_adamw_or_two_thirds(dtype: torch.dtype, share: float) -> None:
    """Of bfloat16 weights both keep a remainder of 2 bytes beside moments of 2 bytes each."""
    held = {}
    for name, settings in {"adamw": {}, "muon": {"projection": Muon()}, "sgd": {"projection": SGD()}}.items():
        model = make_model(dtype)
        optimizer = make_optimizer(model, AllLayersSampler(), lr=LR, **settings)
        train(model, optimizer, range(1))
        held[name] = optimizer.state_bytes()[0]
    norms = sum(p.nbytes for name, p in make_model(dtype).named_parameters() if "layers" in name and p.ndim == 1)
    assert held["sgd"] == pytest.approx(held["adamw"] * share)
    assert held["muon"] == pytest.approx(held["adamw"] * share + norms)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(momentum=1.0), "momentum is 1.0; it must be at least 0 and below 1"),
        (lambda: Muon(momentum=-0.1), "momentum is -0.1"),
        (lambda: Muon(newton_schulz_steps=0), "newton_schulz_steps is 0; it must be from 1 to 99"),
        (lambda: Muon(adjust_lr="rms"), "adjust_lr is 'rms'; available: match_rms_adamw, original"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("offload", ["blocking", "overlap", "lazy"])
@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_streaming_is_refused_before_anything_is_loaded(kind: str, offload: str) -> None:
    with pytest.raises(ConfigError, match=f"offload {offload}: the states of projection {kind} are not streamed"):
        short_run("grass", f"method.optimizer.projection={{kind: {kind}}}", f"method.offload={offload}")


@pytest.mark.parametrize("method", ["sgd", "muon", "grass-muon"])
def test_shards_are_refused_before_anything_is_loaded(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} updates whole matrices, of which a worker has some rows"):
        check_shardable(short_run(method), 2)


def test_a_precision_that_sgd_does_not_look_at_is_told() -> None:
    told = settings_without_effect(short_run("sgd", "method.optimizer.precision=int8"))
    assert any("precision=int8: it is AdamW's" in line for line in told)
