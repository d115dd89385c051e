"""Updates inside backward: the same bits as in step, with the gradients of a unit or two at most."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording_streams import RecordingStreams
from small import backward, make_batch, make_llama, make_optimizer
from torch import nn

from grass_ray import AllLayersSampler, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.config import PLACEMENTS
from grass_ray.layerwise.matrix_norm import MatrixNormSampler
from grass_ray.layerwise.sampler import Sampler
from grass_ray.optim.chunks import SMALLEST_CHUNK_BYTES
from grass_ray.optim.momentum import SGD, Muon
from grass_ray.optim.projection import GaLore

EVERYTHING = {"train_embeddings": True, "train_head": True, "train_norm": True}
SMALL = {"lr": 1e-3, "chunk_bytes": SMALLEST_CHUNK_BYTES}
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "all": AllLayersSampler,
    "uniform": lambda: UniformSampler(2, 3, seed=1),
    "grass": lambda: GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=1),
}


def train(
    model: Any, optimizer: LayerwiseAdamW, steps: range, *, micro_batches: int = 1, checkpointed: bool = False
) -> list[float]:
    """The gradient norms of the steps."""
    if checkpointed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    norms = []
    for step in steps:
        for part in range(micro_batches):
            optimizer.last_micro_batch = part == micro_batches - 1
            backward(model, 100 * step + part)
        optimizer.step()
        assert not optimizer.last_micro_batch
        norms.append(float(optimizer.grad_norm))  # type: ignore[arg-type]
        optimizer.zero_grad()
    return norms


def assert_alike(left: nn.Module, right: nn.Module, *optimizers: LayerwiseAdamW) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name
    mine, other = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert mine.keys() == other.keys()
    for index, state in mine.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[index][name])), (index, name)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("mode", PLACEMENTS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_weights_states_and_norms_are_those_of_updates_in_step(mode: Any, sampler: str, micro_batches: int) -> None:
    models = [make_llama().to(torch.bfloat16) for _ in range(2)]
    optimizers = [
        make_optimizer(
            model,
            SAMPLERS[sampler](),
            offload=mode,
            update_in_backward=inside,
            weight_decay=0.1,
            **SMALL,
            **EVERYTHING,
        )
        for model, inside in zip(models, (False, True), strict=True)
    ]
    norms = [
        train(model, optimizer, range(9), micro_batches=micro_batches)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    assert norms[0] == norms[1]
    assert_alike(*models, *optimizers)


KINDS: dict[str, tuple[Callable[[], Sampler], dict[str, Any]]] = {
    "int8": (SAMPLERS["uniform"], {"precision": "int8", "offload": "lazy"}),
    "matrices": (lambda: MatrixNormSampler(period=2, budget=0.3), {"granularity": "matrix"}),
    "blocks": (lambda: UniformSampler(3, 2), {"granularity": "block", "offload": "lazy"}),
    "sgd": (SAMPLERS["uniform"], {"projection": SGD()}),
    "muon": (SAMPLERS["uniform"], {"projection": Muon()}),
    "galore": (AllLayersSampler, {"projection": GaLore(rank=4, refresh_period=3)}),
    "streamed weights": (SAMPLERS["uniform"], {"weights": "streamed", "offload": "lazy"}),
    "reset": (SAMPLERS["uniform"], {"inactive_states": "reset"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_kind_of_unit_and_rule(kind: str, tied: bool) -> None:
    sampler, settings = KINDS[kind]
    models = [make_llama(tied=tied) for _ in range(2)]
    optimizers = [
        make_optimizer(model, sampler(), **SMALL, **settings, update_in_backward=inside)
        for model, inside in zip(models, (False, True), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        proof = optimizer.prove()
        train(model, optimizer, range(8), checkpointed=True)
        optimizer.synchronize()
        proof.check(last=True)
        assert not proof.mistakes
    assert_alike(*models, *optimizers)


@pytest.mark.parametrize(("mode", "most"), [("none", 1), ("overlap", 1), ("lazy", 2)])
def test_no_more_than_a_unit_or_two_has_gradients(mode: Any, most: int) -> None:
    """With lazy states an update may still be under way when the next one begins."""
    model = make_llama(layers=6)
    optimizer = make_optimizer(model, AllLayersSampler(), offload=mode, update_in_backward=True, **SMALL)
    held: set[int] = set()

    def note(*_: Any) -> None:
        alive = {unit.name for unit in optimizer.units if any(p.grad is not None for p in unit.parameters)}
        if mode == "lazy":
            gates = optimizer._placement.streamer._gates  # type: ignore[attr-defined]
            alive |= {name for name, gate in gates.items() if gate.gradients}
        held.add(len(alive))

    for parameter in model.model.layers.parameters():
        parameter.register_hook(note)
    train(model, optimizer, range(4))
    assert max(held) == most


def test_without_the_flag_of_the_last_micro_batch_updates_wait_for_step() -> None:
    models = [make_llama() for _ in range(2)]
    optimizers = [make_optimizer(m, UniformSampler(2, 3), update_in_backward=True, lr=1e-3) for m in models]
    train(models[0], optimizers[0], range(4))
    for step in range(4):
        backward(models[1], 100 * step)
        if step == 0:
            with pytest.warns(UserWarning, match="last_micro_batch = True"):
                optimizers[1].step()
        else:
            optimizers[1].step()
        optimizers[1].zero_grad()
    assert_alike(*models, *optimizers)


def test_a_parameter_without_gradient_leaves_its_unit_to_step() -> None:
    models = [make_llama() for _ in range(2)]
    for model in models:  # one norm of the last layer has no part in the loss
        model.model.layers[3].post_attention_layernorm.forward = lambda hidden: hidden
    optimizers = [
        make_optimizer(model, AllLayersSampler(), lr=1e-3, update_in_backward=inside)
        for model, inside in zip(models, (False, True), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3))
    assert_alike(*models, *optimizers)


@pytest.mark.parametrize("mode", PLACEMENTS)
def test_a_unit_whose_gradients_are_not_finite_stays_as_it_is(mode: Any) -> None:
    model = make_llama()
    optimizer = make_optimizer(model, AllLayersSampler(), offload=mode, update_in_backward=True, **SMALL)
    proof = optimizer.prove()
    train(model, optimizer, range(2))
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    handle = model.model.layers[2].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    (norm,) = train(model, optimizer, range(2, 3))
    handle.remove()
    assert norm != norm
    after = model.state_dict()
    for name, weight in before.items():
        trained = "layers." in name and "layers.2." not in name
        assert torch.equal(weight, after[name]) is not trained, name
    found = optimizer.state_dict()["state"]
    counts = {int(found[index]["step"]) - int(states[index]["step"]) for index in states}
    assert counts == {0, 1}
    optimizer.synchronize()
    proof.check(last=True)
    assert not proof.mistakes
    assert train(model, optimizer, range(3, 4))[0] > 0


def test_what_has_to_see_all_gradients_first_is_refused() -> None:
    for maximum in (1.0, 0.1):
        with pytest.raises(ValueError, match=f"needs max_grad_norm None, not {maximum}"):
            make_optimizer(make_llama(), AllLayersSampler(), update_in_backward=True, max_grad_norm=maximum)
    model = make_llama()
    optimizer = make_optimizer(model, AllLayersSampler(), update_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.last_micro_batch = True
    scaler.scale(model(input_ids=make_batch(0), labels=make_batch(0)).loss).backward()
    with pytest.raises(RuntimeError, match="loss scaler"):
        scaler.step(optimizer)


def test_a_second_backward_after_the_last_is_refused() -> None:
    model = make_llama()
    optimizer = make_optimizer(model, AllLayersSampler(), update_in_backward=True)
    optimizer.last_micro_batch = True
    backward(model, 0)
    with pytest.raises(RuntimeError, match="another gradient for layer_03, which this step has updated already"):
        backward(model, 1)


@pytest.mark.parametrize("mode", PLACEMENTS)
def test_an_interrupted_backward_is_never_saved_and_a_loaded_state_goes_on(mode: Any) -> None:
    model, reference = make_llama(), make_llama()
    build: Any = {"offload": mode, "update_in_backward": True, **SMALL}
    optimizer = make_optimizer(model, AllLayersSampler(), **build)
    other = make_optimizer(reference, AllLayersSampler(), **build)
    train(model, optimizer, range(2))
    train(reference, other, range(5))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    def interrupt(gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.up_proj.weight.register_hook(interrupt)
    optimizer.last_micro_batch = True
    with pytest.raises(KeyboardInterrupt):
        backward(model, 200)
    handle.remove()
    with pytest.raises(RuntimeError, match="interrupted in the middle of its update"):
        optimizer.state_dict()
    optimizer.zero_grad()
    for action in (optimizer.state_dict, optimizer.step):
        with pytest.raises(RuntimeError, match="interrupted in the middle of its update"):
            action()
    with pytest.raises(RuntimeError, match="interrupted in the middle of its update"):
        train(model, optimizer, range(2, 3))
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    train(model, optimizer, range(2, 5))
    assert_alike(model, reference, optimizer, other)


def record_training(mode: Any, chunk_bytes: int, slots: int, without: str | None = None) -> RecordingStreams:
    """A short training, in which the training's own work is noted too."""
    model = make_llama()
    streams = RecordingStreams(without=without)

    def noting(name: str, **touched: Any) -> Callable[..., None]:
        def note(*_: Any) -> None:
            with streams.on("compute", reads=[("weights", name)], writes=touched.get("writes", ())):
                pass

        return note

    for index, layer in enumerate(model.model.layers):
        name = f"layer_{index:02d}"
        layer.mlp.down_proj.weight.register_hook(noting(name, writes=[("gradients", name)]))
    optimizer = make_optimizer(
        model,
        UniformSampler(3, 3, seed=3),
        lr=1e-3,
        offload=mode,
        chunk_bytes=chunk_bytes,
        ring_slots=slots,
        streams=streams,
        update_in_backward=True,
    )
    # the gates of the optimizer come first, then what a forward reads
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(noting(f"layer_{index:02d}"))
    train(model, optimizer, range(8))
    optimizer.synchronize()
    return streams


@pytest.mark.parametrize("mode", ["overlap", "lazy"])
@pytest.mark.parametrize(("chunk_bytes", "slots"), [(SMALLEST_CHUNK_BYTES, 2), (1024 * 1024, 8)])
def test_no_two_accesses_can_collide(mode: Any, chunk_bytes: int, slots: int) -> None:
    streams = record_training(mode, chunk_bytes, slots)
    assert not streams.collisions()
    if mode == "lazy":
        reason = "gradients are freed after their update"
        assert reason in streams.reasons
        assert record_training(mode, chunk_bytes, slots, without=reason).collisions()


def test_states_are_fetched_in_the_order_of_backward_and_once() -> None:
    model = make_llama()
    optimizer = make_optimizer(
        model, AllLayersSampler(), offload="lazy", update_in_backward=True, ring_slots=3, **SMALL
    )
    train(model, optimizer, range(6))
    stats = optimizer.stats
    assert stats.ring_waits == 0
    assert stats.bytes_in == stats.bytes_out
    assert stats.hidden_share > 0.5
