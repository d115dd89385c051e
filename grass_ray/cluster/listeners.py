"""Listeners of a sweep's worker: reports to Ray, validation, early stopping, preemption, and failures of one worker.

With several workers a report is a barrier, as is the question about preemption: the clock of rank 0 decides for all.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from grass_ray.cluster.job import FAILURE_FILE, HELD, TIME, Job
from grass_ray.cluster.ray_worker import RayWorker
from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError
from grass_ray.execute import Action, Ending, Listener
from grass_ray.progress import step_summary
from grass_ray.training.report import HPARAM, VALIDATION, StepReport, TrainingFailure

if TYPE_CHECKING:
    from grass_ray.training.run import Run

REPORT_EVERY_S = 8.0  # each report wakes half a dozen processes, which take turns with training on small machines
PREEMPTION_EVERY_S = 5.0
GATE_WITHIN_S = 600.0

Series = Mapping[str, Sequence[tuple[int, float]]]


class RayReporter(Listener):
    """Reports the steps since the last report to Ray every few seconds, and with each checkpoint.

    Only the worker of rank 0 saves: states are the same on every worker (of a sharded model they are gathered), and
    random numbers are keyed, so that no worker has anything of its own to save.
    """

    def __init__(self, job: Job, worker: RayWorker) -> None:
        self._job = job
        self._worker = worker
        self._is_main = worker.rank == 0
        self._last_report = time.monotonic()
        self._reported = 0  # the last step that a report told of
        self._last_evaluation = float("-inf")

    @override
    def on_start(self, run: Run) -> None:
        """Restore the last checkpoint: this trial's, or the one that a population's member begins with."""
        until, start_from = self._job.until, self._job.start_from
        with self._worker.checkpoint() as checkpoint:
            if checkpoint is not None:
                run.restore(checkpoint)
        if checkpoint is not None:
            self._worker.report(self._restored(run))
        elif start_from is not None:
            with tempfile.TemporaryDirectory(prefix="grass_ray-start-") as name:
                Storage(start_from).download(Path(name))
                run.restore(Path(name))
            run.apply_learning_rate()
        if until is not None and run.state.trained >= until:  # its process died after the generation's last step
            self._report(run, self._restored(run), saves=True)
        self._reported = run.state.steps_done
        self._last_report = time.monotonic()

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        due = self._is_main and time.monotonic() - self._last_report >= REPORT_EVERY_S
        (self._due,) = run.state.optimizer.workers.maximum([due])
        return Action.SAVE if report.train_step == self._job.until else Action.GO

    @override
    def after_step(self, run: Run, report: StepReport, action: Action) -> None:
        loss = measured_now(run)
        saves = action is not Action.GO
        if not (saves or self._due or loss is not None or report.step == report.total_steps):
            return
        steps = steps_of(run.state.series, after=self._reported)
        message: dict[str, Any] = {"phase": "training", "steps": steps, "view": step_summary(report)}
        if loss is not None:
            import torch

            machine = {"hardware_name": self._job.hardware, "threads": torch.get_num_threads()}
            message |= {**self._for_schedulers(report.train_step, loss), "machine": machine}
        self._report(run, message, saves=saves)
        self._reported, self._last_report = report.step, time.monotonic()

    @override
    def on_evaluation(self, task: str, done: int, total: int) -> None:
        if self._job.context.resources.workers > 1:
            return  # a report is a barrier, and workers finish their batches at other times
        if time.monotonic() - self._last_evaluation >= REPORT_EVERY_S:
            self._last_evaluation = time.monotonic()
            view = {"task": task, "done": done, "total": total}
            self._worker.report({"phase": "evaluating", "steps": [], "view": view})

    def _report(self, run: Run, message: dict[str, Any], *, saves: bool) -> None:
        """Report to Ray, with a checkpoint if ``saves``; returns when it is in the storage."""
        if not saves:
            self._worker.report(message)
        elif not self._is_main:
            run.save(None)
            self._worker.report(message)
        else:
            with tempfile.TemporaryDirectory(prefix="grass_ray-checkpoint-") as folder:
                run.save(Path(folder))
                self._worker.report(message, checkpoint=Path(folder))

    def _restored(self, run: Run) -> dict[str, Any]:
        """Where a restored run stands, with all its steps: the driver may have died before it heard of the last."""
        series = run.state.series
        message = {"phase": "restored", "steps": steps_of(series), "after_step": run.state.steps_done}
        if points := series.get(VALIDATION):
            message |= self._for_schedulers(points[-1][0] - run.state.probed, points[-1][1])
        return message

    def _for_schedulers(self, train_step: int, loss: float) -> dict[str, Any]:
        """A loss on held-out rows under the names that schedulers look for.

        A population's scheduler hears of it from the member's driver, together with the checkpoint; not from here.
        """
        if self._job.until is not None:
            return {VALIDATION: loss}
        return {TIME: train_step, VALIDATION: loss, HELD: not self._worker.waits}


class Validation(Listener):
    """Measures the loss on held-out rows after some training steps; at a rung it then waits for the scheduler.

    Otherwise a trial that is to be stopped might finish first. If the driver does not answer for long, the trial goes
    on. Where a report waits itself there is nothing more to wait for.
    """

    def __init__(self, job: Job, worker: RayWorker) -> None:
        self._job = job
        self._storage = Storage(job.context.storage)
        self._waits = worker.rank == 0 and job.until is None and not worker.waits

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        if report.train_step in self._job.validate_at:
            run.validate()
            if self._waits:
                self._storage.remove(self._job.folder, passed_file(report.train_step))  # of an earlier attempt
        return Action.GO

    @override
    def after_step(self, run: Run, report: StepReport, action: Action) -> None:
        if not self._waits or measured_now(run) is None:
            return
        name, deadline = passed_file(report.train_step), time.monotonic() + GATE_WITHIN_S
        while not self._storage.exists(self._job.folder, name) and time.monotonic() < deadline:
            time.sleep(0.2)
        self._storage.remove(self._job.folder, name)


class PreemptionGuard(Listener):
    """Saves at once when a machine of the trial is to be taken away, and again and again on a worker that stays."""

    def __init__(self, worker: RayWorker) -> None:
        self._worker = worker
        self._last_question = time.monotonic()
        self._warned = False

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        due = self._worker.rank == 0 and time.monotonic() - self._last_question >= PREEMPTION_EVERY_S
        (asks,) = run.state.optimizer.workers.maximum([due])
        if asks:
            self._last_question = time.monotonic()
            if (not self._warned or self._worker.stays) and self._worker.loses_its_machine():
                self._warned = True
                return Action.SAVE
        return Action.GO


class ChangingSettings(Listener):
    """Records as series what may change during training: settings of a population, and the number of workers."""

    def __init__(self, job: Job) -> None:
        self._elastic = job.context.resources.elastic
        self._keys = () if job.until is None else tuple(job.space or ())

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        from grass_ray.layerwise.schedules import value_at

        optimizer = run.state.optimizer
        if self._elastic:
            run.state.record("comm/workers", float(optimizer.workers.count))
        for key in self._keys:
            name = key.rpartition(".")[2]
            setting = run.config.method.optimizer.lr if name == "lr" else getattr(optimizer.sampler, name)
            if setting is not None:
                run.state.record(HPARAM + name, float(value_at(setting, run.state.trained)))
        return Action.GO


class EndTogether(Listener):
    """Ends all workers of a trial if one has failed: the others may wait for it in a reduction and never return.

    The worker leaves its reason in the trial's folder and dies. Train then stops the others and starts all again; each
    finds the reason before it loads anything (:meth:`check`), and ends normally. A loss or gradient that is not finite
    needs none of this: they are reduced before they are checked, so that every worker finds it in the same step.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._storage = Storage(job.context.storage)
        self._several = job.context.resources.workers > 1
        self._found: TrainingFailure | None = None

    def check(self) -> None:
        """Raise the :class:`TrainingFailure` that a worker of an earlier attempt left, if one did."""
        if self._several and self._storage.exists(self._job.folder, FAILURE_FILE):
            left = json.loads(self._storage.read_text(self._job.folder, FAILURE_FILE))
            self._found = TrainingFailure(left["status"], left["reason"])
            raise self._found

    @override
    def on_error(self, error: BaseException) -> Ending | None:
        """End normally, or leave the reason for the next attempt and raise ``RuntimeError``."""
        if not isinstance(error, TrainingFailure | ConfigError):
            return None
        status = error.status if isinstance(error, TrainingFailure) else "failed"
        found_by_all = isinstance(error, TrainingFailure) and status == "failed"
        if not self._several or found_by_all or error is self._found:
            return status, str(error)
        self._storage.write_text(json.dumps({"status": status, "reason": str(error)}), self._job.folder, FAILURE_FILE)
        raise RuntimeError(f"this worker ends the trial: {error}") from error


def passed_file(train_step: int) -> str:
    """The file by which the driver says that a trial may go on after a rung."""
    return f"rung-{train_step}.passed"


def measured_now(run: Run) -> float | None:
    """The loss on held-out rows if it was measured after the current step, else None."""
    points = run.state.series.get(VALIDATION)
    return points[-1][1] if points and points[-1][0] == run.state.steps_done else None


def steps_of(series: Series, after: int = 0) -> list[tuple[int, dict[str, float]]]:
    """Series of metrics as one (step, metrics) pair per step, in order, from the step behind ``after``."""
    steps: dict[int, dict[str, float]] = {}
    for name, points in series.items():
        for step, value in reversed(points):
            if step <= after:
                break
            steps.setdefault(step, {})[name] = value
    return sorted(steps.items())
