"""Two workers on half of a batch each against one process that accumulates both halves.

All cases run in one pair of processes (gloo, which meets in a file), as importing torch takes longer than the rest.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import make_batch, make_llama, make_optimizer

from grass_ray import (
    AllLayersSampler,
    Apollo,
    CyclicSampler,
    GradNormSampler,
    LayerwiseAdamW,
    MatrixNormSampler,
    UniformSampler,
)
from grass_ray.optim.data_parallel import Workers

pytestmark = pytest.mark.long

LAYERS = 4
STEPS = 9
CASES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "uniform": lambda: (UniformSampler(1, 3, seed=1), {"train_norm": True}),
    "grad_norm": lambda: (
        GradNormSampler(2, 2, probing_steps=2, refresh_period=3, temperature=0.1),
        {"max_grad_norm": 0.05},
    ),
    "matrix_norm": lambda: (
        MatrixNormSampler(0.2, 2, eta=20.0),
        {"granularity": "matrix", "inactive_states": "reset", "max_grad_norm": 1.0},
    ),
    "cyclic": lambda: (CyclicSampler(1, 1), {"granularity": "block"}),
    "all": lambda: (AllLayersSampler(), {"train_embeddings": True, "train_head": True, "train_norm": True}),
    "lazy": lambda: (UniformSampler(2, 2, seed=1), {"offload": "lazy", "chunk_bytes": 65536, "max_grad_norm": 0.5}),
    "overlap": lambda: (UniformSampler(1, 2, seed=1), {"offload": "overlap", "chunk_bytes": 65536}),
    "apollo": lambda: (UniformSampler(2, 2, seed=1), {"projection": Apollo(rank=4, refresh_period=2)}),
}


def backward_on(model: Any, rows: torch.Tensor, weight: float = 1.0) -> None:
    (weight * model(input_ids=rows, labels=rows).loss).backward()


def follow(case: str, share: Callable[[Any, int], None]) -> dict[str, Any]:
    """Train a case with ``share`` for the passes of a step; what it came to, and what each step sent."""
    sampler, settings = CASES[case]()
    model = make_llama(layers=LAYERS)
    optimizer = make_optimizer(model, sampler, lr=1e-3, weight_decay=0.1, **settings)
    start = [p.detach().clone() for p in model.parameters()]
    said, sent, needed = [], [], []
    for step in range(STEPS):
        active, probing, switches = optimizer.active_units, optimizer.probing, optimizer.switches
        parameters = sum(p.numel() for p in optimizer.active_parameters())
        share(model, step)
        before = sum(traffic)
        optimizer.step()
        optimizer.zero_grad()
        sent.append(sum(traffic) - before)
        # float32 gradients of what trains, a norm a layer where they are measured, two int64 at a switch
        needed.append(
            4 * (0 if probing else parameters)
            + 4 * (LAYERS if case == "grad_norm" else 0)
            + 16 * (optimizer.switches - switches)
        )
        importance = sampler.importance()
        norm = float(optimizer.grad_norm)
        said.append({"active": active, "probing": probing, "importance": importance, "norm": norm})
    weights = [p.detach().clone() for p in model.parameters()]
    return {"start": start, "weights": weights, "said": said, "sent": sent, "needed": needed}


# ----------------------------------------------------------------------------------------------- in the two processes

traffic: list[int] = []


def count_traffic() -> None:
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        traffic.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *arguments, **options)

    dist.all_reduce = counted


def work(rank: int, folder: str) -> None:
    """Everything one worker does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    count_traffic()
    results: dict[str, Any] = {
        case: follow(case, lambda model, step: backward_on(model, make_batch(step)[2 * rank : 2 * rank + 2]))
        for case in CASES
    }
    results["pieces"] = pieces(rank)
    results["disagreeing"] = {name: disagree(seeds[rank]) for name, seeds in SEEDS.items()}
    torch.save(results, f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


def pieces(rank: int) -> dict[str, Any]:
    """Gradients that only one worker has, of two dtypes, and a measurement that only one made."""
    first = torch.nn.Parameter(torch.zeros(3))
    second = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    third = torch.nn.Parameter(torch.zeros(2))
    first.grad = torch.tensor([1.0, 2.0, 3.0]) * (1 + 2 * rank)
    if rank == 0:
        second.grad = torch.full((2, 2), 5.0, dtype=torch.bfloat16)
    else:
        third.grad = torch.tensor([8.0, 10.0])
    workers = Workers()
    before = len(traffic)
    for reduction in workers.start([first, second, third]):
        reduction.wait()
    calls = len(traffic) - before
    measured = workers.average(torch.tensor([1.0 + rank, float("nan") if rank else 7.0]))
    return {
        "gradients": [first.grad, second.grad, third.grad],
        "calls": calls,
        "measured": measured,
        "count": workers.count,
    }


# the first draws of seeds 0 and 1 are equal and their second differ; those of 0 and 2 differ at once
SEEDS = {"later": (0, 1), "at once": (0, 2)}


def make_disagreeing(seed: int) -> UniformSampler:
    return UniformSampler(1, 2, seed=seed)


def disagree(seed: int) -> dict[str, Any]:
    """Train with a seed of its own for up to six steps; the error, and how far it came."""
    model = make_llama(layers=LAYERS)
    before = [p.detach().clone() for p in model.parameters()]
    step = -1
    try:
        optimizer = LayerwiseAdamW(model, make_disagreeing(seed), lr=1e-3)
        for step in range(6):
            backward_on(model, make_batch(step))
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        untouched = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return {"error": str(error), "steps": step + 1, "untouched": untouched}
    return {"error": None, "steps": step + 1, "untouched": False}


# ------------------------------------------------------------------------------------------------------- in the test


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both workers."""
    folder = tmp_path_factory.mktemp("workers")
    here = Path(__file__).parent
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_data_parallel as t\n"
        "t.work(int(sys.argv[3]), sys.argv[4])"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(here), str(here.parent), str(rank), str(folder)],
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


def accumulate(model: Any, step: int) -> None:
    """Both halves in turn, as two micro-batches of half the loss each."""
    batch = make_batch(step)
    backward_on(model, batch[:2], weight=0.5)
    backward_on(model, batch[2:], weight=0.5)


@pytest.mark.parametrize("case", CASES)
def test_two_workers_are_one_process_with_accumulation_bitwise(case: str, workers: list[dict[str, Any]]) -> None:
    """Weights, active sets and gradient norms: with two workers a mean has but one rounding either way.

    The importance is a sum over parameters in another order, so that its last bit may differ; the norm that a probing
    step reports is made of it.
    """
    alone = follow(case, accumulate)
    assert len({str(step["active"]) for step in alone["said"]}) > 1 or case == "all"
    for worker in workers:
        found = worker[case]
        for said, expected in zip(found["said"], alone["said"], strict=True):
            assert said["active"] == expected["active"]
            assert said["norm"] == (pytest.approx(expected["norm"], rel=3e-7) if said["probing"] else expected["norm"])
            if expected["importance"] is not None:
                assert said["importance"] == pytest.approx(expected["importance"], rel=3e-7, nan_ok=True)
        for a, b in zip(found["weights"], alone["weights"], strict=True):
            assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(alone["weights"], alone["start"], strict=True))


def test_importance_is_the_mean_of_the_workers_own_norms(workers: list[dict[str, Any]]) -> None:
    """MGN of a worker is its own batch's: of the halves' gradients, not of their mean."""
    model = make_llama(layers=LAYERS)
    expected = torch.zeros(LAYERS, dtype=torch.float64)
    for step in range(2):
        for half in (slice(0, 2), slice(2, 4)):
            backward_on(model, make_batch(step)[half])
            for index, layer in enumerate(model.model.layers):
                squares = [p.grad.double().square().sum() for p in layer.parameters() if p.grad is not None]
                size = sum(p.numel() for p in layer.parameters())
                expected[index] += (torch.stack(squares).sum() / size).sqrt() / 4
            model.zero_grad()
    for worker in workers:
        assert worker["grad_norm"]["said"][1]["importance"] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_frozen_layers_cause_no_traffic(case: str, workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert worker[case]["sent"] == worker[case]["needed"]
    if case in ("uniform", "cyclic", "matrix_norm"):
        everything = 4 * sum(p.numel() for p in make_llama(layers=LAYERS).parameters())
        assert max(worker[case]["sent"]) < 0.3 * everything


def test_a_gradient_that_one_worker_lacks_counts_as_zeros(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        first, second, third = worker["pieces"]["gradients"]
        assert first.tolist() == [2.0, 4.0, 6.0]
        assert second.dtype == torch.bfloat16
        assert second.tolist() == [[2.5, 2.5], [2.5, 2.5]]
        assert third.tolist() == [4.0, 5.0]
        assert worker["pieces"]["calls"] == 2, "one a dtype"
        assert worker["pieces"]["count"] == 2


def test_a_measurement_that_one_worker_lacks_is_unknown_to_all(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        measured = worker["pieces"]["measured"]
        assert measured[0] == 1.5
        assert measured[1].isnan()


def first_draws(seed: int) -> list[tuple[int, ...]]:
    sampler = make_disagreeing(seed)
    sampler.start([1] * LAYERS)
    return [sampler.sample() for _ in range(2)]


def test_workers_with_different_seeds_are_told(workers: list[dict[str, Any]]) -> None:
    """At the first switch at which they would part, and both of them."""
    mine, yours = map(first_draws, SEEDS["later"])
    assert mine[0] == yours[0]
    assert mine[1] != yours[1]
    for worker, draws in zip(workers, (mine, yours), strict=True):
        found = worker["disagreeing"]["later"]
        assert found["error"] == (
            f"the 2 workers disagree about the active layers (here: {list(draws[1])}); give every worker's sampler "
            "the same seed and settings"
        )
        assert found["steps"] == 2


def test_workers_that_part_from_the_start_never_mix_gradients(workers: list[dict[str, Any]]) -> None:
    mine, yours = map(first_draws, SEEDS["at once"])
    assert mine[0] != yours[0]
    for worker in workers:
        found = worker["disagreeing"]["at once"]
        assert "the 2 workers disagree about the active layers" in str(found["error"])
        assert found["untouched"]


def test_one_process_is_one_worker_without_traffic() -> None:
    alone = Workers()
    alone.check_agreement((0, 1))
    assert alone.count == 1
    values = torch.tensor([1.0])
    assert alone.average(values) is values
