"""Runs shared by two and by four workers against one worker that accumulates: the number of workers changes nothing.

All methods of a group size run in one set of processes (gloo, which meets in a file): one process imports torch and
its forks are the workers.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import short_run

from grass_ray.config import ConfigError, RunConfig
from grass_ray.memory.fit import real_shape
from grass_ray.memory.plan import Planner
from grass_ray.methods import METHODS
from grass_ray.training.checks import check_run
from grass_ray.training.loss import accumulate_gradients
from grass_ray.training.report import GIB
from grass_ray.training.run import Run

pytestmark = pytest.mark.long

# one of each kind of sampler, adapter and state; the others only with --slow
QUICK = ("full", "lora", "ist", "misa", "apollo", "grass")
SLOW = [name for name, row in METHODS.items() if row.trains and name not in QUICK]
METHODS_THAT_TRAIN = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SIZES = (2, pytest.param(4, marks=pytest.mark.slow))
STEPS = 5
ALWAYS_ALIKE = ("full", "lora", "prefix", "prompt")  # every step takes the same memory
RESUMED = ("full", "lora", "ist", "grass")
EVALUATED = ("full", "lora")
# Float32 sums in another order; Adam divides small gradients by their own size, and so lets a few last bits of a
# gradient grow to this much of a weight's step.
LOSS_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 2e-3
SAVED_AFTER = 3


def make_config(method: str) -> RunConfig:
    return short_run(method, f"training.steps={STEPS}", "training.batch_size=4", "training.accumulation_steps=4")


def follow(method: str, folder: Path | None = None) -> dict[str, Any]:
    """Train, saving on the way where there is a folder; what the run came to."""
    run = Run.prepare(make_config(method))
    start = {name: p.detach().clone() for name, p in run.state.model.named_parameters()}
    reports = []
    for report in run.fit():
        reports.append(report)
        if folder is not None and report.step == SAVED_AFTER and dist.get_rank() == 0:
            run.save(folder)
    if method in EVALUATED:
        run.evaluate()
    optimizer = run.state.optimizer
    active = {unit for _, units in run.state.tracer.trace.intervals for unit in units}
    return {
        "start": start,
        **outcome_of(run),
        "reports": reports,
        "tasks": run.outcome().tasks,
        "unit_bytes": {unit: 4 * optimizer.units[unit].size for unit in active},
        "constant_bytes": sum(4 * unit.size for unit in optimizer.constant_units),
        "full_bytes": sum(4 * p.numel() for p in run.state.model.parameters()),
        "described": run.state.tracer.trace.describe(),
    }


def outcome_of(run: Run) -> dict[str, Any]:
    layers = run.state.tracer.trace
    weights = {name: p.detach().clone() for name, p in run.state.model.named_parameters()}
    return {
        "weights": weights,
        "intervals": layers.intervals,
        "engaged": layers.only_active_layers_changed,
        "series": run.state.series,
    }


# ------------------------------------------------------------------------------------------------- in the processes


def work(rank: int, size: int, folder: str, methods: list[str]) -> None:
    """Everything one worker does; its results go to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{size}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for method in methods:
        saved = Path(folder) / f"{method}-{size}"
        results[method] = follow(method, saved if method in RESUMED else None)
        if method in RESUMED:
            dist.barrier()
            run = Run.prepare(make_config(method))
            run.restore(saved)
            list(run.fit())
            results[method]["resumed"] = outcome_of(run)["weights"]
    if size == 2:
        results["early"] = {method: sent_before_the_step(method) for method in ("full", "lora", "grass", "misa")}
    torch.save(results, f"{folder}/worker-{size}-{rank}.pt")
    dist.destroy_process_group()


def sent_before_the_step(method: str) -> dict[str, int]:
    """Bytes on their way when the backward passes of a training step are over."""
    sent = {}
    for name in ("told", "untold"):
        run = Run.prepare(make_config(method))
        optimizer = run.state.optimizer
        next(report for report in run.fit() if report.phase == "train")
        optimizer.last_micro_batch = name == "told"
        before = optimizer.workers.sent_bytes
        accumulate_gradients(run.state.model, run.state.batches[1][:1], run.state.device)
        sent[name] = optimizer.workers.sent_bytes - before
        sent["needed"] = sum(4 * p.numel() for p in optimizer.active_parameters())
        optimizer.step()
    return sent


def fork_all(size: int, folder: str, methods: list[str]) -> None:
    """A group of workers."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, size, folder, methods)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"workers ended with {[worker.exitcode for worker in workers]}")


# ------------------------------------------------------------------------------------------------------ in the tests


class Groups:
    """The results of every worker of a group, made when they are first asked for."""

    def __init__(self, folder: Path, methods: list[str]) -> None:
        self._folder = folder
        self._methods = methods
        self._results: dict[int, list[dict[str, Any]]] = {}

    def __getitem__(self, size: int) -> list[dict[str, Any]]:
        if size not in self._results:
            here = Path(__file__).parent
            code = (
                "import sys; sys.path[:0] = sys.argv[1:3]; import test_workers as t\n"
                "t.fork_all(int(sys.argv[3]), sys.argv[4], sys.argv[5:])"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, *map(str, (here, here.parent, size, self._folder)), *self._methods],
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            files = [self._folder / f"worker-{size}-{rank}.pt" for rank in range(size)]
            self._results[size] = [torch.load(file, weights_only=False) for file in files]
        return self._results[size]


@pytest.fixture(scope="module")
def methods(request: pytest.FixtureRequest) -> list[str]:
    return [*QUICK, *(SLOW if request.config.getoption("--slow") else [])]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, methods: list[str]) -> Groups:
    return Groups(tmp_path_factory.mktemp("workers"), methods)


@pytest.fixture(scope="module")
def alone(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Every method in one process that accumulates all micro-batches."""
    return {method: follow(method) for method in methods}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS_THAT_TRAIN)
