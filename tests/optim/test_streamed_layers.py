"""Weights of frozen layers on the host: the same bits, in their slots whenever a pass reads them, every wait needed."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording_streams import RecordingStreams
from small import backward, make_batch, make_llama, make_optimizer, recompute_layers
from torch import Tensor, nn

from grass_ray import AllLayersSampler, CyclicSampler, GaLore, GradNormSampler, LayerwiseAdamW, UniformSampler
from grass_ray.config import LoraConfig
from grass_ray.optim import host_weights, streaming, weights
from grass_ray.optim.host_weights import move_outside_of_layers, streamable_weights
from grass_ray.optim.weights import StreamedWeights
from grass_ray.training.adapters import add_adapter

MODES = ("none", "resident", "blocking", "overlap", "lazy")
LAYERS = 6
CHUNK = 64 * 1024


class OtherMemory(StreamedWeights):
    """On a CPU, host and device are the same memory. Here a pass that reads a weight on the host reads NaN.

    Slots are filled with NaN when they are about to be filled, too: nothing may go on reading what was there.
    """

    def _forward_begins(self, layer: int) -> None:
        if self._current is None:
            for index in self._slot_of:
                self._spoil(index)
        super()._forward_begins(layer)

    def _leave(self) -> None:
        left = self._current
        super()._leave()
        if left is not None:
            self._spoil(left)

    def _fetch(self, layer: int) -> None:
        self._slot_of[layer].memory.fill_(255)
        super()._fetch(layer)

    def _spoil(self, layer: int) -> None:
        for parameter, _ in self._in_slot[layer]:
            parameter.data = torch.full_like(self._host.of(parameter), torch.nan)

    def rest(self) -> None:
        super().rest()
        for own in self._in_slot.values():
            for parameter, _ in own:
                if parameter.data.flatten()[0].isnan():
                    parameter.data = self._host.of(parameter)


@pytest.fixture(autouse=True)
def _other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "StreamedWeights", OtherMemory)


def make_model(*, layers: int = LAYERS, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose weights have odd sizes."""
    return make_llama(layers=layers, hidden=72, vocabulary=61, tied=tied).to(dtype)


def build(model: Any, sampler: Any = None, **settings: Any) -> LayerwiseAdamW:
    sampler = sampler or GradNormSampler(2, 3, probing_steps=2, refresh_period=4, seed=2)
    return make_optimizer(model, sampler, **({"lr": 1e-3, "chunk_bytes": CHUNK, "ring_slots": 2} | settings))


def train(model: Any, optimizer: LayerwiseAdamW, steps: range, *, accumulation: int = 1) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(accumulation):
            losses.append(backward(model, accumulation * step + micro, vocabulary=61))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(left: Any, right: Any, *optimizers: LayerwiseAdamW) -> None:
    for optimizer in optimizers:
        optimizer.synchronize()
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def both(
    change: Callable[[Any, LayerwiseAdamW], Any], *, make: Callable[[], Any] = make_model, **settings: Any
) -> None:
    """Train with resident and with streamed weights; ``change`` takes the steps. All weights and results are equal."""
    found = {}
    for kind in ("resident", "streamed"):
        model = make()
        sampler = settings.get("sampler", lambda: None)()
        options = {name: value for name, value in settings.items() if name != "sampler"}
        optimizer = build(model, sampler, weights=kind, **options)
        found[kind] = model, optimizer, change(model, optimizer)
    (model, optimizer, result), (other, streamed, theirs) = found["resident"], found["streamed"]
    assert_same(model, other, optimizer, streamed)
    assert result == theirs
    assert streamed.stats.weight_bytes_in > 0


