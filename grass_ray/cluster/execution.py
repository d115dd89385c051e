"""One process's work on a plan: open the tracker, run the trials that are left, sum up.

::

    code = Execution(plan, root, storage, options, console).run("python sweeps/quickstart.py --resume")
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from grass_ray.cluster.callbacks import Ledger, SweepCallback
from grass_ray.cluster.launch import ray_cluster, run_trials
from grass_ray.cluster.options import SweepOptions
from grass_ray.cluster.plan import SweepPlan, TrialSpec
from grass_ray.cluster.progress import SweepProgress
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.worker import Job
from grass_ray.results.best_settings import VALIDATION, best_settings, write_settings
from grass_ray.results.leaderboard import build_leaderboard
from grass_ray.results.overview import Overview
from grass_ray.results.provenance import redact
from grass_ray.results.record import RunRecord
from grass_ray.results.rendering import render
from grass_ray.results.tracking import Tracker

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
SUMMARY_FOLDER, BEST_FILE = "summary", "best.yaml"


class Execution:
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
        self.progress = SweepProgress(plan.name, names, console=console, quiet=options.quiet)

    def open(self) -> None:
        """Reach the tracking store. Raises :class:`grass_ray.config.ConfigError` when it does not answer."""
        self.tracker.open()

    def run(self, resume_command: str) -> int:
        """Run the trials that have not ended yet, after :meth:`open`; returns the exit code."""
        sweep_run = self.tracker.start_sweep(
            self.plan.sweep_id,
            {"sweep": self.plan.name, "question": self.plan.question},
            {"trials": str(len(self.plan.specs)), "storage": self.storage.uri},
        )
        with tempfile.TemporaryDirectory(prefix="grass_ray-sweep-") as scratch:
            overview = Overview(
                self.tracker,
                sweep_run,
                self.plan.question,
                num_trials=len(self.plan.specs),
                folder=Path(scratch) / SUMMARY_FOLDER,
            )
            ledger = Ledger(self.plan, self.storage, self.tracker, self.progress, Path(scratch), overview)
            try:
                self._run_trials(ledger)
                code = self._sum_up(sweep_run, list(ledger.records.values()), overview)
            except KeyboardInterrupt:
                ledger.stop_running()
                overview.show(list(ledger.records.values()), at_once=True)
                self.tracker.finish_sweep(sweep_run, status="stopped")
                self._say(f"stopped; {self.progress.summary()}\ngo on with:  {resume_command}", always=True)
                code = EXIT_INTERRUPTED
            finally:
                self.tracker.close()
        return code

    def _run_trials(self, ledger: Ledger) -> None:
        left = []
        for spec in self.plan.specs:
            if ledger.has_ended(spec):
                ledger.end(spec.key, None, earlier=True)
            else:
                left.append(spec)
        if not left:
            self._say("every trial has ended already")
            return
        with ray_cluster(self.options.machines) as cluster:
            cluster.check_storage(self.storage)
            share = cluster.share(
                cpus=self.options.cpus_per_trial,
                gpus=self.options.gpus_per_trial,
                max_concurrent=self.options.max_concurrent_trials,
                workers=self.options.workers_per_trial,
            )
            self.progress.slots = share.slots
            each = "a trial" if share.workers == 1 else f"for each of {share.workers} workers a trial"
            self._say(f"{cluster.describe()}; {share.cpus} CPUs and {share.gpus} GPUs {each}, {share.slots} at once")
            jobs = [self._job(spec, share.cpus, share.gpus) for spec in left]
            with self.progress:
                run_trials(
                    jobs,
                    share,
                    self.storage,
                    callbacks=[SweepCallback(ledger)],
                    max_failures=self.options.max_failures,
                )

    def _job(self, spec: TrialSpec, cpus: int, gpus: int) -> Job:
        return Job(
            config=spec.config.to_dict(),
            key=spec.key,
            folder=spec.folder,
            sweep=self.plan.name,
            sweep_id=self.plan.sweep_id,
            storage=self.storage.uri,
            cpus=cpus,
            gpus=gpus,
            keep_checkpoints=self.options.keep_checkpoints,
            memory_check=self.options.memory_check,
            max_failures=self.options.max_failures,
            workers=self.options.workers_per_trial,
            parallel=self.options.parallel,
        )

    def _sum_up(self, sweep_run: str, records: list[RunRecord], overview: Overview) -> int:
        """Plots and leaderboard as files and on the parent run; the leaderboard and the places on the terminal."""
        overview.show(records, at_once=True)
        if best := best_settings(records):
            write_settings(best, overview.folder / BEST_FILE)
        self.storage.upload(overview.folder, SUMMARY_FOLDER)
        failed = [record for record in records if record.status != "finished"]
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
        if not self.plan.tracking_uri.startswith("http"):
            self._say(f"browse:   mlflow ui --backend-store-uri {redact(self.plan.tracking_uri)}")
        return EXIT_FAILED if failed else 0

    def _width(self) -> int:
        return self.console.width if self.console.is_terminal else 140

    def _say(self, text: str, *, always: bool = False) -> None:
        """Print; with ``--quiet`` only what must ``always`` be said."""
        if always or not self.options.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
