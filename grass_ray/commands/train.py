"""``grass-ray train``: one run in this process, recorded and tracked. Needs no ray."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from typing_extensions import override

from grass_ray.commands.listeners import Checkpoints, CtrlC, StepLog
from grass_ray.commands.output import check_folder, claimed, describe_lost_test_rows, render_row
from grass_ray.config import ConfigError, CustomSource, RunConfig
from grass_ray.errors import redact
from grass_ray.execute import Ending, Listener, RunContext, RunResult, execute
from grass_ray.experiment.flags import choose_data
from grass_ray.methods import METHODS, Method, get_method
from grass_ray.overrides import parse
from grass_ray.paths import with_absolute_paths
from grass_ray.process import FAILED, INTERRUPTED, Interrupts, describe_failure
from grass_ray.progress import RunProgress
from grass_ray.results.connection import default_tracking_uri
from grass_ray.results.provenance import hardware
from grass_ray.results.record import RunRecord
from grass_ray.results.store import trial_tags
from grass_ray.results.sync import sync_command
from grass_ray.results.tracker import Tracker
from grass_ray.tasks.readback import choose_evaluation
from grass_ray.training.report import GIB, RESERVE_BYTES, TrainingFailure, first_layers

if TYPE_CHECKING:
    from grass_ray.training.run import Run

EXPERIMENT = "train"


def build_config(
    method: str | None,
    *,
    base: Path | None,
    model: str | None,
    tasks: Sequence[str] | None,
    data_dir: Path | None,
    assignments: Sequence[str],
    dataset: str | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> RunConfig:
    """Build a run's configuration from what the command line said.

    Args:
        method: one of ``methods``; None keeps that of ``base``.
        base: a ``config.yaml`` to start from; None starts from the defaults.
        model: name, hub id or folder; None keeps that of ``base``.
        tasks: a suite, tasks of one suite, or a task's YAML file; None keeps those of ``base``.
        data_dir: folder of the data; None reads the hub.
        assignments: further settings as ``dotted.key=value``.
        dataset: a file, folder or hub id in place of tasks.
        methods: the methods that there are.

    Raises:
        ConfigError: an unknown name, or a value that breaks a rule.
    """
    config = RunConfig(method=get_method("base").config) if base is None else RunConfig.from_yaml(base)
    if method is not None:
        row = get_method(method, methods)
        if base is None or config.method.name != method:
            config = config.model_copy(update={"method": row.config})
        if not row.trains:
            assignments = [*assignments, "training.steps=0"]
    if model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": model})})
    if dataset is not None and tasks:
        raise ConfigError(f"--task {' '.join(tasks)} has no effect: --data {dataset} is a task of its own")
    if tasks is not None or dataset is not None:
        suite, keys, source = choose_data(tasks or (), data_dir, dataset)
        data = config.data.model_copy(update={"suite": suite, "tasks": keys, "source": source})
        config = config.model_copy(update={"data": data})
        assignments = [*choose_evaluation(source), *assignments]
    return with_absolute_paths(config.override(parse(assignments)))


def train_locally(
    config: RunConfig,
    *,
    output: Path,
    tracking_uri: str | None,
    resume: bool,
    dry_run: bool,
    quiet: bool = False,
    memory_check: bool = True,
    memory_gib: float | None = None,
) -> int:
    """Train, evaluate and record one run.

    Args:
        config: the run.
        output: new or empty folder for everything it writes; with ``resume`` the folder of the run.
        tracking_uri: MLflow store; None takes MLFLOW_TRACKING_URI, else a database beside the output.
        resume: go on from the checkpoint in ``output``.
        dry_run: check everything and print the configuration; nothing is trained or written.
        quiet: print only the final row of the leaderboard, or why there is none.
        memory_check: refuse a run that is predicted not to fit into memory.
        memory_gib: memory that the run may take, in GiB; None takes that of the device.

    Returns:
        The exit code: 0 done, 1 failed, 130 interrupted.

    Raises:
        ConfigError: any mistake that shows before the model is loaded.
    """
    from grass_ray.commands.data_view import show_data
    from grass_ray.memory.fit import fit_to_memory
    from grass_ray.training.checks import check_run, tokenizer_to_check
    from grass_ray.training.lost_rows import find_lost_rows
    from grass_ray.training.without_effect import settings_without_effect

    if memory_gib is not None and memory_gib * GIB <= RESERVE_BYTES:
        raise ConfigError(f"--gpu-memory {memory_gib:g}: give more than the {RESERVE_BYTES / GIB:g} GiB of a process")
    check_run(config)
    memory = None if memory_gib is None else int(memory_gib * GIB)
    fitted = fit_to_memory(config, memory=memory) if memory_check else config
    if not dry_run:
        check_folder(config, output, resume)
    for line in () if quiet else settings_without_effect(config):
        print(f"without effect: {line}", file=sys.stderr)
    if config.training.steps and not quiet:
        show_data([config], Console(stderr=dry_run))
    if dry_run:
        print(config.to_yaml(), end="")
        for line in find_lost_rows(config, tokenizer_to_check(config.model)):
            print(line, file=sys.stderr)
        return 0
    with claimed(output):
        check_folder(config, output, resume)  # again, now that nobody else can write there
        tracker = Tracker(tracking_uri or _default_store(output), EXPERIMENT)
        tracker.open()
        return _LocalRun(config, output, tracker, quiet=quiet).carry_out(fitted)


def _default_store(output: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(
        output.parent.parent if output.parent.name == EXPERIMENT else output.parent
    )


class _LocalRun(Listener):
    """A run in this process: what it prints, where its files go, and how it is tracked."""

    def __init__(self, config: RunConfig, output: Path, tracker: Tracker, *, quiet: bool) -> None:
        self.config = config
        self.output = output
        self.tracker = tracker
        self.quiet = quiet
        self.console = Console()
        self._steps = StepLog(tracker)
        self._resumable = False
        self._defect: BaseException | None = None

    def carry_out(self, fitted: RunConfig) -> int:
        """Train to the end, or to the first Ctrl-C; ``fitted`` is the configuration as it fits this machine."""
        with Interrupts() as interrupts:
            self._ctrl_c = CtrlC(interrupts)

            def prepare() -> Run:
                from grass_ray.training.run import Run

                with interrupts.finishing("the start is recorded"):
                    self._open()
                return Run.prepare(fitted)

            progress = RunProgress(self.config.name, console=self.console, quiet=self.quiet)
            checkpoints = Checkpoints(self.output / "checkpoint")
            # in this order: the first lines tell of the checkpoint that was restored, and stand above the progress bar
            listeners = [checkpoints, self._ctrl_c, self, progress, self._steps]
            result = execute(self.config, prepare=prepare, listeners=listeners)
            self._resumable |= result.status == "stopped"
            if interrupts.heard > 1:  # a step may have been cut in two
                result = replace(result, run=None)
            record = self._conclude(result, interrupts)
        if self._defect is not None:
            self.tracker.close()
            raise self._defect
        return self._report(record)

    def _open(self) -> None:
        """Open the run in the store; from here on it must be closed."""
        config = self.config
        config.save(self.output / "config.yaml")
        tags = trial_tags(config.to_dict(), sweep=EXPERIMENT, stage="training", folder=str(self.output.absolute()))
        self._steps.run_id = self.tracker.start_trial(
            EXPERIMENT, config.fingerprint, config.name, tags, config.flatten()
        )

    # -- while it runs

    @override
    def on_start(self, run: Run) -> None:
        """Print the first lines: what runs, how much of it trains, on what, and where everything goes."""
        config, training = self.config, self.config.training
        trainable = sum(p.numel() for p in run.state.optimizer.active_parameters())
        total = sum(p.numel() for p in run.state.model.parameters())
        schedule = f"{training.steps} steps of {training.batch_size} rows, learning rate {config.method.optimizer.lr:g}"
        rows = {
            "run": f"{config.name} in {self.output}",
            "model": f"{config.model.name}, {config.model.dtype}",
            "method": f"{config.method.name}, {schedule if training.steps else 'untrained'}",
            "tasks": f"{config.data.suite}: {' '.join(config.data.tasks)}",
            "trains": f"{trainable:,} of {total:,} parameters at first",
            "device": hardware(),
            "config": str(self.output / "config.yaml"),
        }
        if isinstance(config.data.source, CustomSource) and config.evaluation.extraction == "strict":
            rows["answers"] = "read by strict extraction (evaluation.extraction)"
        if run.recomputed_layers:
            layers = first_layers(run.recomputed_layers, run.state.optimizer.stack.num_layers)
            rows["memory"] = f"{layers} recomputed in the backward pass (training.gradient_checkpointing)"
        if run.state.steps_done:
            rows["resumed"] = f"after step {run.state.steps_done}"
        for name, text in rows.items():
            self._say(f"{name:9} {text}")
        for line in run.lost_rows():
            self._say(line, always=True)

    @override
    def on_error(self, error: BaseException) -> Ending | None:
        """A refusal of the system can be resumed; a defect is recorded, too, and then raised."""
        if isinstance(error, TrainingFailure):
            return None
        refusal = describe_failure(error)
        if refusal is None:
            self._defect = error
            return "failed", f"{type(error).__name__}: {error}"
        self._resumable = True
        free = shutil.disk_usage(self.output).free / 1024**2
        return "failed", f"{refusal} ({self._ctrl_c.doing}; {free:.1f} MiB are free in {self.output})"

    # -- the end

    def _conclude(self, result: RunResult, interrupts: Interrupts) -> RunRecord:
        """Write the record and what goes with it, and close the run in the store, however much of it still can be."""
        from grass_ray.results.figures.registry import write_run_plots

        run_id = f"{EXPERIMENT}-{self.config.fingerprint}"
        record = result.record(RunContext(sweep=EXPERIMENT, sweep_id=EXPERIMENT, run_id=run_id))
        try:
            with interrupts.finishing("the results are written"):
                record.save(self.output / "record.json")
                result.write_files(self.output)
                if result.outcome is not None:
                    write_run_plots(record, self.output)
        except KeyboardInterrupt:
            pass  # the figures at most are missing
        except Exception as error:
            refusal = describe_failure(error)
            if refusal is None:
                raise
            if record.status == "finished":
                record.status, record.failure = "failed", f"not all results could be written: {refusal}"
                self._resumable = True
        interrupts.ignore()
        if self._steps.run_id:
            self._steps.send()
            self.tracker.finish(self._steps.run_id, record, self.output)
        return record

    def _report(self, record: RunRecord) -> int:
        """Print how the run ended and where everything is; returns the exit code."""
        self.tracker.close()
        if record.status == "finished":
            self._say(render_row(record), always=True)
        else:
            print(f"{record.status}: {record.failure}", file=sys.stderr)
        for line in describe_lost_test_rows(record):
            self._say(line, always=True)
        self._say(f"record    {self.output / 'record.json'}")
        self._say(f"tracking  {redact(self.tracker.tracking_uri)}, experiment {EXPERIMENT}, run {self._steps.run_id}")
        if self.tracker.lacking:
            command = sync_command(self.output, self.tracker.tracking_uri)
            self._say(
                f"MLflow lacks {self.tracker.lacking} messages of this run; to send them once it answers:  {command}",
                always=True,
            )
        if self._resumable:
            words = [word for word in sys.argv[1:] if word != "--resume"]
            self._say(f"go on     {redact(shlex.join(['grass-ray', *words, '--resume']))}", always=True)
        return {"finished": 0, "stopped": INTERRUPTED}.get(record.status, FAILED)

    def _say(self, text: str, *, always: bool = False) -> None:
        """Print; with ``--quiet`` only what must ``always`` be said."""
        if always or not self.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
