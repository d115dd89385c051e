"""One trial: the function Ray Train runs in a worker, and the function Ray Tune runs to drive it.

The worker trains, evaluates and writes the trial's folder; it reports to Tune and knows nothing of MLflow::

    Tuner(tune.with_resources(drive_trial, {"memory": 1}), param_space={"job": tune.grid_search(jobs)})

A run that fails for a reason of its own (out of memory, a loss gone bad, a mistake in its configuration) ends normally
with a record that says so. A process that dies is started again from its last checkpoint; when that keeps happening
the reason goes into ``traceback.txt`` and ``--resume`` tries the trial again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, Parallel, RunConfig
from grass_ray.progress import step_summary
from grass_ray.results.provenance import build_record, hardware, now, write_engagement, write_examples
from grass_ray.results.record import SearchPart, Status
from grass_ray.training.report import VALIDATION, StepReport, TrainingFailure

if TYPE_CHECKING:
    from grass_ray.training.run import Run

REPORT_EVERY_S = 8.0  # each report wakes half a dozen processes, which take turns with training on small machines
VERDICT_WITHIN_S = 600.0
PREEMPTION_EVERY_S = 5.0  # how often workers ask whether one of their machines is about to be taken away
TRACEBACK_FILE = "traceback.txt"
FAILURE_FILE = "failure.json"  # why a worker of several ended its trial
RECORD_FILE = "record.json"
TIME = "step"  # updates, in the reports that schedulers look at


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a trial's processes need to know; plain values, so that it travels."""

    config: dict[str, Any]
    key: str
    folder: str
    sweep: str
    sweep_id: str
    storage: str
    cpus: int
    gpus: int
    keep_checkpoints: bool = False
    memory_check: bool = True
    max_failures: int = 2  # how often a process may die before the trial counts as failed
    workers: int = 1
    fewest_workers: int = 1  # fewer than workers where the trial is elastic
    parallel: Parallel = "replicate"
    search: dict[str, Any] | None = None  # of the record: which search this trial belongs to
    validate_at: tuple[int, ...] = ()  # updates after which held-out rows are measured on the way
    until: int | None = None  # updates after which this generation of a population ends
    start_from: str | None = None  # URI of the checkpoint that it goes on from
    watched: tuple[str, ...] = ()  # settings that may change in mid-training, logged as metrics
    space: dict[str, Any] | None = None  # of a population
    picks: dict[str, Any] | None = None  # a member's place in it, which PBT changes

    @property
    def run_id(self) -> str:
        """The trial's name among all sweeps."""
        return f"{self.sweep_id}-{self.key}"

    @property
    def elastic(self) -> bool:
        """Whether the trial goes on with fewer workers when machines are missing."""
        return self.fewest_workers < self.workers

    @property
    def train_name(self) -> str:
        """The Train run's name: the same in every attempt, so that Train finds the last checkpoint.

        Each generation of a population has its own, or a member would go on from its own checkpoint for ever.
        """
        if self.until is None:
            return f"train-{self.key}"
        origin = json.dumps([self.start_from, self.config], sort_keys=True)
        return f"train-{self.key}-to-{self.until}-{hashlib.sha256(origin.encode()).hexdigest()[:8]}"


# --------------------------------------------------------------------------------------------------- the Train worker


