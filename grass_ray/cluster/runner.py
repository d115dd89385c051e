"""One process's work on a plan: open the tracker, run the trials that are left, sum up.

::

    code = SweepRunner(plan, root, storage, options, console).run("python sweeps/quickstart.py --resume")
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from grass_ray.cluster.reporter import SweepCallback, TrialStore
from grass_ray.cluster.search import MethodSearch
from grass_ray.cluster.session import Batch, TrialResources, ray_cluster, run_trials
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.trial import Job
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan, TrialSpec
from grass_ray.process import FAILED, INTERRUPTED, Interrupts, describe_failure
from grass_ray.progress import SweepProgress
from grass_ray.results.best_settings import best_settings, left_out, write_settings
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import Overview
from grass_ray.results.provenance import redact
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.tracking import Tracker
from grass_ray.training.report import VALIDATION

FULL_MIB = 8.0  # less than a trial writes
TRACKING_WITHIN_S = 300.0
SUMMARY_FOLDER, BEST_FILE = "summary", "best.yaml"


class SweepRunner:
    """Runs what is left of a plan in this process."""

    def __init__(
        self, plan: SweepPlan, root: Storage, storage: Storage, options: SweepOptions, console: Console
    ) -> None:
        """``root`` is the storage path, ``storage`` the sweep's folder in it."""
        self.plan = plan
        self.storage = storage
        self.options = options
        self.console = console
        local = root.local_folder
        self.tracker = Tracker(plan.tracking_uri, plan.name, None if local is None else local / "artifacts")
        names = [(spec.key, spec.config.name) for spec in plan.specs]
        self.progress = SweepProgress(plan.name, names, console=console, quiet=options.quiet, expected=plan.num_trials)
        self._cpus, self._gpus = 1, 0  # of each worker; the cluster decides

    def open(self) -> None:
        """Reach the tracking store. Raises :class:`grass_ray.config.ConfigError` when it does not answer."""
        self.tracker.open()

    def run(self, resume_command: str) -> int:
        """Run the trials that have not ended yet, after :meth:`open`; returns the exit code."""
        sweep_run = self.tracker.start_sweep(
            self.plan.sweep_id,
            {"sweep": self.plan.name, "question": self.plan.question},
            {"trials": str(self.plan.num_trials), "storage": self.storage.uri},
        )
        with tempfile.TemporaryDirectory(prefix="grass_ray-sweep-") as scratch:
            overview = Overview(
                self.tracker,
                sweep_run,
                self.plan.question,
                num_trials=self.plan.num_trials,
                folder=Path(scratch) / SUMMARY_FOLDER,
            )
            trial_store = TrialStore(self.plan, self.storage, self.tracker, self.progress, Path(scratch), overview)
            code = INTERRUPTED
            with Interrupts() as interrupts:
                try:
                    self._run_trials(trial_store)
                    code = self._sum_up(sweep_run, list(trial_store.records.values()), overview)
                except KeyboardInterrupt:
                    interrupts.ignore()
                    trial_store.stop_running("stopped", "the sweep was interrupted; --resume goes on")
                    self.tracker.finish_sweep(sweep_run, status="stopped")
                    self._say(f"stopped; {self.progress.summary()}\ngo on with:  {resume_command}", always=True)
                    overview.show(list(trial_store.records.values()), at_once=True)
                except Exception as error:
                    code, reason = FAILED, self._refusal(error)
                    trial_store.stop_running("failed", reason or f"{type(error).__name__}: {error}")
                    self.tracker.finish_sweep(sweep_run, status="failed")
                    if reason is None:
                        raise
                    print(f"error: the sweep cannot go on: {reason}\ngo on with:  {resume_command}", file=sys.stderr)
                finally:
                    self._close_tracker(resume_command, patient=code != INTERRUPTED)
        return code

    def _refusal(self, error: Exception) -> str | None:
        """What the system refused, if that is why; a file that a full disk left half written fails in its own way."""
        local = self.storage.local_folder
        free = None if local is None or not local.is_dir() else shutil.disk_usage(local).free / 1024**2
        where = self.storage.uri + ("" if free is None else f": {free:.1f} MiB are free there")
        reason = describe_failure(error)
        if reason is None and free is not None and free < FULL_MIB:
            reason = os.strerror(errno.ENOSPC)
        return None if reason is None else f"{reason} ({where})"

    def _run_trials(self, trial_store: TrialStore) -> None:
        tuning = self.plan.tuning
        searches: list[MethodSearch] = []
        if tuning is not None:
            searches = [MethodSearch(tuning, group, trial_store, self.storage, self._job) for group in tuning.groups]
        for spec in [*self.plan.specs, *(spec for search in searches for spec in search.ended())]:
            if trial_store.has_ended(spec):
                trial_store.end(spec.key, None, earlier=True)
        if not self._is_left(trial_store, searches):
            self._say("every trial has ended already")
            return
        with ray_cluster(self.options.machines) as cluster:
            cluster.check_storage(self.storage)
            if tuning is not None and tuning.scheduler != "none":
                cluster.check_dashboard()
            share = cluster.share(
                cpus=self.options.cpus_per_trial,
                gpus=self.options.gpus_per_trial,
                max_concurrent=self.options.max_concurrent_trials,
                workers=self.options.workers_per_trial,
                fewest_workers=self.options.fewest_workers,
            )
            self.progress.slots = share.slots
            fewest = self.options.fewest_workers
            number = f"{share.workers}" if fewest == share.workers else f"{fewest} to {share.workers}"
            each = "a trial" if share.workers == 1 else f"for each of {number} workers a trial"
            self._say(f"{cluster.describe()}; {share.cpus} CPUs and {share.gpus} GPUs {each}, {share.slots} at once")
            self._cpus, self._gpus = share.cpus, share.gpus
            with self.progress:
                for search in searches:
                    if search.is_left():
                        self._run(search.batch(share, cluster.memories), share, trial_store)
                for search in searches:
                    if not search.finals():
                        self._say(f"no trial of {search.group.method} came to its end: it has no winner", always=True)
                finals = self._finals(trial_store, searches)
                jobs = [self._job(spec, **fields) for spec, fields in finals if not trial_store.has_ended(spec)]
                if jobs:
                    self._run(Batch(name="tune", jobs=jobs), share, trial_store)

    def _is_left(self, trial_store: TrialStore, searches: list[MethodSearch]) -> bool:
        if any(search.is_left() for search in searches):
            return True
        finals = self._finals(trial_store, searches)
        for spec, _ in finals[len(self.plan.specs) :]:
            if trial_store.has_ended(spec):
                trial_store.end(spec.key, None, earlier=True)
        return any(not trial_store.has_ended(spec) for spec, _ in finals)

    def _finals(self, trial_store: TrialStore, searches: list[MethodSearch]) -> list[tuple[TrialSpec, dict[str, Any]]]:
        """The trials that meet the test, with further fields of their jobs: those of the plan, then the winners'."""
        finals: list[tuple[TrialSpec, dict[str, Any]]] = [(spec, {}) for spec in self.plan.specs]
        for search in searches:
            for spec, part, fields in search.finals():
                trial_store.add(spec, part)
                finals.append((spec, {"search": part, **fields}))
        return finals

    def _run(self, batch: Batch, share: TrialResources, trial_store: TrialStore) -> None:
        run_trials(
            batch,
            share,
            self.storage,
            callbacks=[SweepCallback(trial_store, batch.scheduler)],
            max_failures=self.options.max_failures,
        )
        trial_store.settle()

    def _job(self, spec: TrialSpec, **fields: Any) -> Job:
        return Job(
            **fields,
            config=spec.config.to_dict(),
            key=spec.key,
            folder=spec.folder,
            sweep=self.plan.name,
            sweep_id=self.plan.sweep_id,
            storage=self.storage.uri,
            cpus=self._cpus,
            gpus=self._gpus,
            keep_checkpoints=self.options.keep_checkpoints,
            memory_check=self.options.memory_check,
            max_failures=self.options.max_failures,
            workers=self.options.workers_per_trial,
            fewest_workers=self.options.fewest_workers,
            parallel=self.options.parallel,
        )

    def _sum_up(self, sweep_run: str, records: list[RunRecord], overview: Overview) -> int:
        """Plots and leaderboard as files and on the parent run; the leaderboard and the places on the terminal."""
        overview.show(records, at_once=True)
        if best := best_settings(records):
            write_settings(best, overview.folder / BEST_FILE)
        self.storage.upload(overview.folder, SUMMARY_FOLDER)
        failed = [record for record in records if record.status not in ("finished", "stopped")]
        self.tracker.finish_sweep(sweep_run, status="failed" if failed else "finished")
        if not failed:
            self.storage.remove("ray")  # Tune's and Train's own files: nothing is left to continue
        tables = build_leaderboard(records)
        print("\n" * (not self.options.quiet) + render(tables, "table", width=self._width()))
        for record in failed:
            self._say(f"{record.status}: {record.name}: {record.failure}", always=True)
        self._say(f"sweep:    {self.progress.summary()}")
        self._say(f"files:    {self.storage.uri}\nplots:    {self.storage.uri}/{SUMMARY_FOLDER}")
        if best:
            self._say(f"settings: {self.storage.uri}/{SUMMARY_FOLDER}/{BEST_FILE}, by {VALIDATION}; for --settings")
        for line in left_out(records):
            self._say(f"settings: {line}")
        if not self.plan.tracking_uri.startswith("http"):
            self._say(f"browse:   mlflow ui --backend-store-uri {redact(self.plan.tracking_uri)}")
        return FAILED if failed else 0

    def _close_tracker(self, resume_command: str, *, patient: bool) -> None:
        """Send what MLflow has not taken yet; ``patient``: its server may be down for minutes when a sweep ends."""
        try:
            if self.tracker.close(wait_s=0 if patient else 10) and patient:
                minutes = f"{TRACKING_WITHIN_S / 60:.0f} minutes"
                self._say(f"waiting up to {minutes} for MLflow to answer again; Ctrl-C does not wait", always=True)
                self.tracker.close(wait_s=TRACKING_WITHIN_S)
        except KeyboardInterrupt:
            pass
        if self.tracker.waiting:
            self._say(
                f"MLflow at {redact(self.plan.tracking_uri)} lacks the last {self.tracker.waiting} messages of this "
                f"sweep; all of it is in {self.storage.uri}; to send them once it answers:  {resume_command}",
                always=True,
            )

    def _width(self) -> int:
        return self.console.width if self.console.is_terminal else 140

    def _say(self, text: str, *, always: bool = False) -> None:
        """Print; with ``--quiet`` only what must ``always`` be said."""
        if always or not self.options.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