# -------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("precision", ["weights", "rem16", "exact", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_every_placement_and_precision_gives_the_same_bits(mode: str, precision: str) -> None:
    """Over probing and changing active sets, in bfloat16."""
    both(
        lambda model, optimizer: train(model, optimizer, range(14)),
        make=lambda: make_model(dtype=torch.bfloat16),
        offload=mode,
        precision=precision,
        max_grad_norm=0.5,
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize(("period", "gamma"), list(itertools.product([1, 4], [1, 2, LAYERS - 1])))
def test_any_number_of_slots_and_layers(slots: int, period: int, gamma: int) -> None:
    both(
        lambda model, optimizer: train(model, optimizer, range(9), accumulation=1 + slots % 2),
        make=lambda: make_model(tied=gamma == 1),
        sampler=lambda: UniformSampler(gamma, period, seed=slots),
        weight_slots=slots,
        offload="lazy" if slots == 2 else "resident",
        inactive_states="reset" if period == 1 else "keep",
        train_embeddings=gamma == 1,
        train_norm=True,
        weight_decay=0.1,
    )


@pytest.mark.parametrize(
    ("granularity", "sampler"),
    [
        ("matrix", lambda: UniformSampler(5, 2, seed=3)),
        ("block", lambda: CyclicSampler(1, 1)),
        ("layer", lambda: CyclicSampler(1, 2, order="random")),
    ],
)
def test_any_unit(granularity: str, sampler: Any) -> None:
    """Some matrices of a layer stay while the others pass through; embeddings and head are never streamed."""
    both(lambda model, optimizer: train(model, optimizer, range(12)), granularity=granularity, sampler=sampler)


def test_projected_states() -> None:
    both(lambda model, optimizer: train(model, optimizer, range(9)), projection=GaLore(rank=4, refresh_period=3))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["resident", "lazy"])