def train_worker(values: dict[str, Any]) -> None:
    """Train and evaluate one run, write its folder, and report on the way."""
    import torch

    from grass_ray.export.model import CHECKPOINT_FOLDER
    from grass_ray.memory.fit import fit_to_memory
    from grass_ray.results.figures.registry import write_run_plots
    from grass_ray.training.run import Run
    from grass_ray.training.weights import base_model_sha256

    job = Job(**values)
    torch.set_num_threads(job.cpus)  # Ray exports OMP_NUM_THREADS=1 to its workers on a cluster
    started_at = now()
    config = RunConfig.parse(job.config)
    storage = Storage(job.storage)
    context = ray.train.get_context()
    first, workers = context.get_world_rank() == 0, context.get_world_size()
    if first:
        storage.write_text(config.to_yaml(), job.folder, "config.yaml")
        for name in (RECORD_FILE, TRACEBACK_FILE):  # of a crashed attempt; in this order, so that neither misleads
            storage.remove(job.folder, name)

    run: Run | None = None
    status: Status = "finished"
    failure: str | None = None
    try:
        with ending_together(job, storage):
            # what fits is predicted for a worker that holds the whole model
            fits = job.memory_check and job.parallel == "replicate"
            fitted = fit_to_memory(config, workers=workers) if fits else config
            run = Run.prepare(fitted, parallel=job.parallel)
            _go_on(run, job)
            _fit(run, job, first=first)
            if run.state.trained < config.training.steps:
                return  # a generation of a population: its checkpoint says everything
            # a report is a barrier, and workers finish their batches at other times
            run.evaluate(on_progress=_EvaluationReporter() if job.workers == 1 else None)
    except TrainingFailure as problem:
        status, failure = problem.status, problem.reason
    except ConfigError as problem:
        status, failure = "failed", str(problem)
    weights_sha256 = None
    if run is not None and status == "finished" and (first or job.parallel == "shard"):
        weights_sha256 = run.weights_sha256()  # of shards all workers together
    keep = run is not None and status == "finished" and job.keep_checkpoints and config.training.steps > 0
    if run is not None and keep and not first:
        run.save(None)
    if first:
        outcome = None if run is None else run.outcome()
        record = build_record(
            run_id=job.run_id,
            sweep=job.sweep,
            sweep_id=job.sweep_id,
            config=config,
            status=status,
            failure=failure,
            outcome=outcome,
            started_at=started_at,
            # in tables of its own: its memory is not that of workers with the whole model
            hardware_name=_hardware(job),
            world_size=job.workers,
            model_sha256=None if run is None else base_model_sha256(config.model),
            threads=torch.get_num_threads(),
            weights_sha256=weights_sha256,
            search=None if job.search is None else SearchPart.model_validate(job.search),
        )
        with tempfile.TemporaryDirectory(prefix="grass_ray-") as name:
            written = Path(name)
            write_run_plots(record, written)
            if outcome is not None:
                write_examples(written / "examples.jsonl", outcome.tasks)
                write_engagement(written, outcome.engagement)
            if run is not None and keep:
                run.save(written / CHECKPOINT_FOLDER)
            storage.upload(written, job.folder)
        # the record comes last: where it is, everything is
        storage.write_text(record.model_dump_json(indent=1), job.folder, RECORD_FILE)
    ray.train.report({"phase": "ended", "status": status, "failure": failure, "steps": []})
    if first:
        storage.remove(job.folder, FAILURE_FILE)  # after the barrier: every worker has read it


@contextmanager
def ending_together(job: Job, storage: Storage) -> Iterator[None]:
    """End all workers of a trial where one has failed: the others may wait for it in a reduction, for ever.

    The worker leaves its reason in the trial's folder and dies. Train then stops the others and starts all again; each
    finds the reason before it loads anything, and ends normally. A number gone bad needs none of this: losses and
    gradients are reduced before they are checked, so that every worker finds it in the same step.

    Raises:
        TrainingFailure: the reason that a worker of an earlier attempt left, or that all workers have now.
        RuntimeError: this worker has failed; its reason is left for the next attempt.
    """
    if job.workers > 1 and storage.exists(job.folder, FAILURE_FILE):
        left = json.loads(storage.read_text(job.folder, FAILURE_FILE))
        raise TrainingFailure(left["status"], left["reason"])
    try:
        yield
    except (TrainingFailure, ConfigError) as problem:
        status = problem.status if isinstance(problem, TrainingFailure) else "failed"
        if job.workers == 1 or (isinstance(problem, TrainingFailure) and status == "failed"):
            raise
        storage.write_text(json.dumps({"status": status, "reason": str(problem)}), job.folder, FAILURE_FILE)
        raise RuntimeError(f"this worker ends the trial: {problem}") from problem


def _go_on(run: Run, job: Job) -> None:
    """Restore the last checkpoint: this trial's, or the one that a population's member begins with."""
    with _last_checkpoint() as folder:
        if folder is not None:
            run.restore(folder)
            ray.train.report(_restored_message(run, job))
        elif job.start_from is not None:
            with tempfile.TemporaryDirectory(prefix="grass_ray-start-") as name:
                Storage(job.start_from).download(Path(name))
                run.restore(Path(name))
            run.apply_learning_rate()


