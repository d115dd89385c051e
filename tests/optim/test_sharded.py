"""A model that FSDP2 shards over two workers, against the same model whole in one process that accumulates.

All cases run in one pair of processes (gloo, which meets in a file), as importing torch takes longer than the rest.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import make_batch, make_llama, make_optimizer, recompute_layers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from grass_ray import (
    AllLayersSampler,
    Apollo,
    CyclicSampler,
    GaLore,
    GradNormSampler,
    LayerwiseAdamW,
    MatrixNormSampler,
    UniformSampler,
)
from grass_ray.optim.recompute import Recompute

pytestmark = pytest.mark.long

LAYERS = 4
STEPS = 9
RESUMED_AFTER = (1, 2, 3, 5, 6)
MODES = ("none", "resident", "blocking", "overlap", "lazy")
ENDS = {"train_embeddings": True, "train_head": True, "train_norm": True}


def make_grass() -> Any:
    return GradNormSampler(2, 2, probing_steps=2, refresh_period=3, temperature=0.1)


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "full": lambda: (AllLayersSampler(), ENDS),
    "lisa": lambda: (UniformSampler(1, 3, seed=1), {**ENDS, "inactive_states": "reset"}),
    "lisa-keep": lambda: (UniformSampler(2, 2, seed=1), {**ENDS, "max_grad_norm": 0.5}),
    "tied": lambda: (UniformSampler(1, 3, seed=1), {"train_embeddings": True}),
    "grass-static": lambda: (GradNormSampler(2, 2, probing_steps=2, refresh_period=None, temperature=0.1), {}),
    "badam": lambda: (CyclicSampler(1, 2, order="random"), {"inactive_states": "reset"}),
    "hift": lambda: (CyclicSampler(1, 1), {"granularity": "block"}),
    "misa": lambda: (
        MatrixNormSampler(0.2, 2, eta=20.0),
        {"granularity": "matrix", "inactive_states": "reset", "max_grad_norm": 1.0},
    ),
    **{
        f"grass-{mode}": lambda mode=mode: (
            make_grass(),
            {"max_grad_norm": 0.05, "offload": mode, "chunk_bytes": 65536},
        )
        for mode in MODES
    },
}
# of sums in another order: the gradients' means have one rounding either way, their norms have not
NORM_TOLERANCE = 1e-6
# of weights that travel 7e-3: Adam divides small gradients by their own size, and so lets last bits grow
WEIGHT_TOLERANCE = 5e-6


class Block(nn.Module):
    """Rows that two workers cannot share evenly, and a row that only one can have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 7))
        self.linear = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x * self.scale).tanh()


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(7, 11)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss})


def make_odd_batch(step: int) -> torch.Tensor:
    return make_batch(step, vocabulary=11)


# ------------------------------------------------------------------------------------------------------ one training


def shard(model: Any, blocks: Any, **options: Any) -> Any:
    for layer in blocks:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights_of(model: Any) -> list[torch.Tensor]:
    return [whole(p) for p in model.parameters()]


def backward_on(model: Any, rows: torch.Tensor, weight: float = 1.0) -> float:
    loss = model(input_ids=rows, labels=rows).loss
    (weight * loss).backward()
    return float(loss.detach())


def train(model: Any, optimizer: LayerwiseAdamW, share: Callable[[Any, int], float], steps: range) -> list[Any]:
    """What every step said: active units, gradient norm, importance and loss."""
    said = []
    for step in steps:
        active, probing = optimizer.active_units, optimizer.probing
        loss = share(model, step)
        optimizer.step()
        optimizer.zero_grad()
        norm = float(optimizer.grad_norm)
        importance = optimizer.sampler.importance()
        said.append({"active": active, "probing": probing, "norm": norm, "importance": importance, "loss": loss})
    optimizer.synchronize()
    return said


def make(case: str, *, sharded: bool, **options: Any) -> tuple[Any, LayerwiseAdamW]:
    sampler, settings = CASES[case]()
    model = make_llama(layers=LAYERS, tied=case == "tied")
    if sharded:
        shard(model, model.model.layers)
    return model, make_optimizer(model, sampler, lr=1e-3, weight_decay=0.1, **settings, **options)


