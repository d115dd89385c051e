"""Where trials' results arrive in the driver: the store of trials behind the callback of Tune.

Workers never write MLflow: one writer, the driver, finds or creates each trial's run by tag, so that nothing is doubled
when a sweep is resumed::

    trial_store = TrialStore(plan, storage, tracker, progress, scratch, overview)
    Tuner(..., run_config=tune.RunConfig(callbacks=[SweepCallback(trial_store)]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grass_ray.cluster.job import RECORD_FILE, TRACEBACK_FILE
from grass_ray.cluster.listeners import passed_file
from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, RunConfig
from grass_ray.experiment.plan import SweepPlan
from grass_ray.progress import SweepProgress
from grass_ray.results.overview import Overview
from grass_ray.results.provenance import build_record, now
from grass_ray.results.record import RunRecord, SearchPart, Status
from grass_ray.results.store import tracked_runs, trial_tags
from grass_ray.results.tracker import Tracker
from grass_ray.results.writes import digest
from grass_ray.training.report import VALIDATION

Steps = Iterable[tuple[int, dict[str, float]]]

# what is shown of a trial without an accuracy
_LOSSES = {"loss": "eval/loss", "lm-eval": "lm_eval/average", "validation loss": VALIDATION}


@dataclass(kw_only=True)
class _Trial:
    """What the driver knows of one trial.

    Attributes:
        config: the trial.
        search: the search that it belongs to.
        run_id: of its run in MLflow; None until it is opened.
        started_at: ISO time; None until it starts.
        logged: the last step that MLflow was told of.
        seen: metrics by step, as its process reported them; only of a search's trials.
        machine: where its process runs, as the record will say.
        stopped: the record of a trial that a scheduler stopped.
    """

    config: RunConfig
    search: SearchPart | None = None
    run_id: str | None = None
    started_at: str | None = None
    logged: int = 0
    seen: dict[int, dict[str, float]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    stopped: RunRecord | None = None


class TrialStore:
    """A sweep's trials as the driver knows them: which ended and how, in MLflow and on the terminal.

    Args:
        plan: the sweep.
        storage: the sweep's folder.
        tracker: writes MLflow.
        progress: writes the terminal.
        scratch: holds copies of trials' files until the tracker is closed.
        overview: the sweep's page in MLflow.

    Attributes:
        records: of the trials that ended, by key, without what was measured at every step: a sweep may have thousands.
        digests: of the same records as they were written.
        lost: trials that Tune gave up though they may fail again: why, and all that is known of it, by key.
    """

    def __init__(
        self,
        plan: SweepPlan,
        storage: Storage,
        tracker: Tracker,
        progress: SweepProgress,
        scratch: Path,
        overview: Overview,
    ) -> None:
        self.plan = plan
        self.storage = storage
        self.tracker = tracker
        self.progress = progress
        self.overview = overview
        self.records: dict[str, RunRecord] = {}
        self.digests: dict[str, str] = {}
        self.lost: dict[str, tuple[str, str]] = {}
        self._scratch = scratch
        self._complete: dict[str, str | None] | None = None
        self._files: dict[str, Path] = {}
        self._questions: dict[str, str] = {}
        self._trials = {config.fingerprint: _Trial(config=config) for config in plan.trials}

    # -- what happens to a trial

    def add(self, config: RunConfig, search: SearchPart) -> None:
        """Learn of a trial of a search, or of its winner, which may not have been known when the sweep began."""
        self._trials.setdefault(config.fingerprint, _Trial(config=config)).search = search
        self.progress.add(config.fingerprint, config.name)

    def start(self, key: str) -> None:
        """A trial starts, or a population's member goes on: find or create its run."""
        trial = self._trials[key]
        trial.started_at = trial.started_at or now()
        self._open_run(trial)
        self.progress.start(key)

    def result(self, key: str, report: Mapping[str, Any]) -> None:
        """A trial reported: log the steps that are new, and show its progress."""
        trial, phase = self._trials[key], report.get("phase")
        steps = report.get("steps", ())
        self._log_new_steps(trial, steps)
        if trial.search is not None:  # a trial that is stopped early leaves no record of its own
            for step, metrics in steps:
                trial.seen.setdefault(step, {}).update(metrics)
            trial.machine = report.get("machine", trial.machine)
        if phase == "restored":
            self.progress.note(key, f"goes on from its checkpoint after step {report['after_step']}")
        elif phase == "died":
            self.progress.note(key, report["failure"])
        elif phase == "generation":  # a population's member sleeps until the others are as far
            self.progress.update(key, "waiting", {})
        elif phase in ("training", "evaluating"):
            self.progress.update(key, phase, report["view"])

    def let_pass(self, key: str, train_step: int) -> None:
        """Tell a trial that waits at a rung to go on."""
        self.storage.write_text("", self._trials[key].config.folder, passed_file(train_step))

    def stop_early(self, key: str, train_step: int, reason: str) -> None:
        """A scheduler stopped a trial after a training step: write the record that its process can write no more."""
        trial = self._trials[key]
        # the step of the loss that the scheduler judged by; it counts the probing, too
        last = max((step for step, metrics in trial.seen.items() if VALIDATION in metrics), default=train_step)
        series: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in sorted(trial.seen.items()):
            for name, value in metrics.items() if step <= last else ():
                series.setdefault(name, []).append((step, value))
        record = self._record_without_outcome(trial, "stopped", reason)
        record.series = series
        record.metrics = {name: points[-1][1] for name, points in series.items()}
        if record.search is not None:
            record.search.stopped_after = train_step
        trial.stopped = record
        self._write(trial, record)
        self.end(key, None)

    def end(self, key: str, failure: str | None, error: str = "", *, earlier: bool = False) -> None:
        """A trial ended: close its run with its record.

        Args:
            key: the trial's.
            failure: why its process died; None if it did not.
            error: all that is known of it.
            earlier: it ended before this process began.
        """
        trial = self._trials[key]
        folder = trial.config.folder
        if failure is None and not self.storage.exists(folder, RECORD_FILE):
            failure = "the trial ended without a record"
        if failure is not None:  # write the record that the dead process could not; --resume tries such a trial again
            if not self.storage.exists(folder, TRACEBACK_FILE):
                self.storage.write_text(error or failure, folder, TRACEBACK_FILE)
            self._write(trial, self._record_without_outcome(trial, "failed", failure))
        files = self._fetch(trial)
        record = RunRecord.load(files / RECORD_FILE)
        self.digests[key] = digest(record)
        if not (earlier and self._is_complete(record.run_id, self.digests[key])):
            self.tracker.finish(self._open_run(trial), record, files)
        self.records[key] = record.without_steps(self._questions)
        self._files[record.run_id] = files / RECORD_FILE
        trial.seen.clear()
        self.progress.end(
            key,
            record.status,
            accuracy=record.metrics.get("eval/average"),
            loss=_loss(record),
            failure=record.failure,
            earlier=_earlier(record) if earlier else "",
        )
        if not earlier:  # a resumed sweep begins with many at once
            self.overview.show(self.records.values(), self.whole_record)

    def whole_record(self, record: RunRecord) -> RunRecord:
        """One of :attr:`records` with what was measured at every step; as it is if its file is gone."""
        with suppress(ConfigError):
            return RunRecord.load(self._files[record.run_id])
        return record

    # -- what happens to the sweep

    def settle(self) -> None:
        """No process of a trial is left: discard what stopped ones wrote in their last moments."""
        for trial in self._trials.values():
            if trial.stopped is not None:
                self._write(trial, trial.stopped)
                self.storage.remove("ray", f"train-{trial.config.fingerprint}")

    def stop_running(self, status: Status, reason: str) -> None:
        """The sweep ends early: close the runs of the trials that have not ended, without a record in storage."""
        for key, trial in self._trials.items():
            if trial.started_at is not None and key not in self.records:
                record = self._record_without_outcome(trial, status, reason)
                self.tracker.finish(self._open_run(trial), record, self._fetch(trial))

    # -- MLflow and files

    def _is_complete(self, run_id: str, sha256: str) -> bool:
        """Whether MLflow has all of a trial that ended before this process began; it is asked once for all trials."""
        if self._complete is None:
            self._complete = {}
            with suppress(ConfigError):  # a store that does not answer is told of every trial once it does
                self._complete = {run.run_id: run.record_sha256 for run in tracked_runs(self.plan.tracking_uri)}
        return self._complete.get(run_id) == sha256

    def _log_new_steps(self, trial: _Trial, steps: Steps) -> None:
        """Log the steps after the last one logged; the tracker knows those that an earlier driver logged."""
        new = [(step, metrics) for step, metrics in steps if step > trial.logged]
        if new:
            trial.logged = new[-1][0]
            self.tracker.log_steps(self._open_run(trial), new)

    def _open_run(self, trial: _Trial) -> str:
        """The trial's run in MLflow, found or created once."""
        if trial.run_id is None:
            config = trial.config
            stage = "trial" if trial.search is None else trial.search.stage
            folder = f"{self.storage.shown}/{config.folder}"
            tags = trial_tags(config.to_dict(), sweep=self.plan.name, stage=stage, folder=folder)
            trial.run_id = self.tracker.start_trial(
                self.plan.sweep_id, trial.config.fingerprint, config.name, tags, config.flatten()
            )
        return trial.run_id

    def _fetch(self, trial: _Trial) -> Path:
        """The trial's files in a local folder."""
        folder = trial.config.folder
        local = self.storage.join(folder).local_folder
        if local is None:
            local = self._scratch / folder
            local.mkdir(exist_ok=True)
            self.storage.download(local, folder)
        return local

    def _write(self, trial: _Trial, record: RunRecord) -> None:
        self.storage.write_text(record.model_dump_json(indent=1), trial.config.folder, RECORD_FILE)

    def _record_without_outcome(self, trial: _Trial, status: Status, failure: str) -> RunRecord:
        return build_record(
            run_id=f"{self.plan.sweep_id}-{trial.config.fingerprint}",
            sweep=self.plan.name,
            sweep_id=self.plan.sweep_id,
            config=trial.config,
            status=status,
            failure=failure,
            outcome=None,
            started_at=trial.started_at or now(),
            **trial.machine,
            search=None if trial.search is None else trial.search.model_copy(),
        )


def _earlier(record: RunRecord) -> str:
    return "before this resume" if record.reused_from is None else f"taken over from {record.reused_from}"


def _loss(record: RunRecord) -> tuple[str, float] | None:
    """The loss on the test, or else on held-out training rows, and its name."""
    found = [(name, record.metrics[key]) for name, key in _LOSSES.items() if key in record.metrics]
    return found[0] if found else None
