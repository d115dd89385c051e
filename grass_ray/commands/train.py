"""One run or one evaluation in this process: what ``grass-ray train`` and ``grass-ray eval`` do. Needs no ray.

The loop is the sweep's; here a progress bar, a checkpoint folder and the tracker listen to it.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from grass_ray.config import ConfigError, CustomSource, RunConfig
from grass_ray.experiment.flags import choose_data
from grass_ray.methods import get_method
from grass_ray.overrides import parse
from grass_ray.paths import with_absolute_paths
from grass_ray.process import FAILED, INTERRUPTED, Interrupts, describe_failure
from grass_ray.progress import RunProgress
from grass_ray.results.provenance import build_record, hardware, now, redact, write_engagement, write_examples
from grass_ray.results.record import RunRecord, Status
from grass_ray.results.store import default_tracking_uri
from grass_ray.results.tracking import Tracker
from grass_ray.tasks.readback import choose_extraction
from grass_ray.tasks.scores import accuracy_metrics, workload_metrics
from grass_ray.training.report import RunOutcome, StepReport, TrainingFailure

if TYPE_CHECKING:
    from grass_ray.training.run import Run

EXPERIMENT = "train"
LOG_EVERY_S = 10.0


def build_config(
    method: str | None,
    *,
    base: Path | None,
    model: str | None,
    tasks: Sequence[str] | None,
    data_dir: Path | None,
    assignments: Sequence[str],
) -> RunConfig:
    """A run's configuration from what the command line said; None leaves what ``base`` (or the default) says.

    Raises:
        ConfigError: an unknown name, or a value that breaks a rule.
    """
    config = RunConfig(method=get_method("base").config) if base is None else RunConfig.from_yaml(base)
    row = None
    if method is not None:
        row = get_method(method)
        if base is None or config.method.name != method:
            config = config.model_copy(update={"method": row.config})
    if row is not None and not row.trains:
        assignments = [*assignments, "training.steps=0"]
    if model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": model})})
    if tasks is not None:
        suite, keys, source = choose_data(tasks, data_dir)
        data = config.data.model_copy(update={"suite": suite, "tasks": keys, "source": source})
        config = config.model_copy(update={"data": data})
        assignments = [*choose_extraction(source), *assignments]
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
) -> int:
    """Train, evaluate and record one run; returns the exit code (0 done, 1 failed, 130 interrupted).

    ``quiet`` prints only the final leaderboard row, or why there is none. ``memory_check`` refuses what cannot fit.

    Raises:
        ConfigError: any mistake that shows before the model is loaded.
    """
    from grass_ray.memory.fit import fit_to_memory
    from grass_ray.training.lost_rows import find_lost_rows
    from grass_ray.training.run import check_run, tokenizer_to_check
    from grass_ray.training.without_effect import settings_without_effect

    check_run(config)
    fitted = fit_to_memory(config) if memory_check else config
    if not dry_run:
        _check_folder(config, output, resume)
    for line in () if quiet else settings_without_effect(config):
        print(f"without effect: {line}", file=sys.stderr)
    if dry_run:
        print(config.to_yaml(), end="")
        for line in find_lost_rows(config, tokenizer_to_check(config.model)):
            print(line, file=sys.stderr)
        return 0
    with claimed(output):
        _check_folder(config, output, resume)  # again, now that nobody else can write there
        tracker = Tracker(tracking_uri or _default_store(output), EXPERIMENT)
        tracker.open()
        return _LocalRun(config, output, tracker, quiet=quiet).carry_out(fitted)


class _LocalRun:
    """The listeners of one local run: progress, checkpoints, tracker, record."""

    def __init__(self, config: RunConfig, output: Path, tracker: Tracker, *, quiet: bool) -> None:
        self.config = config
        self.output = output
        self.checkpoint = output / "checkpoint"
        self.tracker = tracker
        self.console = Console()
        self.quiet = quiet
        self.started_at = now()
        self.run_id = ""
        self.run: Run | None = None
        self._goes_on = False  # with --resume
        self._doing = "while the model was loaded"
        self._pending: list[tuple[int, dict[str, float]]] = []
        self._logged = time.monotonic()

    def carry_out(self, fitted: RunConfig) -> int:
        """Train to the end, or to the first Ctrl-C; ``fitted`` is the configuration as it fits this machine."""
        status: Status = "finished"
        failure: str | None = None
        with Interrupts() as interrupts:
            try:
                with interrupts.finishing("the start is recorded"):
                    self._start()
                self._train(fitted, interrupts)
            except TrainingFailure as problem:
                status, failure = problem.status, problem.reason
            except BaseException as problem:
                refusal = describe_failure(problem)
                if interrupts.heard:
                    status, failure = "stopped", f"interrupted {self._doing}"
                    self._goes_on = True
                elif refusal is None:
                    self._conclude("failed", f"{type(problem).__name__}: {problem}", interrupts)
                    self.tracker.close()
                    raise
                else:
                    free = shutil.disk_usage(self.output).free / 1024**2
                    status, failure = "failed", f"{refusal} ({self._doing}; {free:.1f} MiB are free in {self.output})"
                    self._goes_on = True
            record = self._conclude(status, failure, interrupts)
        return self._report(record)

    def _start(self) -> None:
        """Open the run in the store; from here on it must be closed."""
        config = self.config
        config.save(self.output / "config.yaml")
        tags = {
            "method": config.method.name,
            "model": config.model.name,
            "suite": config.data.suite,
            "seed": str(config.seed),
            "sweep": EXPERIMENT,
            "stage": "training",
            "folder": str(self.output.absolute()),
        }
        self.run_id = self.tracker.start_trial(EXPERIMENT, config.fingerprint, config.name, tags, config.flatten())

    def _train(self, fitted: RunConfig, interrupts: Interrupts) -> None:
        from grass_ray.training.run import Run

        run = self.run = Run.prepare(fitted)
        if self.checkpoint.is_dir():
            run.restore(self.checkpoint)
        self._print_head(run.state.optimizer.active_parameters(), run.state.model, run.state.steps_done)
        for line in run.lost_rows():
            self._say(line, always=True)
        every = self.config.training.checkpoint_every_steps
        with self._progress() as progress:
            with interrupts.finishing("this step"):
                for report in run.fit():
                    self._doing = f"after step {report.step} of {report.total_steps}"
                    progress.step(report)
                    self._log(report)
                    if every is not None and report.step % every == 0:
                        run.save(self.checkpoint)
                    if interrupts.heard:
                        break
                run.save(self.checkpoint)
            self._doing = f"while it was evaluated, after all {run.state.steps_done} steps"

            def show(task: str, done: int, total: int) -> None:
                interrupts.check()
                progress.evaluating(task, done, total)

            run.evaluate(on_progress=show)

    def _progress(self) -> RunProgress:
        return RunProgress(self.config.name, console=self.console, quiet=self.quiet)

    def _say(self, text: str, *, always: bool = False) -> None:
        """Print; with ``--quiet`` only what must ``always`` be said."""
        if always or not self.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _log(self, report: StepReport) -> None:
        """Send steps to the tracker, several at a time."""
        self._pending.append((report.step, report.metrics()))
        if time.monotonic() - self._logged >= LOG_EVERY_S or report.step == report.total_steps:
            self.tracker.log_steps(self.run_id, self._pending)
            self._pending, self._logged = [], time.monotonic()

    def _conclude(self, status: Status, failure: str | None, interrupts: Interrupts) -> RunRecord:
        """Write the record and what goes with it, and close the run in the store, however much of it still can be."""
        from grass_ray.results.figures.registry import write_run_plots

        # after a second Ctrl-C a step may have been cut in two
        outcome = None if self.run is None or interrupts.heard > 1 else self.run.outcome()
        record = self._record(status, failure, outcome)
        try:
            with interrupts.finishing("the results are written"):
                record.save(self.output / "record.json")
                if outcome is not None:
                    write_examples(self.output / "examples.jsonl", outcome.tasks)
                    write_engagement(self.output, outcome.engagement)
                    write_run_plots(record, self.output)
        except KeyboardInterrupt:
            pass  # the pictures at most are missing
        except Exception as problem:
            refusal = describe_failure(problem)
            if refusal is None:
                raise
            if record.status == "finished":
                record.status, record.failure = "failed", f"not all results could be written: {refusal}"
                self._goes_on = True
        interrupts.ignore()
        if self.run_id:
            if self._pending:
                self.tracker.log_steps(self.run_id, self._pending)
            self.tracker.finish(self.run_id, record, self.output)
        return record

    def _record(self, status: Status, failure: str | None, outcome: RunOutcome | None) -> RunRecord:
        import torch

        from grass_ray.training.weights import base_model_sha256

        return build_record(
            run_id=f"{EXPERIMENT}-{self.config.fingerprint}",
            sweep=EXPERIMENT,
            sweep_id=EXPERIMENT,
            config=self.config,
            status=status,
            failure=failure,
            outcome=outcome,
            started_at=self.started_at,
            model_sha256=None if outcome is None else base_model_sha256(self.config.model),
            threads=torch.get_num_threads(),
        )

    def _report(self, record: RunRecord) -> int:
        from grass_ray.results.leaderboard import build_leaderboard
        from grass_ray.results.rendering import render

        unsent = self.tracker.close()
        if record.status == "finished":
            self._say(render(build_leaderboard([record])), always=True)
        else:
            print(f"{record.status}: {record.failure}", file=sys.stderr)
        for line in _lost_test_rows(record):
            self._say(line, always=True)
        self._say(f"record    {self.output / 'record.json'}")
        self._say(f"tracking  {redact(self.tracker.tracking_uri)}, experiment {EXPERIMENT}, run {self.run_id}")
        if unsent:
            self._say(f"MLflow did not answer: it lacks the last {unsent} messages of this run", always=True)
        if self._goes_on:
            words = [word for word in sys.argv[1:] if word != "--resume"]
            self._say(f"go on     {shlex.join(['grass-ray', *words, '--resume'])}", always=True)
        return {"finished": 0, "stopped": INTERRUPTED}.get(record.status, FAILED)

    def _print_head(self, active: Sequence[object], model: object, steps_done: int) -> None:
        """First lines: what runs, how much of it trains, on what, and where everything goes."""
        trainable = sum(p.numel() for p in active)  # type: ignore[attr-defined]
        total = sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]
        config = self.config
        rows = {
            "run": f"{config.name} in {self.output}",
            "model": f"{config.model.name}, {config.model.dtype}",
            "method": f"{config.method.name}, {_schedule(config)}",
            "tasks": f"{config.data.suite}: {' '.join(config.data.tasks)}",
            "trains": f"{trainable:,} of {total:,} parameters at first",
            "device": hardware(),
            "config": str(self.output / "config.yaml"),
        }
        if isinstance(config.data.source, CustomSource) and config.evaluation.extraction == "strict":
            rows["answers"] = "read by strict extraction (evaluation.extraction)"
        if steps_done:
            rows["resumed"] = f"after step {steps_done}"
        for name, text in rows.items():
            self._say(f"{name:9} {text}")


def _schedule(config: RunConfig) -> str:
    """How much it trains, in a few words."""
    training = config.training
    if not training.steps:
        return "untrained"
    return f"{training.steps} steps of {training.batch_size} rows, learning rate {config.method.optimizer.lr:g}"


def evaluate_locally(config: RunConfig, *, run_folder: Path | None, output: Path | None, quiet: bool = False) -> int:
    """Evaluate a model, or the trained model in ``run_folder``; prints a table and returns the exit code.

    Raises:
        ConfigError: any mistake that shows before the model is loaded.
    """
    from grass_ray.export.model import check_output, load_trained_model
    from grass_ray.results.leaderboard import build_leaderboard
    from grass_ray.results.rendering import render
    from grass_ray.tasks.evaluation import check_evaluation, evaluate
    from grass_ray.tasks.lm_eval_results import HarnessResults
    from grass_ray.tasks.readback import check_answers
    from grass_ray.tasks.sources import check_data
    from grass_ray.training.models import cache_folder, check_lengths, check_model, load_model, load_tokenizer
    from grass_ray.training.weights import base_model_sha256

    check_model(config.model)
    check_lengths(config.model_copy(update={"training": config.training.model_copy(update={"steps": 0})}))
    check_data(config.data, training=False)
    check_evaluation(config.data, config.evaluation)
    check_answers(config.data, config.evaluation, load_tokenizer(config.model), online=True)
    if output is not None:
        check_output(output)
        with claimed(output):
            pass  # it can be written to
    started_at = now()
    collected = HarnessResults()
    loaded = load_model(config.model) if run_folder is None else load_trained_model(run_folder)
    with RunProgress(f"eval {config.name}", quiet=quiet) as progress:
        results = evaluate(
            loaded.model,
            loaded.tokenizer,
            config.data,
            config.evaluation,
            cache=cache_folder() / "tokens",
            on_progress=progress.evaluating,
            on_outcome=collected.add,
        )
    record = build_record(
        run_id=f"eval-{config.fingerprint}",
        sweep="eval",
        sweep_id="eval",
        config=config,
        status="finished",
        failure=None,
        outcome=RunOutcome(
            metrics=accuracy_metrics(results) | workload_metrics(results),
            series={},
            tasks=results,
            engagement=None,
            data={},
            model_revision=loaded.revision,
        ),
        started_at=started_at,
        model_sha256=base_model_sha256(config.model),
    )
    print(render(build_leaderboard([record])))
    for line in _lost_test_rows(record):
        print(line)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        record.save(output / "record.json")
        write_examples(output / "examples.jsonl", results)
        name = config.model.name if run_folder is None else str(run_folder)
        collected.write(output / "lm_eval", model=name, evaluation=config.evaluation)
        if not quiet:
            print(f"wrote {output}/record.json, examples.jsonl and lm_eval/")
    return 0


def _lost_test_rows(record: RunRecord) -> list[str]:
    """A line for each set of test rows of which some could not be used, or not as a whole."""
    skipped = {task: score.protocol.get("test_rows_skipped", 0) for task, score in record.tasks.items()}
    said = [f"skipped   {lost} test rows of {task}: they could not be used" for task, lost in skipped.items() if lost]
    if cut := record.metrics.get("evaluation/prompts_cut"):
        said.append(
            f"cut       {cut:.0f} test prompts at their beginning: the model has no room for them; take one with more "
            "positions, or a smaller max_new_tokens"
        )
    return said


def _default_store(output: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(
        output.parent.parent if output.parent.name == EXPERIMENT else output.parent
    )


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold an output folder that can be written to, and no other process writes to; made where there is none.

    Raises:
        ConfigError: it cannot be written to, or another run writes there.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot write to the output {output}: {error.strerror}; name another folder") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            made = False
            raise ConfigError(f"another run is writing to the output {output}; wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # something was written
                output.rmdir()


def _check_folder(config: RunConfig, output: Path, resume: bool) -> None:
    """A new run needs a new or empty folder; a resumed one the folder of the same configuration."""
    from grass_ray.export.model import check_output

    if not resume:
        check_output(output)
        return
    saved = output / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"nothing to resume in {output}: it has no config.yaml; leave --resume out to start there")
    if RunConfig.from_yaml(saved) != config:
        raise ConfigError(f"{output} holds a run with another configuration; resume with the flags it was started with")
