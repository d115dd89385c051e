"""Where results arrive in the driver: Tune's callback, and the trial_store that writes MLflow and the display.

Workers never write MLflow: one writer, the driver, finds or creates each trial's run by tag, so that nothing is doubled
when a sweep is resumed::

    trial_store = TrialStore(plan, storage, tracker, progress)
    Tuner(..., run_config=tune.RunConfig(callbacks=[SweepCallback(trial_store)]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler

from grass_ray.cluster.schedulers import Asha
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.trial import RECORD_FILE, TIME, TRACEBACK_FILE, passed_file, steps_of
from grass_ray.experiment.plan import SweepPlan, TrialSpec
from grass_ray.progress import SweepProgress
from grass_ray.results.overview import Overview
from grass_ray.results.provenance import build_record, now
from grass_ray.results.record import RunRecord, SearchPart, Status
from grass_ray.results.tracking import Tracker
from grass_ray.training.report import VALIDATION


class TrialStore:
    """One sweep's books, kept by the driver: which trials ended and how, in MLflow and on the terminal."""

    def __init__(
        self,
        plan: SweepPlan,
        storage: Storage,
        tracker: Tracker,
        progress: SweepProgress,
        scratch: Path,
        overview: Overview,
    ) -> None:
        """``storage`` is the sweep's folder; ``scratch`` holds copies of trials' files until the tracker is closed."""
        self.plan = plan
        self.storage = storage
        self.tracker = tracker
        self.progress = progress
        self.scratch = scratch
        self.overview = overview
        self.records: dict[str, RunRecord] = {}
        self._specs = {spec.key: spec for spec in plan.specs}
        self._searches: dict[str, dict[str, Any]] = {}
        self._machines: dict[str, dict[str, Any]] = {}
        self._stopped: dict[str, RunRecord] = {}
        self._seen: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self._run_ids: dict[str, str] = {}
        self._started_at: dict[str, str] = {}
        self._steps_logged: dict[str, int] = {}

    def add(self, spec: TrialSpec, search: dict[str, Any]) -> None:
        """A trial of a search, or of its winner: known now, perhaps not when the sweep began."""
        self._specs[spec.key] = spec
        self._searches[spec.key] = search
        self.progress.add(spec.key, spec.config.name)

    def start(self, key: str) -> None:
        """A trial starts, or a population's member goes on: find or create its run."""
        self._started_at.setdefault(key, now())
        self._open_run(self._specs[key])
        self.progress.start(key)

    def result(self, key: str, values: Mapping[str, Any]) -> None:
        """A trial reported: log the steps that are new, and show where it is."""
        steps = values.get("steps", ())
        self._log_new_steps(key, steps)
        if key in self._searches:  # a trial that is stopped early leaves no record of its own
            self._seen.setdefault(key, []).extend(steps)
            self._machines[key] = values.get("machine", self._machines.get(key, {}))
        if values.get("phase") == "restored":
            self.progress.note(key, f"goes on from its checkpoint after step {values['after_step']}")
        elif values.get("phase") == "generation":  # a population's member sleeps until the others are as far
            self.progress.update(key, "waiting", {})
        elif values.get("phase") in ("training", "evaluating"):
            self.progress.update(key, values["phase"], values["view"])

    def end(self, key: str, failure: str | None, *, earlier: bool = False) -> None:
        """A trial ended: close its run with its record. ``failure`` is why its process died, None when it did not."""
        spec = self._specs[key]
        if failure is None and not self.storage.exists(spec.folder, RECORD_FILE):
            failure = "the trial ended without a record"
        if failure is not None:
            self._record_crash(spec, failure)
        folder = self._fetch(spec)
        record = RunRecord.load(folder / RECORD_FILE)
        self._open_run(spec)
        self._log_new_steps(key, steps_of(record.series))  # a driver that died may not have heard of all
        self.tracker.finish(self._run_ids[key], record, folder)
        self.records[key] = record
        self.progress.end(
            key,
            record.status,
            accuracy=record.metrics.get("eval/average"),
            loss=record.metrics.get(VALIDATION),
            failure=record.failure,
            earlier=earlier,
        )
        if not earlier:  # a resumed sweep begins with many at once
            self.overview.show(list(self.records.values()))

    def let_pass(self, key: str, updates: int) -> None:
        """Tell a trial that waits at a rung to go on."""
        self.storage.write_text("", self._specs[key].folder, passed_file(updates))

    def stop_early(self, key: str, updates: int, reason: str) -> None:
        """A scheduler stopped a trial after so many updates: write the record that its process can write no more."""
        spec = self._specs[key]
        last = self._last_step(key, updates)
        steps: dict[int, dict[str, float]] = {}
        for step, metrics in self._seen.get(key, ()):
            if step <= last:
                steps.setdefault(step, {}).update(metrics)
        series: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in sorted(steps.items()):
            for name, value in metrics.items():
                series.setdefault(name, []).append((step, value))
        record = self._record_without_outcome(spec, "stopped", reason)
        record.series = series
        record.metrics = {name: points[-1][1] for name, points in series.items()}
        if record.search is not None:
            record.search.stopped_after = updates
        self._stopped[key] = record
        self._write(record, spec)
        self.end(key, None)

    def _last_step(self, key: str, updates: int) -> int:
        """The step of the loss that the scheduler judged by; steps count the probing too."""
        measured = [step for step, metrics in self._seen.get(key, ()) if VALIDATION in metrics]
        return max(measured, default=updates)

    def settle(self) -> None:
        """Once no process of a trial is left: what a stopped one wrote in its last moments does not count."""
        for key, record in self._stopped.items():
            self._write(record, self._specs[key])
            self.storage.remove("ray", f"train-{key}")

    def _write(self, record: RunRecord, spec: TrialSpec) -> None:
        self.storage.write_text(record.model_dump_json(indent=1), spec.folder, RECORD_FILE)

    def stop_running(self, status: Status, reason: str) -> None:
        """The sweep ends early: close the runs of the trials that have not ended, without a record in storage."""
        for key in self._started_at.keys() - self.records.keys():
            spec = self._specs[key]
            record = self._record_without_outcome(spec, status, reason)
            self.tracker.finish(self._run_ids[key], record, self._fetch(spec))

    def has_ended(self, spec: TrialSpec) -> bool:
        """Whether a trial came to an end of its own: it has a record, and its process did not die."""
        return self.storage.exists(spec.folder, RECORD_FILE) and not self.storage.exists(spec.folder, TRACEBACK_FILE)

    def _log_new_steps(self, key: str, steps: Iterable[tuple[int, dict[str, float]]]) -> None:
        """Log the steps after the last one logged; the tracker knows those that an earlier driver logged."""
        logged = self._steps_logged.get(key, 0)
        new = [(step, metrics) for step, metrics in steps if step > logged]
        if new:
            self._steps_logged[key] = new[-1][0]
            self.tracker.log_steps(self._run_ids[key], new)

    def _open_run(self, spec: TrialSpec) -> None:
        if spec.key not in self._run_ids:
            config = spec.config
            tags = {
                "method": config.method.name,
                "model": config.model.name,
                "suite": config.data.suite,
                "seed": str(config.seed),
                "sweep": self.plan.name,
                "stage": self._searches.get(spec.key, {}).get("stage", "trial"),
                "folder": f"{self.storage.uri}/{spec.folder}",
            }
            self._run_ids[spec.key] = self.tracker.start_trial(
                self.plan.sweep_id, spec.key, config.name, tags, config.flatten()
            )

    def _fetch(self, spec: TrialSpec) -> Path:
        """The trial's files in a local folder."""
        local = self.storage.join(spec.folder).local_folder
        if local is not None:
            return local
        folder = self.scratch / spec.folder
        folder.mkdir(exist_ok=True)
        self.storage.download(folder, spec.folder)
        return folder

    def _record_crash(self, spec: TrialSpec, failure: str) -> None:
        """Write the record that a dead process could not write. ``--resume`` tries such a trial again."""
        record = self._record_without_outcome(spec, "failed", failure)
        if not self.storage.exists(spec.folder, TRACEBACK_FILE):
            self.storage.write_text(failure, spec.folder, TRACEBACK_FILE)
        self._write(record, spec)

    def _record_without_outcome(self, spec: TrialSpec, status: Status, failure: str) -> RunRecord:
        return build_record(
            run_id=f"{self.plan.sweep_id}-{spec.key}",
            sweep=self.plan.name,
            sweep_id=self.plan.sweep_id,
            config=spec.config,
            status=status,
            failure=failure,
            outcome=None,
            started_at=self._started_at[spec.key],
            **self._machines.get(spec.key, {}),
            search=None if spec.key not in self._searches else SearchPart.model_validate(self._searches[spec.key]),
        )


