"""Runs whose model FSDP2 shards over two workers, against one worker that accumulates with the whole model.

All methods run in one set of processes (gloo, which meets in a file): one process imports torch, its forks are the
workers.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import short_run

from grass_ray.config import ConfigError, RunConfig
from grass_ray.methods import METHODS
from grass_ray.optim.sharded import whole
from grass_ray.tasks.inference import lm_head
from grass_ray.training.checks import check_run
from grass_ray.training.run import Run
from grass_ray.training.weights import parameters_sha256

pytestmark = pytest.mark.long

QUICK = ("full", "lisa", "grass", "misa", "lora")
WHOLE = ("galore", "ows-galore", "apollo")
REFUSED = [
    *WHOLE,
    *(name for name, row in METHODS.items() if row.config.adapter is not None and not row.config.adapter.can("shard")),
]
SLOW = [name for name, row in METHODS.items() if row.trains and name not in (*QUICK, *REFUSED)]
TRAINED = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
RESUMED = ("grass", "lora")
EVALUATED = ("full", "lora")
STEPS = 6
SAVED_AFTER = 4
LOSS_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 2e-3  # of how far the weight has travelled


def make_config(method: str, *overrides: str) -> RunConfig:
    defaults = [f"training.steps={STEPS}", "training.batch_size=4", "training.accumulation_steps=4"]
    return short_run(method, *defaults, *overrides)


def follow(method: str, folder: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train, saving on the way where there is a folder; what the run came to."""
    run = Run.prepare(make_config(method), **options)
    model, optimizer = run.state.model, run.state.optimizer
    start = weights_of(model)
    reports = []
    for report in run.fit():
        reports.append(report)
        if folder is not None and report.step == SAVED_AFTER:
            run.save(folder if optimizer.workers.rank == 0 else None)
    if method in EVALUATED:
        run.evaluate()
    outcome = run.outcome()
    held = {p for group in optimizer.param_groups for p in group["params"]}
    rows = [(p.to_local() if hasattr(p, "to_local") else p).numel() for p in held]
    return {
        "start": start,
        "weights": weights_of(model),
        "sha256": run.weights_sha256(),
        "reports": reports,
        "intervals": outcome.layers.intervals,
        "engaged": outcome.layers.only_active_layers_changed,
        "tasks": outcome.tasks,
        "elements": sum(rows),
        "fingerprints": run.state.tracer.state_dict()["fingerprints"],
    }


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------- in the processes


def work(rank: int, folder: str, methods: list[str]) -> None:
    """Everything one worker does; its results go to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    lm_head.CHUNK_POSITIONS, lm_head.CHUNK_BYTES = 16, 0  # several chunks per micro-batch, where one worker takes one
    for method in methods:
        saved = Path(folder) / method
        results[method] = follow(method, saved if method in RESUMED else None, parallel="shard")
        if method in RESUMED:
            dist.barrier()
            for parallel in ("shard", "replicate"):
                run = Run.prepare(make_config(method), parallel=parallel)
                run.restore(saved)
                list(run.fit())
                results[method][f"resumed-{parallel}"] = weights_of(run.state.model)
            run = Run.prepare(make_config(method, "training.gradient_checkpointing=2"), parallel="shard")
            list(run.fit())
            results[method]["recomputed"] = weights_of(run.state.model)
    torch.save(results, f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


def fork_all(folder: str, methods: list[str]) -> None:
    """The two workers."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, folder, methods)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"workers ended with {[worker.exitcode for worker in workers]}")


# ------------------------------------------------------------------------------------------------------ in the tests