def test_the_number_of_workers_changes_nothing(
    method: str, size: int, groups: Groups, alone: dict[str, dict[str, Any]]
) -> None:
    """Losses, gradient norms, importance, active sets and weights; dropout included."""
    expected = alone[method]
    moved = False
    for worker in groups[size]:
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
        for name, weight in expected["weights"].items():
            travelled = (weight - expected["start"][name]).abs().max()
            difference = (found["weights"][name] - weight).abs().mean()
            assert difference <= WEIGHT_TOLERANCE * travelled, name
            moved = moved or bool(travelled > 0)
    assert moved


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS_THAT_TRAIN)
def test_all_workers_end_with_the_same_weights(method: str, size: int, groups: Groups) -> None:
    first, *others = (worker[method]["weights"] for worker in groups[size])
    for other in others:
        for name, weight in first.items():
            assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("method", RESUMED)
def test_a_checkpoint_of_the_first_worker_restores_all(method: str, groups: Groups) -> None:
    """Bitwise: also what draws random numbers of its own on every worker."""
    for worker in groups[2]:
        for name, weight in worker[method]["weights"].items():
            assert torch.equal(weight, worker[method]["resumed"][name]), name


@pytest.mark.parametrize("method", METHODS_THAT_TRAIN)
def test_only_what_trains_is_sent(method: str, groups: Groups, alone: dict[str, dict[str, Any]]) -> None:
    """Beside a few numbers: a norm a unit, the loss, the peaks, extra losses, and the check at a switch."""
    assert "comm/bytes_per_step" not in alone[method]["series"]
    for worker in groups[2]:
        found = worker[method]
        sent = dict(found["series"]["comm/bytes_per_step"])
        shares = dict(found["series"]["comm/share_of_full"])
        intervals = dict(found["intervals"])
        active: tuple[int, ...] = ()
        for report in found["reports"]:
            active = intervals.get(report.step, active)
            trained = 0
            if report.phase == "train":
                trained = found["constant_bytes"] + sum(found["unit_bytes"][unit] for unit in active)
            assert 0 < sent[report.step] - trained < 1024
            assert shares[report.step] == sent[report.step] / found["full_bytes"]
        assert re.search(r"2 workers; each gives \d+\.\d+ MiB a step", found["described"])


@pytest.mark.parametrize("method", ["full", "lora", "grass", "misa"])
def test_gradients_travel_while_backward_goes_on(method: str, groups: Groups) -> None:
    """Told of the last micro-batch, every reduction has begun when ``step`` begins; untold, none."""
    for worker in groups[2]:
        early = worker["early"][method]
        assert early["told"] == early["needed"] > 0
        assert early["untold"] == 0


def test_peak_memory_is_the_largest_of_all_workers(groups: Groups) -> None:
    peaks = [worker["full"]["reports"][-1].peak_allocated_gib for worker in groups[2]]
    assert len(set(peaks)) == 1
    assert peaks[0] > 0


@pytest.mark.parametrize("method", METHODS_THAT_TRAIN)
def test_the_memory_plan_knows_of_workers(method: str, groups: Groups) -> None:
    """Gradients under way are copies; each worker has half of the micro-batches. Draws may miss the worst case."""
    config = make_config(method)
    planner = Planner(config.model, "cpu", workers=2)
    (plan,) = planner.plan_modes(config.method, real_shape(config), modes=(config.method.offload,))
    measured = groups[2][0][method]["reports"][-1].peak_allocated_gib * GIB
    share = plan.peak_bytes / measured
    assert share == pytest.approx(1.02, rel=0.03) if method in ALWAYS_ALIKE else share >= 0.98


def test_micro_batches_that_cannot_be_shared_out_are_refused() -> None:
    config = short_run("grass", "training.batch_size=4", "training.accumulation_steps=2")
    check_run(config, workers=2)
    with pytest.raises(ConfigError, match=r"must be a multiple of 4, not 2; set training.accumulation_steps=4"):
        check_run(config, workers=4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", EVALUATED)
def test_workers_share_the_questions_and_each_has_all_answers(
    method: str, size: int, groups: Groups, alone: dict[str, dict[str, Any]]
) -> None:
    (expected,) = alone[method]["tasks"].values()
    for worker in groups[size]:
        (found,) = worker[method]["tasks"].values()
        assert found == expected
    assert len(expected.examples) == 4