class SweepCallback(tune.Callback):  # type: ignore[misc]
    """Passes what Tune sees to the trial_store. Tune pickles its callbacks; the trial_store stays in the driver."""

    def __init__(self, trial_store: TrialStore, scheduler: TrialScheduler | None = None) -> None:
        self._trial_store: TrialStore | None = trial_store
        self._verdicts = scheduler.verdicts if isinstance(scheduler, Asha) else {}
        self._crashes: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_trial_store": None, "_verdicts": {}, "_crashes": {}}

    @property
    def trial_store(self) -> TrialStore:
        """The driver's trial_store."""
        assert self._trial_store is not None, "a callback that was pickled is used outside the driver"
        return self._trial_store

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Let plain lines come while nothing is reported."""
        self.trial_store.progress.tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's actor starts."""
        self.trial_store.start(_key(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A report arrived from the worker."""
        if result.get("phase") == "crashed":
            self._crashes[_key(trial)] = result["failure"]
        self.trial_store.result(_key(trial), result)
        # the scheduler has decided before this is called
        if TIME in result and result["phase"] != "generation" and _key(trial) not in self._verdicts:
            self.trial_store.let_pass(_key(trial), result[TIME])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function returned, or the scheduler stopped it."""
        key = _key(trial)
        if key in self._verdicts:
            verdict = self._verdicts[key]
            reason = verdict.describe(trial.config["job"]["config"]["training"]["steps"])
            self.trial_store.stop_early(key, verdict.updates, reason)
        else:
            self.trial_store.end(key, self._crashes.get(key))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's own actor died."""
        error = trial.get_pickled_error()
        reason = str(error).strip().splitlines() if error is not None else []
        self.trial_store.end(_key(trial), f"the trial's driver died: {reason[-1] if reason else 'no reason known'}")


def _key(trial: Any) -> str:
    return str(trial.config["job"]["key"])