def test_gradient_checkpointing(mode: str, reentrant: bool) -> None:
    def make() -> Any:
        model = make_model()
        recompute_layers(model, reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()
        return model.train()

    both(lambda model, optimizer: train(model, optimizer, range(10), accumulation=2), make=make, offload=mode)


def test_autocast() -> None:
    def run(model: Any, optimizer: LayerwiseAdamW) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            return train(model, optimizer, range(8))

    both(run)


def test_evaluation_and_generation_between_steps() -> None:
    def run(model: Any, optimizer: LayerwiseAdamW) -> list[Any]:
        seen: list[Any] = []
        for step in range(8):
            seen += train(model, optimizer, range(step, step + 1))
            batch = make_batch(100 + step, vocabulary=61)
            with torch.no_grad():
                seen.append(model(input_ids=batch).logits.double().sum().item())
            with torch.inference_mode():
                seen.append(model.generate(batch[:, :4], max_new_tokens=3, do_sample=False).tolist())
            # a forward whose loss is never differentiated
            seen.append(model(input_ids=batch, labels=batch).loss.item())
        return seen

    both(run, offload="lazy")


def test_a_forward_in_between_two_of_the_same_step() -> None:
    """Two graphs at once, differentiated in any order."""

    def run(model: Any, optimizer: LayerwiseAdamW) -> list[float]:
        seen = []
        for step in range(6):
            one, two = (make_batch(2 * step + i, vocabulary=61) for i in range(2))
            first = model(input_ids=one, labels=one).loss
            second = model(input_ids=two, labels=two).loss
            (first if step % 2 else second).backward()
            (second if step % 2 else first).backward()
            seen += [first.item(), second.item()]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    both(run)


def test_adapters_stay_and_the_weights_under_them_pass_through() -> None:
    lora = LoraConfig(rank=4, dropout=0.0, targets=("q_proj", "down_proj"))

    def make() -> Any:
        torch.manual_seed(0)
        return add_adapter(make_model(), lora)

    both(lambda model, optimizer: train(model, optimizer, range(6)), make=make, sampler=AllLayersSampler)
    both(lambda model, optimizer: train(model, optimizer, range(6)), make=make, sampler=lambda: UniformSampler(2, 2))
    model = make()
    optimizer = build(model, AllLayersSampler(), weights="streamed")
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    assert adapters
    assert not adapters & optimizer.weights._host.parameters  # type: ignore[attr-defined]
    assert len(optimizer.weights._host.parameters) == 9 * LAYERS  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- where weights are


def places(optimizer: LayerwiseAdamW) -> tuple[set[int], set[int]]:
    """Layers whose weights are all on the host, and those whose weights are all on the device to stay."""
    own = optimizer.weights
    assert isinstance(own, StreamedWeights)
    ring = range(own._ring.data_ptr(), own._ring.data_ptr() + own._ring.nbytes)
    host, stay = set(), set()
    for index, layer in enumerate(optimizer.stack.layers):
        at_host = [p.data_ptr() == own._host.of(p).data_ptr() for p in layer]
        assert not any(p.data_ptr() in ring for p in layer)
        assert len(set(at_host)) == 1
        (host if at_host[0] else stay).add(index)
    return host, stay


def test_active_layers_stay_and_all_others_are_on_the_host() -> None:
    model = make_model()
    optimizer = build(model, weights="streamed")
    layer = sum(p.nbytes for p in optimizer.stack.layers[0])
    assert optimizer.weights.host_bytes == LAYERS * layer
    ring = optimizer.weights._ring.nbytes  # type: ignore[attr-defined]
    assert 2 * layer <= ring < 2 * layer * 1.1
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        optimizer.synchronize()
        host, stay = places(optimizer)
        active = set() if optimizer.probing else set(optimizer.active_layers)
        assert stay == active
        assert host == set(range(LAYERS)) - active
        outside = sum(p.nbytes for p in model.parameters()) - LAYERS * layer
        on_device = sum(t.nbytes for t in optimizer.weights.on_device(model.parameters()))
        assert on_device == outside + len(active) * layer + ring


def count_fetches(optimizer: LayerwiseAdamW, action: Callable[[], Any]) -> float:
    """How many layers' weights were fetched."""
    layer = sum(p.nbytes for p in optimizer.stack.layers[0])
    before = optimizer.stats.weight_bytes_in
    action()
    return (optimizer.stats.weight_bytes_in - before) / layer


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_nothing_is_fetched_that_is_there(slots: int) -> None:
    """The top layers of forward stay for backward; those that the next forward begins with come under this backward."""
    model = make_model(layers=10)
    optimizer = build(model, CyclicSampler(1, 100, order="ascending"), weights="streamed", weight_slots=slots)
    assert optimizer.active_layers == (0,)
    train(model, optimizer, range(2))
    # layers 1 to 9 pass through in forward and in backward; what is in the slots at either turn is not fetched again
    per_step = 2 * (9 - slots)
    fetched = count_fetches(optimizer, lambda: train(model, optimizer, range(2, 5)))
    assert fetched == 3 * per_step
    with torch.no_grad():
        assert count_fetches(optimizer, lambda: model(input_ids=make_batch(0, vocabulary=61))) == 9


def test_backward_fetches_no_layer_below_the_lowest_active_one() -> None:
    model = make_model(layers=10)
    optimizer = build(model, CyclicSampler(1, 100, order="descending"), weights="streamed")
    assert optimizer.active_layers == (9,)
    train(model, optimizer, range(2))
    assert count_fetches(optimizer, lambda: train(model, optimizer, range(2, 5))) == 3 * 9


# ------------------------------------------------------------------------------------------------ reading and changing


def test_weights_are_read_and_saved_at_any_moment(tmp_path: Any) -> None:
    model, reference = make_model(), make_model()
    optimizer = build(model, weights="streamed", offload="lazy")
    other = build(reference, weights="resident")
    for step in range(9):
        for each in (model, reference):
            backward(each, step, vocabulary=61)
        saved = model.state_dict()  # after backward the lowest layer may still be in its slot
        assert all(torch.equal(tensor, saved[name]) for name, tensor in reference.state_dict().items())
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same(again, reference)


def test_loaded_weights_are_used() -> None:
    model, reference = make_model(), make_model()
    optimizer, other = build(model, weights="streamed"), build(reference, weights="resident")
    changed = {name: tensor * 1.25 for name, tensor in copy.deepcopy(reference.state_dict()).items()}
    for each, its in ((model, optimizer), (reference, other)):
        train(each, its, range(4))
        each.load_state_dict(changed)
        train(each, its, range(4, 7))
    assert_same(model, reference, optimizer)


def test_weights_that_change_in_place_are_fetched_again() -> None:
    model, reference = make_model(), make_model()
    optimizer, other = build(model, weights="streamed"), build(reference, weights="resident")
    for each, its in ((model, optimizer), (reference, other)):
        train(each, its, range(4))
        its.synchronize()
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(1.01)
        train(each, its, range(4, 7))
    assert_same(model, reference, optimizer)


@pytest.mark.parametrize("saved_in", ["resident", "streamed"])
def test_resume_at_every_step(saved_in: Any) -> None:
    whole = make_model()
    optimizer = build(whole, weights=saved_in)
    snapshots = []
    for step in range(9):
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        snapshots.append((copy.deepcopy(whole.state_dict()), buffer.getvalue()))
        train(whole, optimizer, range(step, step + 1))
    for step, (saved_weights, saved_state) in enumerate(snapshots):
        resumed = make_model()
        offload = MODES[step % len(MODES)]
        other = build(resumed, weights="streamed" if step % 2 else "resident", offload=offload)
        resumed.load_state_dict(saved_weights)
        other.load_state_dict(torch.load(io.BytesIO(saved_state), weights_only=True))
        train(resumed, other, range(step, 9))
        assert_same(whole, resumed, optimizer, other)


def test_the_proof_finds_that_exactly_the_active_units_change() -> None:
    model = make_model()
    optimizer = build(model, weights="streamed", offload="lazy")
    proof = optimizer.prove()
    train(model, optimizer, range(16))
    optimizer.synchronize()
    proof.check(last=True)
    assert proof.mistakes == []


def test_another_optimizer_takes_over() -> None:
    def run(model: Any, optimizer: LayerwiseAdamW) -> list[float]:
        seen = train(model, optimizer, range(5))
        seen.append(backward(model, 90, vocabulary=61))  # it is replaced in the middle of a step
        optimizer.zero_grad()
        kind = "streamed" if optimizer.weights.streams else "resident"
        with pytest.warns(UserWarning, match="an earlier LayerwiseAdamW froze"):
            another = build(model, UniformSampler(2, 2), weights=kind)
        seen += train(model, another, range(5))
        another.synchronize()
        return seen

    both(run)


# --------------------------------------------------------------------------------------------------- what goes wrong


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_a_pass_harms_nothing(where: str) -> None:
    model, reference = make_model(), make_model()
    optimizer, other = build(model, weights="streamed", offload="lazy"), build(reference, weights="resident")
    for step in range(7):
        module = model.model.layers[step % LAYERS].mlp
        if where == "forward":
            handle: Any = module.register_forward_pre_hook(_interrupt)
        else:
            handle = module.register_forward_hook(
                lambda module, inputs, output: (
                    output.register_hook(_interrupt) and None if output.requires_grad else None
                )
            )
        try:
            backward(model, 50 + step, vocabulary=61)
        except KeyboardInterrupt:
            pass
        else:
            assert where == "backward"  # it does not reach every layer
        handle.remove()
        optimizer.zero_grad()
        assert train(model, optimizer, range(step, step + 1)) == train(reference, other, range(step, step + 1))
    assert_same(model, reference, optimizer)


def test_an_interrupted_update_is_gone_back_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = make_model(), make_model()
    optimizer = build(model, UniformSampler(2, 5), weights="streamed", offload="lazy")
    other = build(reference, UniformSampler(2, 5), weights="resident")
    train(model, optimizer, range(2))
    saved_weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(streaming, "adamw", _interrupt)
    backward(model, 2, vocabulary=61)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    optimizer.zero_grad()
    model.load_state_dict(saved_weights)
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(2, 8))
    train(reference, other, range(8))
    assert_same(model, reference, optimizer)