def follow(case: str, share: Callable[[Any, int], float], *, sharded: bool) -> dict[str, Any]:
    model, optimizer = make(case, sharded=sharded)
    start = weights_of(model)
    said = train(model, optimizer, share, range(STEPS))
    return {"start": start, "weights": weights_of(model), "said": said, "state": optimizer.state_dict()}


def in_halves(model: Any, step: int, make_rows: Callable[[int], torch.Tensor] = make_batch) -> float:
    """Both halves of a batch as two micro-batches of half the loss each."""
    batch = make_rows(step)
    losses = [backward_on(model, batch[:2], 0.5), backward_on(model, batch[2:], 0.5)]
    return sum(losses) / 2


# ----------------------------------------------------------------------------------------------- in the two processes


def work(rank: int, folder: str) -> None:
    """Everything one worker does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)

    def share(model: Any, step: int) -> float:
        loss = torch.tensor(backward_on(model, make_batch(step)[mine]))
        dist.all_reduce(loss)
        return float(loss) / 2

    results: dict[str, Any] = {case: follow(case, share, sharded=True) for case in CASES}
    results["full_states"] = full_states(share)
    results["resumed"] = {case: resume(case, share) for case in ("grass-resident", "grass-lazy", "lisa", "misa")}
    results["traffic"] = {case: traffic(case, mine) for case in ("grass-resident", "badam")}
    results["probing"] = gradients_while_probing(share)
    results["odd"] = odd(mine)
    results["precision"] = {name: half_precision(name, mine) for name in ("weights", "rem16", "exact", "int8")}
    results["mixed"] = mixed_precision(share)
    results["checkpointed"] = checkpointed(share)
    results["kept"] = kept(share)
    results["accumulated"] = {f"{sync}": accumulated(rank, sync=sync) for sync in (True, False)}
    results["summed"] = summed(mine)
    results["not_finite"] = not_finite(rank, share)
    results["refused"] = refusals(rank)
    torch.save(results, f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


def full_states(share: Callable[[Any, int], float]) -> dict[str, Any]:
    """A state made whole, given to others."""
    model, optimizer = make("grass-overlap", sharded=True)
    train(model, optimizer, share, range(6))
    weights, full = weights_of(model), optimizer.full_state_dict()
    own = optimizer.state_dict()
    exported = optimizer.adamw_state_dict()
    untouched = optimizer.state_dict()
    # every worker loads the first one's
    everywhere = [full]
    dist.broadcast_object_list(everywhere)
    again, other = make("grass-lazy", sharded=True)
    with torch.no_grad():
        for parameter, weight in zip(again.parameters(), weights, strict=True):
            parameter.to_local().copy_(other._sync._shards.own_rows(weight))
    other.load_state_dict(everywhere[0])
    train(again, other, share, range(6, STEPS))
    return {
        "weights": weights,
        "full": full,
        "own": own,
        "untouched": untouched,
        "exported": exported,
        "went_on": weights_of(again),
    }


def resume(case: str, share: Callable[[Any, int], float]) -> dict[str, Any]:
    """Each worker goes on from its own state: while probing, at and between switches and refreshes."""
    results = {}
    for at in RESUMED_AFTER:
        model, optimizer = make(case, sharded=True)
        train(model, optimizer, share, range(at))
        saved = {"weights": [p.to_local().clone() for p in model.parameters()], "optimizer": optimizer.state_dict()}
        model, optimizer = make(case, sharded=True)
        with torch.no_grad():
            for parameter, rows in zip(model.parameters(), saved["weights"], strict=True):
                parameter.to_local().copy_(rows)
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, share, range(at, STEPS))
        results[at] = {"weights": weights_of(model), "state": optimizer.state_dict()}
    return results


class Collectives(TorchDispatchMode):
    """Notes every collective on tensors inside the block: its name, and how many elements went in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        if func.namespace == "c10d":
            tensors = args[1] if isinstance(args[1], torch.Tensor) else torch.empty(0)
            self.calls.append((func._schema.name.removeprefix("c10d::"), tensors.numel()))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[int]:
        return [elements for called, elements in self.calls if name in called]


