"""What happens beside a run in this process: checkpoints, tracking, and an end at Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from grass_ray.execute import Action, Ending, Listener
from grass_ray.process import Interrupts
from grass_ray.results.tracker import Tracker
from grass_ray.training.report import StepReport, TrainingFailure

if TYPE_CHECKING:
    from grass_ray.training.run import Run

LOG_EVERY_S = 10.0


class Checkpoints(Listener):
    """Keeps the last checkpoint in a folder, and goes on from the one that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved_after = -1

    @override
    def on_start(self, run: Run) -> None:
        from grass_ray.training.checkpoint import restore_previous

        restore_previous(self._folder)
        if self._folder.is_dir():
            run.restore(self._folder)

    @override
    def after_step(self, run: Run, report: StepReport, action: Action) -> None:
        if action is not Action.GO:
            self._save(run)

    @override
    def on_trained(self, run: Run) -> None:
        if self._saved_after != run.state.steps_done:
            self._save(run)

    def _save(self, run: Run) -> None:
        run.save(self._folder)
        self._saved_after = run.state.steps_done


class StepLog(Listener):
    """Sends steps to the tracker, several at a time. ``run_id`` is known once the run is opened there."""

    def __init__(self, tracker: Tracker) -> None:
        self.run_id = ""
        self._tracker = tracker
        self._pending: list[tuple[int, dict[str, float]]] = []
        self._sent = time.monotonic()

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        self._pending.append((report.step, report.metrics()))
        if time.monotonic() - self._sent >= LOG_EVERY_S or report.step == report.total_steps:
            self.send()
        return Action.GO

    def send(self) -> None:
        """Send what is waiting."""
        if self._pending:
            self._tracker.log_steps(self.run_id, self._pending)
        self._pending, self._sent = [], time.monotonic()


class CtrlC(Listener):
    """Ends a run at the first Ctrl-C: after the current step, or at once while the model is loaded or evaluated."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self.doing = "while the model was loaded"

    @override
    def on_start(self, run: Run) -> None:
        self._interrupts.defer("this step")

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        self.doing = f"after step {report.step} of {report.total_steps}"
        return Action.STOP if self._interrupts.heard else Action.GO

    @override
    def on_trained(self, run: Run) -> None:
        self._interrupts.deliver()
        self.doing = f"while it was evaluated, after all {run.state.steps_done} steps"

    @override
    def on_evaluation(self, task: str, done: int, total: int) -> None:
        self._interrupts.check()

    @override
    def on_error(self, error: BaseException) -> Ending | None:
        if self._interrupts.heard and not isinstance(error, TrainingFailure):
            return "stopped", f"interrupted {self.doing}"
        return None