def test_what_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(ValueError, match="weights is 'host'; available: resident, streamed"):
        build(make_model(), weights="host")
    with pytest.raises(ValueError, match="weight_slots is 0"):
        build(make_model(), weights="streamed", weight_slots=0)
    compiled = make_model()
    compiled.model.layers[1].compile()
    with pytest.raises(ValueError, match="compiled layers fix it; give weights='resident'"):
        build(compiled, weights="streamed")
    turned = make_model()
    weight = turned.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight: quantised weights, or ones that are not contiguous"):
        build(turned, weights="streamed")


def test_host_memory_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "available_bytes", lambda: 100 * 2**20)
    with pytest.raises(MemoryError, match=r"needs 0 MiB more of host memory, but only 100 MiB are available"):
        host_weights.HostWeights(torch.device("cpu")).take([nn.Parameter(torch.empty(4, device="meta"))])


def test_weights_that_several_layers_or_others_use_stay_on_the_device() -> None:
    model = make_model()
    shared = model.model.layers[0].mlp.up_proj
    model.model.layers[3].mlp.up_proj = shared
    model.extra = model.model.layers[1].mlp.gate_proj
    optimizer = build(make_model())
    stack = build(model).stack
    found = streamable_weights(model, stack, [])
    assert len(found) == len(optimizer.stack.layers)
    assert shared.weight not in {p for layer in found for p in layer}
    assert model.extra.weight not in {p for layer in found for p in layer}
    assert [len(layer) for layer in found] == [8, 8, 9, 8, 9, 9]
    both(
        lambda model, optimizer: train(model, optimizer, range(6)),
        make=lambda: _with_shared_weights(),
        sampler=lambda: UniformSampler(2, 2),
    )