@pytest.fixture(scope="module")
def methods(request: pytest.FixtureRequest) -> list[str]:
    return [*QUICK, *(SLOW if request.config.getoption("--slow") else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def workers(folder: Path, methods: list[str]) -> list[dict[str, Any]]:
    """The results of both workers."""
    here = Path(__file__).parent
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_fsdp_runs as t\nt.fork_all(sys.argv[3], sys.argv[4:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (here, here.parent, folder)), *methods],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"worker-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Every method in one process that accumulates all micro-batches."""
    return {method: follow(method) for method in methods}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    moved = False
    for name, weight in expected["weights"].items():
        travelled = (weight - expected["start"][name]).abs().max()
        assert (found[name] - weight).abs().mean() <= WEIGHT_TOLERANCE * travelled, name
        moved = moved or bool(travelled > 0)
    assert moved


@pytest.mark.parametrize("method", TRAINED)
def test_a_sharded_run_is_the_run_of_one_worker(
    method: str, workers: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    """Losses, gradient norms, importance, active sets, the proof of engagement, and weights; dropout included."""
    expected = alone[method]
    for worker in workers:
        found = worker[method]
        assert found["intervals"] == expected["intervals"]
        assert found["engaged"]
        for mine, theirs in zip(found["reports"], expected["reports"], strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=LOSS_TOLERANCE)
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
            assert mine.active_layers == theirs.active_layers
            assert mine.tokens == theirs.tokens
            if theirs.importance is not None:
                assert mine.importance == pytest.approx(theirs.importance, rel=1e-3, nan_ok=True)
        assert_close(found["weights"], expected)
        assert found["elements"] <= 0.51 * expected["elements"]
    mine, other = (worker[method] for worker in workers)
    assert mine["sha256"] == other["sha256"]
    assert mine["fingerprints"] == other["fingerprints"]


def test_the_hash_of_shards_is_that_of_the_whole_weights(workers: list[dict[str, Any]]) -> None:
    model = Run.prepare(make_config("grass")).state.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(workers[0]["grass"]["weights"][name])
    assert workers[0]["grass"]["sha256"] == parameters_sha256(model)


@pytest.mark.parametrize("method", RESUMED)
def test_a_checkpoint_goes_on_sharded_replicated_and_alone(
    method: str, folder: Path, workers: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    """On shards bit for bit; elsewhere to the order of sums."""
    for worker in workers:
        found = worker[method]
        for name, weight in found["weights"].items():
            assert torch.equal(found["resumed-shard"][name], weight), name
        assert_close(found["resumed-replicate"], alone[method])
    run = Run.prepare(make_config(method))
    run.restore(folder / method)
    list(run.fit())
    assert run.outcome().layers.only_active_layers_changed
    assert_close(weights_of(run.state.model), alone[method])


@pytest.mark.parametrize("method", RESUMED)
def test_recomputed_layers_change_no_bit(method: str, workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        for name, weight in worker[method]["weights"].items():
            assert torch.equal(worker[method]["recomputed"][name], weight), name


@pytest.mark.parametrize("method", ["full", "grass", "lisa"])
def test_only_gradients_of_what_trains_are_reduced(method: str, workers: list[dict[str, Any]]) -> None:
    """Twice a step, as each worker has two micro-batches; beside them a few numbers."""
    model = Run.prepare(make_config(method)).state.model
    layer = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    others = sum(4 * p.numel() for p in model.parameters()) - layer * len(model.model.layers)
    for worker in workers:
        for report in worker[method]["reports"]:
            trained = layer * len(report.active_layers) + (others if method != "grass" else 0)
            needed = 0 if report.phase == "probe" else 2 * trained
            assert 0 < report.sent_bytes - needed < 1024


@pytest.mark.parametrize("method", EVALUATED)
def test_every_worker_answers_every_question(
    method: str, workers: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    (expected,) = alone[method]["tasks"].values()
    for worker in workers:
        (found,) = worker[method]["tasks"].values()
        assert found == expected
    assert len(expected.examples) == 4


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_be_sharded_are_refused(method: str) -> None:
    config = make_config(method)
    check_run(config, workers=2)
    with pytest.raises(ConfigError, match=rf"cannot be sharded \(FSDP2\): {method} .*leave --parallel shard out"):
        check_run(config, workers=2, parallel="shard")


def test_one_worker_has_nothing_to_shard_over() -> None:
    with pytest.raises(ConfigError, match="there is one worker, and sharding needs two or more"):
        Run.prepare(make_config("grass"), parallel="shard")