def _fit(run: Run, job: Job, *, first: bool) -> None:
    """Take every step; report the steps since the last report every few seconds, and at each checkpoint.

    A machine that is about to be taken away (a preemptible one) is a reason for a checkpoint at once. A report is a
    barrier, as is the question about preemption: the ``first`` worker's clock decides for all. It alone saves: states
    are the same on every worker (of a sharded model they are gathered), and random numbers are keyed, so that no worker
    has anything of its own to save.
    """
    every_steps = run.config.training.checkpoint_every_steps
    workers = run.state.optimizer.workers
    storage = Storage(job.storage)
    pending: list[tuple[StepReport, dict[str, float]]] = []
    last_report = last_question = time.monotonic()
    warned = False
    if job.until is not None and run.state.trained >= job.until:
        _end_again(run, job, first=first)
        return
    for report in run.fit():
        metrics = report.metrics() | _watch(run, job)
        pending.append((report, metrics))
        last = report.step == report.total_steps
        updates = run.state.trained if report.phase == "train" else 0
        ends = updates == job.until
        loss = run.validate() if updates in job.validate_at else None
        passed = None if loss is None or job.until is not None else passed_file(updates)
        if passed is not None and first:
            storage.remove(job.folder, passed)  # of an earlier attempt
        due, asks = workers.maximum(
            [
                first and time.monotonic() - last_report >= REPORT_EVERY_S,
                first and time.monotonic() - last_question >= PREEMPTION_EVERY_S,
            ]
        )
        saves = ends or (every_steps is not None and (last or report.step % every_steps == 0))
        if asks:
            last_question = time.monotonic()
            if not warned and ray.train.get_preemption_info() is not None:
                warned = saves = True
        if not (saves or due or last or loss is not None):
            continue
        _report(run, _steps_message(job, pending, updates, loss), saves=saves, first=first)
        if ends:
            return
        if passed is not None and first:
            _wait_for_verdict(storage, job.folder, passed)
        pending, last_report = [], time.monotonic()


def passed_file(updates: int) -> str:
    """The file by which the driver says that a trial may go on after a rung."""
    return f"rung-{updates}.passed"


def _wait_for_verdict(storage: Storage, folder: str, name: str) -> None:
    """Stand still at a rung until the scheduler has decided; a trial that is to be stopped must not come to its end.

    Where nobody answers for long the trial goes on: a result that nobody asked for is better than none.
    """
    deadline = time.monotonic() + VERDICT_WITHIN_S
    while not storage.exists(folder, name) and time.monotonic() < deadline:
        time.sleep(0.2)
    storage.remove(folder, name)


def _end_again(run: Run, job: Job, *, first: bool) -> None:
    """End a generation that had ended before its process died: the same report, with its checkpoint."""
    _report(run, _restored_message(run, job), saves=True, first=first)