def _with_shared_weights() -> Any:
    model = make_model()
    model.model.layers[3].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


# ------------------------------------------------------------------------------------------------ the hazard checker


def record(mode: Any, slots: int, *, checkpointing: bool = False, without: str | None = None) -> RecordingStreams:
    """A short training with probing and switches, in which every read of a weight is noted, by where it lies."""
    model = make_model()
    if checkpointing:
        recompute_layers(model)
        model.train()
    streams = RecordingStreams(without=without)
    sampler = GradNormSampler(2, 2, probing_steps=2, refresh_period=3, seed=3)
    optimizer = build(
        model, sampler, offload=mode, weights="streamed", weight_slots=slots, streams=streams, chunk_bytes=CHUNK
    )
    own = optimizer.weights
    assert isinstance(own, StreamedWeights)
    size = own._slots[0].memory.nbytes

    def note(module: nn.Module, name: str) -> None:
        place = (module.weight.data_ptr() - own._ring.data_ptr()) // size  # type: ignore[operator]
        memory = ("weight slot", place) if 0 <= place < slots else ("weights", name)
        with streams.on("compute", reads=[memory]):
            pass

    def follow(module: nn.Module, name: str) -> None:
        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            note(module, name)
            if output.requires_grad:
                output.register_hook(lambda gradient: note(module, name))

        module.register_forward_hook(after)

    for unit, layer in zip(optimizer.units, optimizer.stack.modules, strict=True):
        for inner in layer.modules():
            if isinstance(getattr(inner, "weight", None), nn.Parameter):
                follow(inner, unit.name)
    for step in range(12):
        backward(model, step, vocabulary=61)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()
    optimizer.synchronize()
    with streams.on("host", reads=[("host weights", layer) for layer in range(LAYERS)]):
        pass
    return streams


