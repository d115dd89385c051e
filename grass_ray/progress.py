"""Progress of a run and of a sweep: a live display on a terminal, a plain line now and then elsewhere.

::

    execute(config, listeners=[RunProgress(config.name)])

    with SweepProgress("quickstart", [(trial.fingerprint, trial.name) for trial in plan.trials]) as progress:
        progress.start(key)
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from grass_ray.execute import Action, Listener
from grass_ray.training.report import StepReport

if TYPE_CHECKING:
    from grass_ray.training.run import Run

PLAIN_LINE_EVERY_S = 15.0

State = Literal["waiting", "starting", "training", "evaluating", "finished", "failed", "out_of_memory", "stopped"]
ENDED: tuple[State, ...] = ("finished", "failed", "out_of_memory", "stopped")


def quiet_libraries() -> None:
    """Silence messages for libraries' own developers; call it before torch and tqdm are imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler about memory allocated before it started
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of loading and saving, a line per tick
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # about a home folder that cannot be written to
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message="`past_key_values` is deprecated", category=FutureWarning
    )  # peft's prefix


def step_summary(report: StepReport) -> dict[str, Any]:
    """Return the part of a step that displays show, as plain values."""
    return {
        "step": report.step,
        "total_steps": report.total_steps,
        "loss": report.loss,
        "tokens_per_second": report.tokens / report.step_s if report.step_s > 0 else 0.0,
        "peak_gib": report.peak_allocated_gib,
        "active_layers": list(report.active_layers),
        "step_s": report.step_s,
    }


def describe_step(values: Mapping[str, Any]) -> str:
    """One line on a step: ``step 20/50  loss 1.234  310 tok/s  peak 2.10 GiB  layers 3 17``."""
    if not values.get("step"):
        return ""
    return (
        f"step {values['step']}/{values['total_steps']}  loss {values['loss']:.3f}  "
        f"{values['tokens_per_second']:.0f} tok/s  peak {values['peak_gib']:.2f} GiB  "
        f"layers {describe_layers(values['active_layers'])}"
    )


def describe_layers(layers: Sequence[int]) -> str:
    """Active layers in few characters: ``3 17``, ``0-29``, ``none``."""
    if not layers:
        return "none"
    if len(layers) > 4 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    shown = " ".join(str(layer) for layer in layers[:6])
    return shown if len(layers) <= 6 else f"{shown} +{len(layers) - 6}"