def _report(run: Run, message: dict[str, Any], *, saves: bool, first: bool) -> None:
    """Report to Train, with a checkpoint where one is due; returns when it is in the storage."""
    if not saves:
        ray.train.report(message)
    elif not first:
        run.save(None)
        ray.train.report(message)
    else:
        with tempfile.TemporaryDirectory(prefix="grass_ray-checkpoint-") as folder:
            run.save(Path(folder))
            ray.train.report(message, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _watch(run: Run, job: Job) -> dict[str, float]:
    """What may change in mid-training, as it is at this step: settings, and the number of workers.

    In the run's series, and as metrics.
    """
    from grass_ray.layerwise.schedules import value_at

    found: dict[str, float] = {}
    if job.elastic:
        found["comm/workers"] = float(run.state.optimizer.workers.count)
    for key in job.watched:
        name = key.rpartition(".")[2]
        setting = run.config.method.optimizer.lr if name == "lr" else getattr(run.state.optimizer.sampler, name)
        if setting is not None:
            found[f"hparam/{name}"] = float(value_at(setting, run.state.trained))
    for metric, value in found.items():
        run.state.series.setdefault(metric, []).append((run.state.steps_done, value))
    return found


def _hardware(job: Job) -> str:
    """The device in words; speed and memory of shards, or of a changing number of workers, have tables of their own."""
    suffix = ", model sharded" if job.parallel == "shard" else ""
    return hardware() + suffix + (f", elastic from {job.fewest_workers}" if job.elastic else "")


def _steps_message(
    job: Job, pending: list[tuple[StepReport, dict[str, float]]], updates: int, loss: float | None
) -> dict[str, Any]:
    """Several steps in one report: what the display shows, and every step's metrics for the tracker."""
    import torch

    steps = [[report.step, metrics] for report, metrics in pending]
    message = {"phase": "training", "steps": steps, "view": step_summary(pending[-1][0])}
    if loss is not None:
        steps[-1][1] = {**pending[-1][1], VALIDATION: loss}
        machine = {"hardware_name": _hardware(job), "threads": torch.get_num_threads()}
        message |= {**_for_schedulers(job, updates, loss), "machine": machine}
    return message


def _restored_message(run: Run, job: Job) -> dict[str, Any]:
    """Where a restored run stands, with all its steps: the driver may have died before it heard of the last ones."""
    series = run.outcome().series
    message = {"phase": "restored", "steps": steps_of(series), "after_step": run.state.steps_done}
    if points := series.get(VALIDATION):
        message |= _for_schedulers(job, points[-1][0] - run.state.probed, points[-1][1])
    return message


def _for_schedulers(job: Job, updates: int, loss: float) -> dict[str, Any]:
    """A loss on held-out rows under the names that schedulers look for.

    A population's scheduler hears of it from the member's driver, together with the checkpoint; not from here.
    """
    return {VALIDATION: loss} if job.until is not None else {TIME: updates, VALIDATION: loss}


def steps_of(series: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[int, dict[str, float]]]:
    """Series of metrics as one (step, metrics) pair a step, in order."""
    steps: dict[int, dict[str, float]] = {}
    for name, points in series.items():
        for step, value in points:
            steps.setdefault(step, {})[name] = value
    return sorted(steps.items())


class _EvaluationReporter:
    """Passes the evaluation's progress on, a few seconds apart."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def __call__(self, task: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= REPORT_EVERY_S:
            self._last = time.monotonic()
            view = {"task": task, "done": done, "total": total}
            ray.train.report({"phase": "evaluating", "steps": [], "view": view})


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    """The folder of the last checkpoint this trial reported, in this attempt or an earlier one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


# ----------------------------------------------------------------------------------------------------- the Tune trial


def drive_trial(values: dict[str, Any]) -> None:
    """Run one Train run and wait for it; a Tune function that does no work itself."""
    job = Job(**values["job"])
    storage = Storage(job.storage)
    if train(job, storage) is not None:
        storage.remove("ray", job.train_name)  # the record is written; nothing is left to continue


def train(job: Job, storage: Storage) -> ray.train.Result | None:
    """Carry out a Train run, its reports passed on to Tune; None where its workers died too often, which is reported.

    Raises:
        ray.train.ControllerError: Train's own processes died. Tune starts the trial again, which finds its checkpoint.
    """
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(job),
        torch_config=TorchConfig(backend="nccl" if job.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(job.fewest_workers, job.workers) if job.elastic else job.workers,
            use_gpu=job.gpus > 0,
            resources_per_worker=_resources(job),
        ),
        run_config=ray.train.RunConfig(
            name=job.train_name,
            storage_path=storage.join("ray").uri,
            failure_config=ray.train.FailureConfig(
                max_failures=job.max_failures, controller_failure_limit=job.max_failures + 1
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[TuneReportCallback()],
        ),
    )
    try:
        return trainer.fit()
    except ray.train.ControllerError:
        raise
    except ray.train.TrainingFailedError as error:
        storage.write_text(traceback.format_exc(), job.folder, TRACEBACK_FILE)
        ray.tune.report({"phase": "crashed", "failure": _reason(error, job.max_failures + 1), "steps": []})
        return None


def _resources(job: Job) -> dict[str, float]:
    return {"CPU": job.cpus, "GPU": job.gpus} if job.gpus else {"CPU": job.cpus}


def _reason(error: Exception, times: int) -> str:
    """The telling line of a failed Train run's message: the last one, but Ray's on memory ends in advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if "low on memory" in line), lines[-1] if lines else "no reason known")
    return f"the worker failed {times} time(s): {telling}"