def traffic(case: str, mine: slice) -> list[dict[str, Any]]:
    """Gradients that were reduced in every step, and weights that were gathered."""
    model, optimizer = make(case, sharded=True)
    said = []
    for step in range(STEPS):
        needed = sum(p.numel() for p in optimizer.active_parameters())
        layers, probing = optimizer.active_layers, optimizer.probing
        with Collectives() as collectives:
            backward_on(model, make_batch(step)[mine])
        optimizer.step()
        optimizer.zero_grad()
        reduced, gathered = collectives.of("reduce_scatter"), len(collectives.of("allgather"))
        said.append({"reduced": reduced, "gathered": gathered, "needed": needed, "layers": layers, "probing": probing})
    return said


def gradients_while_probing(share: Callable[[Any, int], float]) -> dict[str, Any]:
    """The most gradient elements that were alive at once, in a probing step and in one that trains all."""
    most = {}
    for case in ("grass-resident", "full"):
        model, optimizer = make(case, sharded=True)
        alive = [0]

        def look(*_: Any, model: Any = model, alive: list[int] = alive) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            alive[0] = max(alive[0], sum(g.numel() for g in gradients))

        for module in model.model.layers.modules():
            module.register_full_backward_hook(look)
        share(model, 0)
        look()
        most[case] = alive[0]
        optimizer.step()
    return most


def odd(mine: slice) -> dict[str, Any]:
    """Uneven rows and empty shards, in every mode; the memory, and the states made whole."""

    def share(model: Any, step: int) -> float:
        return backward_on(model, make_odd_batch(step)[mine])

    results = {}
    for mode in MODES:
        model = Odd()
        shard(model, model.blocks)
        optimizer = make_optimizer(
            model,
            UniformSampler(1, 2, seed=1),
            lr=1e-2,
            offload=mode,
            chunk_bytes=65536,
            max_grad_norm=0.1,
            train_head=True,
        )
        train(model, optimizer, share, range(STEPS))
        full = optimizer.full_state_dict()
        results[mode] = {"weights": weights_of(model), "state": full.get("state"), "bytes": optimizer.state_bytes()}
    return results


def half_precision(precision: str, mine: slice) -> dict[str, Any]:
    """Bfloat16 weights, with and without what stays of a master copy."""
    model = make_llama(layers=LAYERS).bfloat16()
    shard(model, model.model.layers)
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2, seed=1), lr=1e-3, precision=precision)
    train(model, optimizer, lambda model, step: backward_on(model, make_batch(step)[mine]), range(STEPS))
    own, full = optimizer.state_dict(), optimizer.full_state_dict()
    everywhere = [full]
    dist.broadcast_object_list(everywhere)
    optimizer.load_state_dict(everywhere[0])
    again = optimizer.state_dict()
    return {"weights": weights_of(model), "state": full.get("state"), "own": (own["state"], again["state"])}


def mixed_precision(share: Callable[[Any, int], float]) -> dict[str, Any]:
    """Layers that are frozen at the first forward, where FSDP2 decides on the dtype of gradients, thaw later."""
    model = make_llama(layers=LAYERS)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, model.model.layers, mp_policy=policy)
    optimizer = LayerwiseAdamW(model, CyclicSampler(1, 2), lr=1e-3)
    dtypes, changed = set(), []
    for step in range(2 * LAYERS):
        before = weights_of(model)
        active = set(optimizer.active_parameters())
        share(model, step)
        dtypes |= {p.grad.dtype for p in active}
        optimizer.step()
        optimizer.zero_grad()
        pairs = zip(model.parameters(), before, weights_of(model), strict=True)
        changed.append(all((p in active) == bool((old != new).any()) for p, old, new in pairs))
    return {"dtypes": dtypes, "only_active_changed": all(changed)}


def checkpointed(share: Callable[[Any, int], float]) -> list[torch.Tensor]:
    """Activations computed again in backward."""
    model, optimizer = make("grass-resident", sharded=True)
    recompute_layers(model)
    model.train()
    train(model, optimizer, share, range(STEPS))
    return weights_of(model)


