"""Run a sweep's plan in this process: open the tracker, run the trials that are left, sum up.

::

    code = SweepRunner(plan, root, storage, options, console).run("python sweeps/quickstart.py --resume")
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from grass_ray.cluster.job import Job, SweepContext, has_ended
from grass_ray.cluster.reporter import TrialStore
from grass_ray.cluster.resources import ClusterInfo, TrialResources
from grass_ray.cluster.reuse import Reuse, machine_of_trials
from grass_ray.cluster.search import Final, MethodSearch
from grass_ray.cluster.session import ray_cluster
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.tuner import TuneRun, run_trials
from grass_ray.config import RunConfig, installed_code
from grass_ray.errors import redact
from grass_ray.experiment.flags import SweepOptions
from grass_ray.experiment.plan import SweepPlan
from grass_ray.process import FAILED, INTERRUPTED, Interrupts, describe_failure
from grass_ray.progress import SweepProgress
from grass_ray.results.overview import Overview
from grass_ray.results.pages import is_server, run_page
from grass_ray.results.record import SearchPart
from grass_ray.results.rendering import render
from grass_ray.results.searches import best_settings, left_out, write_settings
from grass_ray.results.sync import sync_command
from grass_ray.results.tracker import Tracker
from grass_ray.results.writes import joint_digest
from grass_ray.training.report import GIB, VALIDATION

FULL_MIB = 8.0  # less than a trial writes
TRACKING_WITHIN_S = 300.0
SUMMARY_FOLDER, BEST_FILE = "summary", "best.yaml"


class SweepRunner:
    """Runs what is left of a plan in this process.

    Args:
        plan: the sweep.
        root: the storage path.
        storage: the sweep's folder in it.
        options: the command line.
        console: where to print.
    """

    def __init__(
        self, plan: SweepPlan, root: Storage, storage: Storage, options: SweepOptions, console: Console
    ) -> None:
        self.plan = plan
        self.storage = storage
        self.options = options
        self.console = console
        local = root.local_folder
        self.tracker = Tracker(plan.tracking_uri, plan.name, None if local is None else local / "artifacts")
        names = [(config.fingerprint, config.name) for config in plan.trials]
        self.progress = SweepProgress(plan.name, names, console=console, quiet=options.quiet, expected=plan.num_trials)

    def open(self) -> None:
        """Open the tracking store. Raises :class:`grass_ray.config.ConfigError` if it does not answer."""
        self.tracker.open()

    def run(self, resume_command: str) -> int:
        """Run the trials that have not ended yet, after :meth:`open`; returns the exit code."""
        sweep_run = self.tracker.start_sweep(
            self.plan.sweep_id,
            {"sweep": self.plan.name, "question": self.plan.question},
            {"trials": str(self.plan.num_trials), "storage": self.storage.shown},
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
                    code = self._sum_up(sweep_run, trial_store, overview)
                except KeyboardInterrupt:
                    interrupts.ignore()
                    trial_store.stop_running("stopped", "the sweep was interrupted; --resume goes on")
                    self.tracker.finish_sweep(sweep_run, status="stopped")
                    self._say(f"stopped; {self.progress.summary()}\ngo on with:  {resume_command}", always=True)
                    overview.update(list(trial_store.records.values()), trial_store.whole_record)
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
        """Return what the system refused, if that is the reason of ``error``."""
        local = self.storage.local_folder
        free = None if local is None or not local.is_dir() else shutil.disk_usage(local).free / 1024**2
        where = self.storage.shown + ("" if free is None else f": {free:.1f} MiB are free there")
        reason = describe_failure(error)
        if reason is None and free is not None and free < FULL_MIB:  # a file that was cut off fails in its own way
            reason = os.strerror(errno.ENOSPC)
        return None if reason is None else f"{reason} ({where})"

    def _run_trials(self, trial_store: TrialStore) -> None:
        plan = self.plan.search
        methods = plan.methods if plan is not None else ()
        searches = [MethodSearch(plan, spec, trial_store, self.storage) for spec in methods if plan is not None]
        for config in [*self.plan.trials, *(config for search in searches for config in search.ended())]:
            if has_ended(self.storage, config):
                trial_store.end(config.fingerprint, None, earlier=True)
        if not self._is_left(trial_store, searches):
            self._say("every trial has ended already")
            return
        options = self.options
        uses_train = options.workers > 1
        with ray_cluster(options.machines, dashboard=uses_train) as cluster:
            cluster.check_storage(self.storage)
            if uses_train and plan is not None and plan.scheduler != "none":
                cluster.check_dashboard()
            context = self._context(cluster)
            reuse = self._reuse(cluster, context)
            with self.progress:
                if reuse is not None:
                    known = [trial for search in searches for trial in search.known()]
                    self._take_over(reuse, [*((config, None) for config in self.plan.trials), *known], trial_store)
                for search in searches:
                    if search.is_left():
                        run_trials(search.tune_run(context, cluster.memories), context, trial_store)
                for search in searches:
                    if not search.finals():
                        self._say(f"no trial of {search.spec.method} came to its end: it has no winner", always=True)
                finals = self._finals(trial_store, searches)
                if reuse is not None and searches:
                    self._take_over(reuse, [(final.config, final.search) for final in finals], trial_store)
                jobs = [
                    Job.of(final.config, context, search=final.search, start_from=final.start_from)
                    for final in finals
                    if not has_ended(self.storage, final.config)
                ]
                if jobs:
                    run_trials(TuneRun(name="tune", jobs=jobs), context, trial_store)

    def _reuse(self, cluster: ClusterInfo, context: SweepContext) -> Reuse | None:
        if not self.options.reuse:
            return None
        machine = machine_of_trials(cluster, context)
        return Reuse(self.plan, self.storage, context, machine, self.progress.note)

    def _take_over(
        self, reuse: Reuse, trials: Sequence[tuple[RunConfig, SearchPart | None]], trial_store: TrialStore
    ) -> None:
        """Take over what has run before, of the trials that are left."""
        left = [(config, search) for config, search in trials if not has_ended(self.storage, config)]
        for config in reuse.take_over(left):
            trial_store.end(config.fingerprint, None, earlier=True)

    def _context(self, cluster: ClusterInfo) -> SweepContext:
        """Divide the cluster among trials, and say how."""
        options = self.options
        resources = cluster.trial_resources(
            cpus=options.cpus_per_trial,
            gpus=options.gpus_per_trial,
            max_concurrent=options.max_concurrent_trials,
            workers=options.workers,
            min_workers=options.min_workers,
        )
        self.progress.slots = resources.slots
        self._say(f"{cluster.describe()}; {_describe(resources)}")
        return SweepContext(
            sweep=self.plan.name,
            sweep_id=self.plan.sweep_id,
            storage=self.storage.uri,
            resources=resources,
            parallel=options.parallelism,
            keep_checkpoints=options.keep_checkpoints,
            memory_check=options.memory_check,
            memory_bytes=None if options.gpu_memory is None else int(options.gpu_memory * GIB),
            max_failures=options.max_failures,
            code=installed_code(),
        )

    def _is_left(self, trial_store: TrialStore, searches: list[MethodSearch]) -> bool:
        if any(search.is_left() for search in searches):
            return True
        finals = self._finals(trial_store, searches)
        for final in finals[len(self.plan.trials) :]:
            if has_ended(self.storage, final.config):
                trial_store.end(final.config.fingerprint, None, earlier=True)
        return any(not has_ended(self.storage, final.config) for final in finals)

    def _finals(self, trial_store: TrialStore, searches: list[MethodSearch]) -> list[Final]:
        """The trials that meet the test: those of the plan, then the winners'."""
        finals = [Final(config=config) for config in self.plan.trials]
        for final in (final for search in searches for final in search.finals()):
            assert final.search is not None
            trial_store.add(final.config, final.search)
            finals.append(final)
        return finals

    def _sum_up(self, sweep_run: str, trial_store: TrialStore, overview: Overview) -> int:
        """Write figures and leaderboard as files and to the parent run; print the leaderboard and where all is."""
        records = list(trial_store.records.values())
        tables = overview.update(records, trial_store.whole_record)
        if best := best_settings(records):
            write_settings(best, overview.folder / BEST_FILE)
        self.storage.upload(overview.folder, SUMMARY_FOLDER)
        failed = [record for record in records if record.status not in ("finished", "stopped")]
        digest = joint_digest(trial_store.digests.values()) if records else None
        self.tracker.finish_sweep(sweep_run, status="failed" if failed else "finished", sha256=digest)
        if not failed:
            self.storage.remove("ray")  # Tune's and Train's own files: nothing is left to continue
        print("\n" * (not self.options.quiet) + render(tables, "table", width=self._width()))
        for record in failed:
            self._say(f"{record.status}: {record.name}: {record.failure}", always=True)
        self._say(f"sweep:    {self.progress.summary()}")
        self._say(f"files:    {self.storage.shown}\nplots:    {self.storage.shown}/{SUMMARY_FOLDER}")
        if best:
            self._say(f"settings: {self.storage.shown}/{SUMMARY_FOLDER}/{BEST_FILE}, by {VALIDATION}; for --settings")
        for line in left_out(records):
            self._say(f"settings: {line}")
        uri, page = self.plan.tracking_uri, run_page(self.tracker, sweep_run)
        if is_server(uri):
            self._say(f"browse:   {redact(uri).rstrip('/')}/{page}")
        else:
            self._say(f"browse:   grass-ray ui --tracking-uri {redact(uri)}   # http://127.0.0.1:5000/{page}")
        return FAILED if failed else 0

    def _close_tracker(self, resume_command: str, *, patient: bool) -> None:
        """Send what MLflow has not taken yet; ``patient`` waits for minutes if its server is down."""
        try:
            if self.tracker.close(wait_s=0 if patient else 10) and patient:
                minutes = f"{TRACKING_WITHIN_S / 60:.0f} minutes"
                self._say(f"waiting up to {minutes} for MLflow to answer again; Ctrl-C does not wait", always=True)
                self.tracker.close(wait_s=TRACKING_WITHIN_S)
        except KeyboardInterrupt:
            pass
        if self.tracker.lacking:
            local = self.storage.local_folder
            command = resume_command if local is None else sync_command(local, self.plan.tracking_uri)
            self._say(
                f"MLflow at {redact(self.plan.tracking_uri)} lacks {self.tracker.lacking} messages of this "
                f"sweep; all of it is in {self.storage.shown}; to send them once it answers:  {command}",
                always=True,
            )

    def _width(self) -> int:
        return self.console.width if self.console.is_terminal else 140

    def _say(self, text: str, *, always: bool = False) -> None:
        """Print; with ``--quiet`` only what must ``always`` be said."""
        if always or not self.options.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _describe(resources: TrialResources) -> str:
    """What a trial gets: ``2 CPUs and 1 GPUs a trial, 4 at once``."""
    number = f"{resources.min_workers} to {resources.workers}" if resources.elastic else f"{resources.workers}"
    each = "a trial" if resources.workers == 1 else f"for each of {number} workers a trial"
    return f"{resources.cpus} CPUs and {resources.gpus} GPUs {each}, {resources.slots} at once"