def describe_seconds(seconds: float) -> str:
    """A duration: ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class RunProgress(Listener):
    """Progress of one run in this process: a bar on a terminal, a plain line every ``every_s`` seconds elsewhere.

    Also a context manager, for an evaluation alone.

    Args:
        name: what stands at the beginning of the line.
        console: where to print; by default the terminal.
        every_s: seconds between plain lines.
        quiet: show nothing.
    """

    def __init__(
        self,
        name: str,
        *,
        console: Console | None = None,
        every_s: float = PLAIN_LINE_EVERY_S,
        quiet: bool = False,
    ) -> None:
        self.name = name
        self.console = Console(quiet=True) if quiet else console or Console()
        self.every_s = every_s
        self._last_line = float("-inf")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None, detail="loading")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    @override
    def on_start(self, run: Run) -> None:
        self._bar.start()

    @override
    def on_step(self, run: Run, report: StepReport) -> Action:
        values = step_summary(report)
        eta = describe_seconds((report.total_steps - report.step) * report.step_s)
        self._show(report.step, report.total_steps, f"{describe_step(values)}  ETA {eta}")
        return Action.GO

    @override
    def on_evaluation(self, task: str, done: int, total: int) -> None:
        self._show(done, total, f"evaluating {task} {done}/{total}")

    @override
    def on_end(self) -> None:
        self._bar.stop()

    def _show(self, done: int, total: int, detail: str) -> None:
        self._bar.update(self._task, completed=done, total=total, detail=detail)
        due = time.monotonic() - self._last_line >= self.every_s or done == total
        if not self.console.is_terminal and due:
            self._last_line = time.monotonic()
            self.console.print(f"{self.name}  {detail}", soft_wrap=True, highlight=False)


@dataclass(kw_only=True)
class TrialView:
    """One trial on the display."""

    name: str
    key: str
    state: State = "waiting"
    values: dict[str, Any] = field(default_factory=dict)
    accuracy: float | None = None
    loss: tuple[str, float] | None = None  # which one, where there is no accuracy
    failure: str | None = None
    started: float | None = None
    seconds: float | None = None
    earlier: str = ""

    def describe(self) -> str:
        """One line about the trial."""
        if self.state == "finished":
            result = "accuracy -" if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %"
            if self.accuracy is None and self.loss is not None:
                result = f"{self.loss[0]} {self.loss[1]:.4f}"
            took = "" if self.seconds is None else f" in {describe_seconds(self.seconds)}"
            return f"finished{took}  {result}" + (f"  ({self.earlier})" if self.earlier else "")
        if self.state in ENDED:
            return f"{self.state}: {self.failure or 'no reason known'}"
        if self.state == "evaluating" and self.values.get("task"):
            return f"evaluating {self.values['task']} {self.values.get('done', 0)}/{self.values.get('total', '?')}"
        return f"{self.state}  {describe_step(self.values)}".rstrip()


class SweepProgress:
    """Progress of a sweep: trials done, running and failed, the state of each, the best so far, and an ETA.

    Args:
        title: the sweep's name.
        trials: (key, name) of those that are known.
        slots: how many run at once.
        console: where to print; by default the terminal.
        every_s: seconds between plain lines.
        quiet: show nothing.
        expected: how many trials there will be, if a search adds more.
    """

    def __init__(
        self,
        title: str,
        trials: Sequence[tuple[str, str]],
        *,
        slots: int = 1,
        console: Console | None = None,
        every_s: float = PLAIN_LINE_EVERY_S,
        quiet: bool = False,
        expected: int = 0,
    ) -> None:
        self.expected = expected
        self.title = title
        self.console = Console(quiet=True) if quiet else console or Console()
        self.every_s = every_s
        self.slots = slots
        self.trials = {key: TrialView(name=name, key=key) for key, name in trials}
        self._last_line = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # -- what happened

    def add(self, key: str, name: str) -> None:
        """Add a trial unless it is known."""
        self.trials.setdefault(key, TrialView(name=name, key=key))

    def start(self, key: str) -> None:
        """A trial's processes are starting."""
        trial = self.trials[key]
        trial.state = "starting"
        trial.started = trial.started or time.monotonic()
        self._say(trial)

    def update(self, key: str, state: State, values: Mapping[str, Any]) -> None:
        """A trial trains or evaluates."""
        trial = self.trials[key]
        trial.state = state
        trial.values.update(values)
        self.tick()

    def note(self, key: str, text: str) -> None:
        """Print a line about a trial that stays on the screen."""
        self._print(f"{self.trials[key].name} {key}  {text}")

    def end(
        self,
        key: str,
        state: State,
        *,
        accuracy: float | None,
        failure: str | None,
        loss: tuple[str, float] | None = None,
        earlier: str = "",
    ) -> None:
        """A trial ended; ``earlier`` says when, if it was before this process began, so that it took no time now."""
        trial = self.trials[key]
        trial.loss = loss
        trial.state, trial.accuracy, trial.failure, trial.earlier = state, accuracy, failure, earlier
        if trial.started is not None:
            trial.seconds = time.monotonic() - trial.started
        self._say(trial)

    def tick(self) -> None:
        """Print plain lines if they are due and this is no terminal."""
        if self._live is None and time.monotonic() - self._last_line >= self.every_s:
            for trial in self._running():
                self._say(trial)

    # -- how it looks

    def summary(self) -> str:
        """``3 of 8 done, 1 running, 1 failed, best full-... 28.0 %, ETA 4 min 10 s``."""
        ended = [trial for trial in self.trials.values() if trial.state in ENDED]
        stopped = sum(trial.state == "stopped" for trial in ended)
        failed = sum(trial.state != "finished" for trial in ended) - stopped
        number = max(len(self.trials), self.expected)
        parts = [f"{len(ended)} of {number} done", f"{len(self._running())} running", f"{failed} failed"]
        if stopped:
            parts.append(f"{stopped} stopped early")
        scored = [trial for trial in ended if trial.accuracy is not None]
        if scored:
            best = max(scored, key=lambda trial: trial.accuracy or 0.0)
            parts.append(f"best {best.name} {100 * (best.accuracy or 0.0):.1f} %")
        eta = self._eta_s()
        if eta is not None:
            parts.append(f"ETA {describe_seconds(eta)}")
        return ", ".join(parts)

    def render(self) -> RenderableType:
        """The live display."""
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        colours = {"finished": "green", "failed": "red", "out_of_memory": "red", "stopped": "yellow", "waiting": "dim"}
        for trial in self._shown():
            table.add_row(Text(trial.name), Text(trial.describe(), style=colours.get(trial.state, "cyan")))
        return Group(Text(f"{self.title}: {self.summary()}", style="bold"), table)

    def _shown(self, most: int = 24) -> list[TrialView]:
        """The trials to show: all of a small sweep; of a large one those running, then those that ended last."""
        trials = list(self.trials.values())
        if len(trials) <= most:
            return trials
        ended = [trial for trial in trials if trial.state in ENDED]
        return [*self._running(), *ended[-(most - len(self._running())) :]]

    def _running(self) -> list[TrialView]:
        return [trial for trial in self.trials.values() if trial.state in ("starting", "training", "evaluating")]

    def _eta_s(self) -> float | None:
        took = [trial.seconds for trial in self.trials.values() if trial.seconds is not None]
        if not took or (
            len(self.trials) >= self.expected and all(trial.state in ENDED for trial in self.trials.values())
        ):
            return None
        mean = sum(took) / len(took)
        waiting = sum(trial.state == "waiting" for trial in self.trials.values())
        waiting += max(0, self.expected - len(self.trials))
        now = time.monotonic()
        running = sum(max(0.0, mean - (now - (trial.started or now))) for trial in self._running())
        return (waiting * mean + running) / self.slots

    def _say(self, trial: TrialView) -> None:
        if self._live is None:
            self._last_line = time.monotonic()
            self._print(f"[{self.summary()}] {trial.name} {trial.key}  {trial.describe()}")
        elif trial.state in ENDED:
            self._print(f"{trial.name} {trial.key}  {trial.describe()}")

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)