SCENES = [("lazy", 2, False), ("lazy", 3, True), ("resident", 1, False), ("none", 2, True)]
REASONS = {
    "a slot is filled again after a pass has read it",
    "weights are on the device before a pass reads them",
    "weights are on the host before they are read there",
}


@pytest.mark.parametrize(("mode", "slots", "checkpointing"), SCENES)
def test_no_two_accesses_can_collide(mode: Any, slots: int, checkpointing: bool) -> None:
    streams = record(mode, slots, checkpointing=checkpointing)
    assert sum(operation.stream == "weights" for operation in streams.operations) > 30
    assert streams.reasons >= REASONS
    assert not streams.collisions()


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_wait_is_needed(reason: str) -> None:
    """Without any one kind of wait the checker finds a collision."""
    assert record("resident", 2, without=reason).collisions()


def test_weights_are_fetched_while_the_layer_before_is_computed() -> None:
    """With two slots, some fetch does not come after the last computation before it; with one slot each does."""
    free = {}
    for slots in (1, 2):
        operations = record("resident", slots).operations
        computed = [number for number, operation in enumerate(operations) if operation.stream == "compute"]
        free[slots] = sum(
            operation.stream == "weights"
            and bool(earlier := [n for n in computed if n < number])
            and earlier[-1] not in operation.after
            for number, operation in enumerate(operations)
        )
    assert free[2] > free[1]


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def _real_memory(_other_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "StreamedWeights", StreamedWeights)


@pytest.mark.gpu
@pytest.mark.usefixtures("_real_memory")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gpu_streamed_weights_give_the_same_bits_whatever_the_streams_do(mode: Any, checkpointing: bool) -> None:
    """With random delays injected into each stream; the streamed model begins on the host."""
    device = torch.device("cuda")
    models = {}
    for kind in ("resident", "streamed"):
        model = models[kind] = make_model(dtype=torch.bfloat16)
        if checkpointing:
            recompute_layers(model)
        model.train()
        if kind == "resident":
            model.to(device)
        else:
            move_outside_of_layers(model, device)
        optimizer = build(model, offload=mode, weights=kind)
        chance = torch.Generator().manual_seed(0)
        for step in range(24):
            batch = make_batch(step, vocabulary=61).to(device)
            loss = model(input_ids=batch, labels=batch).loss
            if kind == "streamed":
                with optimizer.weights._streams.on("weights"):  # type: ignore[attr-defined]
                    torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=chance)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
    torch.cuda.synchronize()
    for (name, a), b in zip(models["resident"].named_parameters(), models["streamed"].parameters(), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name


@pytest.mark.gpu
@pytest.mark.usefixtures("_real_memory")
def test_gpu_peak_is_the_ring_instead_of_the_frozen_layers() -> None:
    peaks = {}
    for kind in ("resident", "streamed"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = make_llama(hidden=1024, layers=12).bfloat16()
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        if kind == "resident":
            model.cuda()
        else:
            move_outside_of_layers(model, torch.device("cuda"))
        optimizer = build(model, UniformSampler(2, 2), weights=kind, offload="resident")
        batch = make_batch(0, rows=2, tokens=64).cuda()
        for _ in range(8):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        peaks[kind] = torch.cuda.max_memory_allocated()
        assert kind == "resident" or optimizer.weights._host.pinned  # type: ignore[attr-defined]
        del optimizer, model
    # ten frozen layers become two slots
    assert peaks["resident"] - peaks["streamed"] == pytest.approx(8 * layer, rel=0.05)


@pytest.mark.gpu
@pytest.mark.usefixtures("_real_memory")
def test_gpu_step_with_streamed_weights_never_makes_the_host_wait() -> None:
    model = make_model(dtype=torch.bfloat16)
    move_outside_of_layers(model, torch.device("cuda"))
    optimizer = build(model, UniformSampler(2, 100), weights="streamed", offload="lazy", max_grad_norm=1.0)
    batch = make_batch(0, vocabulary=61).cuda()
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