def kept(share: Callable[[Any, int], float]) -> dict[str, Any]:
    """Nothing computed again in backward, probing steps included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recompute, "switch", lambda self, on: None)
        return follow("grass-resident", share, sharded=True)


def accumulated(rank: int, *, sync: bool) -> dict[str, Any]:
    """Two micro-batches a worker, reduced one by one or together."""

    def share(model: Any, step: int) -> float:
        rows = make_batch(step, rows=8)[4 * rank : 4 * rank + 4]
        model.set_requires_gradient_sync(sync)
        backward_on(model, rows[:2])
        model.set_requires_gradient_sync(True)
        return backward_on(model, rows[2:])

    model, optimizer = make("grass-resident", sharded=True)
    said = train(model, optimizer, share, range(STEPS))
    return {"weights": weights_of(model), "said": said}


def summed(mine: slice) -> list[Any]:
    model, optimizer = make("lisa-keep", sharded=True, gradient_reduction="sum")
    return train(model, optimizer, lambda model, step: backward_on(model, make_batch(step)[mine]), range(2))


def not_finite(rank: int, share: Callable[[Any, int], float]) -> dict[str, Any]:
    """One worker's rows of one gradient have a NaN."""
    model, optimizer = make("full", sharded=True)
    train(model, optimizer, share, range(2))
    before, state = weights_of(model), optimizer.full_state_dict()
    share(model, 2)
    if rank == 1:
        model.model.layers[0].mlp.up_proj.weight.grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    return {
        "norm": float(optimizer.grad_norm),
        "weights": [before, weights_of(model)],
        "states": [state, optimizer.full_state_dict()],
    }


def refusals(rank: int) -> dict[str, str]:
    """Messages of what cannot work."""
    messages = {}

    def refuse(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)

    def sharded_llama(**options: Any) -> Any:
        model = make_llama(layers=LAYERS)
        return shard(model, model.model.layers, **options)

    uniform = UniformSampler(1, 3, seed=1)
    refuse("galore", lambda: make_optimizer(sharded_llama(), uniform, projection=GaLore(rank=4)))
    refuse("apollo", lambda: make_optimizer(sharded_llama(), uniform, projection=Apollo(rank=4)))
    hybrid = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    refuse("hybrid", lambda: LayerwiseAdamW(sharded_llama(mesh=hybrid), uniform))
    columns = {"shard_placement_fn": lambda p: Shard(p.ndim - 1)}
    refuse("columns", lambda: LayerwiseAdamW(sharded_llama(**columns), uniform))
    layers_only = make_llama(layers=LAYERS)
    for layer in layers_only.model.layers:
        fully_shard(layer)
    refuse("partly", lambda: make_optimizer(layers_only, uniform, train_head=True))
    alone = [dist.new_group([index]) for index in range(2)]
    refuse("group", lambda: make_optimizer(sharded_llama(), uniform, process_group=alone[rank]))
    refuse("seeds", lambda: LayerwiseAdamW(sharded_llama(), UniformSampler(1, 2, seed=2 * rank)))
    _, optimizer = make("lisa", sharded=True)
    state = optimizer.state_dict()
    state["layerwise"]["shard"] = {"rank": 1 - rank, "count": 2}
    refuse("rank", lambda: optimizer.load_state_dict(state))
    state["layerwise"]["shard"] = {"rank": rank, "count": 4}
    refuse("count", lambda: optimizer.load_state_dict(state))
    _, unsharded = make("lisa", sharded=False, process_group=alone[rank])
    refuse("unsharded", lambda: unsharded.load_state_dict(optimizer.state_dict()))
    late = make_llama(layers=LAYERS)
    optimizer = LayerwiseAdamW(late, UniformSampler(1, 3, seed=1))
    shard(late, late.model.layers)
    backward_on(late, make_batch(0))
    refuse("late", optimizer.step)
    return messages


# ------------------------------------------------------------------------------------------------------- in the test


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both workers."""
    folder = tmp_path_factory.mktemp("workers")
    here = Path(__file__).parent
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_sharded as t\nt.work(int(sys.argv[3]), sys.argv[4])"
    started = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code, str(here), str(here.parent), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"worker-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Every case whole, in one process."""
    return {case: follow(case, in_halves, sharded=False) for case in CASES}


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(first, second, strict=True))


