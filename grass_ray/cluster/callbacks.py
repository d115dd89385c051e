"""Where results arrive in the driver: Tune's callback, and the ledger that writes MLflow and the display.

Workers never write MLflow: one writer, the driver, finds or creates each trial's run by tag, so that nothing is doubled
when a sweep is resumed::

    ledger = Ledger(plan, storage, tracker, progress)
    Tuner(..., run_config=tune.RunConfig(callbacks=[SweepCallback(ledger)]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from grass_ray.cluster.plan import SweepPlan, TrialSpec
from grass_ray.cluster.progress import SweepProgress
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.worker import RECORD_FILE, TRACEBACK_FILE, steps_of
from grass_ray.results.overview import Overview
from grass_ray.results.provenance import build_record, now
from grass_ray.results.record import RunRecord, Status
from grass_ray.results.tracking import Tracker


class Ledger:
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
        self._run_ids: dict[str, str] = {}
        self._started_at: dict[str, str] = {}
        self._steps_logged: dict[str, int] = {}

    def start(self, key: str) -> None:
        """A trial starts: find or create its run."""
        self._started_at[key] = now()
        self._open_run(self._specs[key])
        self.progress.start(key)

    def result(self, key: str, values: Mapping[str, Any]) -> None:
        """A trial reported: log the steps that are new, and show where it is."""
        self._log_new_steps(key, values.get("steps", ()))
        if values.get("phase") == "restored":
            self.progress.note(key, f"goes on from its checkpoint after step {values['after_step']}")
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
            failure=record.failure,
            earlier=earlier,
        )
        if not earlier:  # a resumed sweep begins with many at once
            self.overview.show(list(self.records.values()))

    def stop_running(self) -> None:
        """The sweep is interrupted: close the runs of the trials that have not ended, without a record in storage."""
        for key in self._started_at.keys() - self.records.keys():
            spec = self._specs[key]
            record = self._record_without_outcome(spec, "stopped", "the sweep was interrupted; --resume goes on")
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
        self.storage.write_text(record.model_dump_json(indent=1), spec.folder, RECORD_FILE)

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
        )


class SweepCallback(tune.Callback):  # type: ignore[misc]
    """Passes what Tune sees to the ledger. Tune pickles its callbacks; the ledger stays in the driver."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger: Ledger | None = ledger
        self._crashes: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_ledger": None, "_crashes": {}}

    @property
    def ledger(self) -> Ledger:
        """The driver's ledger."""
        assert self._ledger is not None, "a callback that was pickled is used outside the driver"
        return self._ledger

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Let plain lines come while nothing is reported."""
        self.ledger.progress.tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's actor starts."""
        self.ledger.start(_key(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A report arrived from the worker."""
        if result.get("phase") == "crashed":
            self._crashes[_key(trial)] = result["failure"]
        self.ledger.result(_key(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function returned."""
        key = _key(trial)
        self.ledger.end(key, self._crashes.get(key))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's own actor died."""
        error = trial.get_pickled_error()
        reason = str(error).strip().splitlines() if error is not None else []
        self.ledger.end(_key(trial), f"the trial's driver died: {reason[-1] if reason else 'no reason known'}")


def _key(trial: Any) -> str:
    return str(trial.config["job"]["key"])
