"""Carry out one run, from its configuration to its record. Commands and the workers of a sweep all do it this way.

::

    result = execute(config, listeners=[RunProgress(config.name)])
    record = result.record(RunContext(sweep="train", sweep_id="train", run_id=f"train-{config.fingerprint}"))
    record.save(folder / "record.json")
    result.write_files(folder)

Whatever else happens while a run trains (a progress bar, checkpoints, reports to Ray) is a :class:`Listener`. Torch is
imported when a run starts, and neither ray nor mlflow at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from grass_ray.config import RunConfig
from grass_ray.results.provenance import build_record, now, write_examples, write_layer_trace, write_lm_eval_examples
from grass_ray.results.record import RunRecord, SearchPart, Status
from grass_ray.training.report import RunOutcome, StepReport, TrainingFailure

if TYPE_CHECKING:
    from grass_ray.training.run import Run

Ending = tuple[Status, str]  # how a run ended, and why


class Action(IntEnum):
    """What a listener wants after a step. The strongest wish of all listeners counts."""

    GO = 0
    SAVE = 1
    """Write a checkpoint and go on."""
    STOP = 2
    """Write a checkpoint and leave the loop; the run is not evaluated."""


class Listener:
    """Follows a run. Every method does nothing until a subclass overrides it.

    With several workers each has its own listeners; what they do in :meth:`on_step` must be the same on all of them.
    """

    def on_start(self, run: Run) -> None:
        """The model and the data are loaded; a checkpoint is restored here."""

    def on_step(self, run: Run, report: StepReport) -> Action:
        """An optimizer step is done."""
        return Action.GO

    def after_step(self, run: Run, report: StepReport, action: Action) -> None:
        """Every listener was asked, and ``action`` is the strongest answer; checkpoints are written here."""

    def on_trained(self, run: Run) -> None:
        """The loop is left. The evaluation comes next, unless the run was stopped."""

    def on_evaluation(self, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` examples of a task are evaluated."""

    def on_error(self, error: BaseException) -> Ending | None:
        """How the run ends if ``error`` is a way for it to end; None if it is not, and then the error is raised."""
        return None

    def on_end(self) -> None:
        """The run is over, whatever came of it."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a record says beside what was asked for and what came out.

    Attributes:
        sweep: the sweep's name, or that of the command.
        sweep_id: which execution of the sweep.
        run_id: the run's own name, the same after a restart.
        hardware: what it ran on, in words; None describes this machine.
        world_size: number of workers.
        search: the search that the run belongs to.
    """

    sweep: str
    sweep_id: str
    run_id: str
    hardware: str | None = None
    world_size: int = 1
    search: SearchPart | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        config: what was asked for.
        status: ``"finished"``, or how else it ended; ``"stopped"`` if a listener or ``until`` ended it.
        failure: why it did not finish.
        run: the run itself; None if it could not be prepared.
        started_at: ISO time.
        threads: CPU threads that torch computed with.
        weights_sha256: hash of the trained weights; None unless it finished, and on other workers than the first.
    """

    config: RunConfig
    status: Status
    failure: str | None
    run: Run | None
    started_at: str
    threads: int
    weights_sha256: str | None = None

    @cached_property
    def outcome(self) -> RunOutcome | None:
        """What was measured; None if the run could not be prepared."""
        return None if self.run is None else self.run.outcome()

    def record(self, context: RunContext) -> RunRecord:
        """Build the run's record."""
        from grass_ray.training.weights import base_model_sha256

        return build_record(
            run_id=context.run_id,
            sweep=context.sweep,
            sweep_id=context.sweep_id,
            config=self.config,
            status=self.status,
            failure=self.failure,
            outcome=self.outcome,
            started_at=self.started_at,
            hardware_name=context.hardware,
            world_size=context.world_size,
            model_sha256=None if self.run is None else base_model_sha256(self.config.model),
            threads=self.threads,
            weights_sha256=self.weights_sha256,
            search=context.search,
        )

    def write_files(self, folder: Path) -> None:
        """Write what belongs beside the record: every evaluated example, and what layer-wise training did."""
        if self.outcome is not None:
            write_examples(folder / "examples.jsonl", self.outcome.tasks)
            write_lm_eval_examples(folder / "lm_eval_examples.jsonl", self.outcome.lm_eval)
            write_layer_trace(folder, self.outcome.layers)


def execute(
    config: RunConfig,
    *,
    prepare: Callable[[], Run] | None = None,
    listeners: Sequence[Listener] = (),
    until: int | None = None,
    threads: int | None = None,
) -> RunResult:
    """Prepare, train and evaluate a run.

    Args:
        config: the run, as its record shows it.
        prepare: makes the run; by default :meth:`Run.prepare <grass_ray.training.run.Run.prepare>` of ``config``.
        listeners: what follows it, in this order.
        until: training steps after which it stops, without an evaluation; None trains to the end.
        threads: CPU threads for torch while it runs; sums over other parts differ in their last bits. None leaves them.

    Raises:
        BaseException: whatever ended the run, unless it is a :class:`~grass_ray.training.report.TrainingFailure` or a
            listener's :meth:`~Listener.on_error` knows it.
    """
    import torch

    from grass_ray.training.determinism import deterministic_algorithms
    from grass_ray.training.run import Run

    started_at, threads_before = now(), torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    run: Run | None = None
    status: Status = "finished"
    failure = weights_sha256 = None
    try:
        with deterministic_algorithms(config.training.deterministic):
            run = Run.prepare(config) if prepare is None else prepare()
            if not _train(run, listeners, until):
                status = "stopped"
            else:
                _evaluate(run, listeners)
                if run.state.optimizer.workers.rank == 0 or run.state.optimizer.sharded:
                    weights_sha256 = run.weights_sha256()
    except BaseException as error:
        ending = _explain(error, listeners)
        if ending is None:
            raise
        status, failure = ending
    finally:
        for listener in listeners:
            listener.on_end()
        threads_used = torch.get_num_threads()
        torch.set_num_threads(threads_before)
    return RunResult(
        config=config,
        status=status,
        failure=failure,
        run=run,
        started_at=started_at,
        threads=threads_used,
        weights_sha256=weights_sha256,
    )


def _train(run: Run, listeners: Sequence[Listener], until: int | None) -> bool:
    """Take every step up to ``until``; False if the run was stopped before its end."""
    for listener in listeners:
        listener.on_start(run)
    every = run.config.training.checkpoint_every_steps
    action = Action.GO
    for report in run.fit(until):
        last = report.step == report.total_steps
        wishes = [listener.on_step(run, report) for listener in listeners]
        if every is not None and (last or report.step % every == 0):
            wishes.append(Action.SAVE)
        action = max(wishes, default=Action.GO)
        for listener in listeners:
            listener.after_step(run, report, action)
        if action is Action.STOP:
            break
    for listener in listeners:
        listener.on_trained(run)
    return action is not Action.STOP and run.state.trained == run.config.training.steps


def _evaluate(run: Run, listeners: Sequence[Listener]) -> None:
    def tell(task: str, done: int, total: int) -> None:
        for listener in listeners:
            listener.on_evaluation(task, done, total)

    run.evaluate(on_progress=tell)


def _explain(error: BaseException, listeners: Sequence[Listener]) -> Ending | None:
    for listener in listeners:
        if (ending := listener.on_error(error)) is not None:
            return ending
    return (error.status, error.reason) if isinstance(error, TrainingFailure) else None