def same_tensors(first: dict[Any, dict[str, torch.Tensor]], second: dict[Any, dict[str, torch.Tensor]]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].keys() == second[key].keys()
        and all(torch.equal(value, second[key][name]) for name, value in first[key].items())
        for key in first
    )


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_train_as_whole_ones(
    case: str, workers: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    """Active sets, losses, norms, importance and weights; bitwise where no gradient is clipped.

    A norm is a sum over workers, whose last bit may differ, and clipping puts it into every gradient.
    """
    expected = alone[case]
    assert len({str(step["active"]) for step in expected["said"]}) > 1 or case == "full"
    for worker in workers:
        found = worker[case]
        for said, other in zip(found["said"], expected["said"], strict=True):
            assert (said["active"], said["probing"]) == (other["active"], other["probing"])
            assert said["norm"] == pytest.approx(other["norm"], rel=NORM_TOLERANCE)
            assert said["loss"] == pytest.approx(other["loss"], rel=NORM_TOLERANCE)
            if other["importance"] is not None:
                assert said["importance"] == pytest.approx(other["importance"], rel=NORM_TOLERANCE, nan_ok=True)
        if case == "lisa-keep" or (case.startswith("grass-") and case != "grass-static"):
            assert distance(found["weights"], expected["weights"]) < WEIGHT_TOLERANCE
        else:
            assert all_equal(found["weights"], expected["weights"])
    assert distance(expected["weights"], expected["start"]) > 100 * WEIGHT_TOLERANCE


@pytest.mark.parametrize("case", ["full", "lisa", "tied", "grass-static", "badam", "hift", "misa"])
def test_states_are_the_rows_of_whole_states(
    case: str, workers: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    """Bitwise, and every worker's half of the rows only."""
    whole_states = alone[case]["state"]["state"]
    assert whole_states
    mine, other = (worker[case]["state"] for worker in workers)
    assert (mine["layerwise"]["shard"], other["layerwise"]["shard"]) == (
        {"rank": 0, "count": 2},
        {"rank": 1, "count": 2},
    )
    assert mine["state"].keys() == other["state"].keys() == whole_states.keys()
    for index, state in whole_states.items():
        for name, tensor in state.items():
            parts = [mine["state"][index][name], other["state"][index][name]]
            if name == "step":
                assert parts[0] == parts[1] == tensor
            else:
                assert len(parts[0]) == len(parts[1])
                assert torch.equal(torch.cat(parts), tensor)


def test_every_offload_mode_gives_the_same_bits(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        first = worker[f"grass-{MODES[0]}"]
        for mode in MODES[1:]:
            assert all_equal(worker[f"grass-{mode}"]["weights"], first["weights"])
            assert same_tensors(worker[f"grass-{mode}"]["state"]["state"], first["state"]["state"])
        first = worker["odd"][MODES[0]]
        for mode in MODES[1:]:
            assert all_equal(worker["odd"][mode]["weights"], first["weights"])
            assert first["state"] is None or same_tensors(worker["odd"][mode]["state"], first["state"])


def test_rows_that_cannot_be_shared_evenly(workers: list[dict[str, Any]]) -> None:
    """Seven rows, of which one worker has four, and a single row, of which one worker has nothing."""
    model = Odd()
    start = weights_of(model)
    optimizer = make_optimizer(
        model, UniformSampler(1, 2, seed=1), lr=1e-2, offload="none", max_grad_norm=0.1, train_head=True
    )
    train(model, optimizer, lambda model, step: in_halves(model, step, make_odd_batch), range(STEPS))
    expected = optimizer.state_dict()["state"]
    for worker in workers:
        assert distance(worker["odd"]["none"]["weights"], weights_of(model)) < WEIGHT_TOLERANCE
    assert distance(weights_of(model), start) > 1000 * WEIGHT_TOLERANCE
    found = workers[0]["odd"]["none"]["state"]
    assert found.keys() == expected.keys()
    for index, state in expected.items():
        for name, tensor in state.items():
            assert found[index][name].shape == tensor.shape
            assert torch.allclose(found[index][name], tensor, rtol=1e-4, atol=1e-7)
    sizes = [worker["odd"]["none"]["bytes"][0] for worker in workers]
    assert sum(sizes) == optimizer.state_bytes()[0]


@pytest.mark.parametrize("case", ["grass-resident", "grass-lazy", "lisa", "misa"])
def test_each_worker_goes_on_from_its_own_state_bitwise(case: str, workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert tuple(worker["resumed"][case]) == RESUMED_AFTER
        for at, resumed in worker["resumed"][case].items():
            assert all_equal(resumed["weights"], worker[case]["weights"]), at
            assert same_tensors(resumed["state"]["state"], worker[case]["state"]["state"]), at


def test_a_whole_state_goes_on_sharded_and_alone(
    workers: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    first, second = (worker["full_states"] for worker in workers)
    assert second["full"] == second["exported"] == {}
    for worker in workers:
        assert all_equal(worker["full_states"]["went_on"], worker["grass-lazy"]["weights"])
        assert same_tensors(worker["full_states"]["untouched"]["state"], worker["full_states"]["own"]["state"])
    for index, state in first["full"]["state"].items():
        halves = [part["own"]["state"][index] for part in (first, second)]
        assert torch.equal(state["exp_avg"], torch.cat([half["exp_avg"] for half in halves]))
        assert torch.equal(state["exp_avg"], first["exported"]["state"][index]["exp_avg"])
    assert "layerwise" not in first["exported"]
    model, optimizer = make("grass-resident", sharded=False)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), first["weights"], strict=True):
            parameter.copy_(weight)
    optimizer.load_state_dict(first["full"])
    train(model, optimizer, in_halves, range(6, STEPS))
    assert distance(weights_of(model), alone["grass-resident"]["weights"]) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("case", ["grass-resident", "badam"])
def test_frozen_layers_are_neither_reduced_nor_gathered_for_backward(case: str, workers: list[dict[str, Any]]) -> None:
    """Only gradients of what trains are reduced, and while probing none at all."""
    for worker in workers:
        seen = worker["traffic"][case]
        assert {step["probing"] for step in seen} == ({True, False} if case == "grass-resident" else {False})
        for step in seen:
            assert sum(step["reduced"]) == (0 if step["probing"] else step["needed"])
            assert len(step["reduced"]) == (0 if step["probing"] else len(step["layers"]))
            lowest = min(step["layers"])
            # a forward gathers all layers and the rest; backward those it goes through, and FSDP2 fetches one ahead
            assert step["gathered"] == LAYERS + 1 + LAYERS - lowest + (lowest > 0)
    if case == "badam":
        assert len({min(step["layers"]) for step in workers[0]["traffic"][case]}) == LAYERS


def test_probing_holds_no_gradient(workers: list[dict[str, Any]]) -> None:
    everything = sum(p.numel() for p in make_llama(layers=LAYERS).parameters())
    layer = sum(p.numel() for p in make_llama(layers=LAYERS).model.layers[0].parameters())
    for worker in workers:
        assert worker["probing"]["grass-resident"] < layer
        assert worker["probing"]["full"] == everything, "seen where they are kept"


@pytest.mark.parametrize("precision", ["weights", "rem16", "exact", "int8"])
def test_bfloat16_weights(precision: Any, workers: list[dict[str, Any]]) -> None:
    """Every worker has the same whole weights, close to those of one process; states gather in any dtype."""
    model = make_llama(layers=LAYERS).bfloat16()
    start = weights_of(model)
    optimizer = LayerwiseAdamW(model, UniformSampler(2, 2, seed=1), lr=1e-3, precision=precision)
    train(model, optimizer, in_halves, range(STEPS))
    expected = optimizer.state_dict()["state"]
    mine, other = (worker["precision"][precision] for worker in workers)
    assert all_equal(mine["weights"], other["weights"])
    travelled = distance(weights_of(model), start)
    assert distance(mine["weights"], weights_of(model)) <= 0.3 * travelled
    for index, state in expected.items():
        assert state.keys() == mine["state"][index].keys()
        for name, tensor in state.items():
            assert (mine["state"][index][name].shape, mine["state"][index][name].dtype) == (tensor.shape, tensor.dtype)
    # made whole, and taken apart again
    for worker in workers:
        assert same_tensors(*worker["precision"][precision]["own"])


def test_layers_frozen_at_the_first_forward_thaw_with_gradients_of_the_right_dtype(
    workers: list[dict[str, Any]],
) -> None:
    for worker in workers:
        assert worker["mixed"] == {"dtypes": {torch.float32}, "only_active_changed": True}


def test_activation_checkpointing_changes_nothing(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert all_equal(worker["checkpointed"], worker["grass-resident"]["weights"])


def test_probing_with_layers_computed_again_measures_the_same_bits(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert repr(worker["kept"]["said"]) == repr(worker["grass-resident"]["said"])
        assert all_equal(worker["kept"]["weights"], worker["grass-resident"]["weights"])


@pytest.mark.parametrize("sync", ["True", "False"])
def test_micro_batches_of_a_worker(sync: str, workers: list[dict[str, Any]]) -> None:
    """Two on each worker are four in one process; the importance is their mean, however they are reduced."""

    def in_quarters(model: Any, step: int) -> float:
        batch = make_batch(step, rows=8)
        return [backward_on(model, batch[place : place + 2], 0.5) for place in range(0, 8, 2)][-1]

    model, optimizer = make("grass-resident", sharded=False)
    expected = train(model, optimizer, in_quarters, range(STEPS))
    for worker in workers:
        found = worker["accumulated"][sync]
        for said, other in zip(found["said"], expected, strict=True):
            assert said["active"] == other["active"]
            assert said["norm"] == pytest.approx(other["norm"], rel=NORM_TOLERANCE)
            assert said["importance"] == pytest.approx(other["importance"], rel=NORM_TOLERANCE, nan_ok=True)
        assert distance(found["weights"], weights_of(model)) < WEIGHT_TOLERANCE


def test_a_sum_is_the_mean_times_the_workers(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        summed_norm, mean_norm = worker["summed"][0]["norm"], worker["lisa-keep"]["said"][0]["norm"]
        assert summed_norm == pytest.approx(2 * mean_norm, rel=NORM_TOLERANCE)


def test_a_gradient_that_is_not_finite_on_one_worker_changes_nothing_on_any(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        found = worker["not_finite"]
        assert found["norm"] != found["norm"]
        assert all_equal(*found["weights"])
    before, after = workers[0]["not_finite"]["states"]
    assert same_tensors(before["state"], after["state"])


REFUSED = {
    "galore": "GaLore updates whole matrices, and FSDP2 leaves a worker some rows of each",
    "apollo": "Apollo updates whole matrices",
    "hybrid": "mesh of shape (2, 1), one of 1 layouts; layer-wise training works with FSDP2 over one mesh",
    "columns": "one of 2 layouts; layer-wise training works with FSDP2 over one mesh of one dimension, sharded by rows",
    "partly": "1 parameters that train are not sharded (lm_head.weight), while others are; give the whole model to",
    "group": "but the model is sharded over [0, 1]; leave process_group out",
    "seeds": "the 2 workers disagree about the active layers",
    "late": "sharded (fully_shard) after the optimizer was built, which still has the old weights; shard the model",
    "count": "of 4, and this is worker",
    "unsharded": "of 2, and this model is not sharded; full_state_dict() makes a state for any number of workers",
}


@pytest.mark.parametrize("what", [*REFUSED, "rank"])
def test_what_cannot_work_is_refused(what: str, workers: list[dict[str, Any]]) -> None:
    for rank, worker in enumerate(workers):
        expected = REFUSED.get(what, f"the rows of worker {1 - rank} of 2, and this is worker {rank} of 2")
        assert expected in worker["refused"][what]


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def _one_gpu(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("precision", ["weights", "rem16", "exact", "int8"])
@pytest.mark.parametrize("mode", ["resident", "blocking", "overlap", "lazy"])
def test_gpu_shards_train_as_the_whole_model_whatever_the_streams_do(mode: Any, precision: Any) -> None:
    """FSDP2 gathers weights on streams of its own, which must wait for updates; random delays hold these back."""
    models = []
    for sharded in (False, True):
        model = make_llama(layers=LAYERS).bfloat16().cuda()
        if sharded:
            shard(model, model.model.layers)
        optimizer = make_optimizer(
            model,
            GradNormSampler(2, 3, probing_steps=2, refresh_period=4),
            lr=1e-3,
            precision=precision,
            offload=mode if sharded else "none",
            chunk_bytes=65536,
            ring_slots=2,
        )
        chance = torch.Generator().manual_seed(0)
        for step in range(30):
            backward_on(model, make_batch(step).cuda())
            if sharded and mode in ("overlap", "lazy"):
                for name in ("fetch", "update", "write"):
                    with optimizer._placement.streams.on(name):
                        torch.cuda._sleep(int(torch.randint(0, 2_000_000, (), generator=chance)))
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        torch.cuda.synchronize()
        models.append(weights_of(model))
    assert all_equal(*models)
