"""MLflow tracking: one parent run per sweep, one child run per trial.

::

    tracker = Tracker(default_tracking_uri(storage), "quickstart", artifact_root=storage / "artifacts")
    tracker.open()                                              # once, before the first trial
    sweep = tracker.start_sweep(sweep_id, tags={"sweep": "quickstart"}, params={})
    run = tracker.start_trial(sweep_id, trial_key, config.name, tags, config.flatten())
    tracker.log_steps(run, [(report.step, report.metrics())])
    tracker.finish(run, record, folder)
    tracker.show_sweep(sweep, note=markdown, table=rows, files=pictures)
    tracker.finish_sweep(sweep)
    tracker.close()

One process writes. A store that fails in mid-run never stops training: calls wait in order and are tried again at the
next call and at :meth:`Tracker.close`; each can be repeated without counting anything twice. The record on disk is what
counts: at the end of a run whatever of it the store lacks is sent, and :mod:`grass_ray.results.sync` does so later.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_ray.config import ConfigError, to_json
from grass_ray.errors import redact
from grass_ray.results.connection import SQLITE, absolute_uri, connect, quoted, sqlite_path, store_errors
from grass_ray.results.outbox import Outbox
from grass_ray.results.record import RunRecord, Status
from grass_ray.results.store import PARENT_TAG
from grass_ray.results.waiting import Numbers
from grass_ray.results.writes import (
    COMPLETE_TAG,
    RUN_STATUS,
    EmptyAnswerError,
    add_params,
    check_run,
    create_run,
    delete_twins,
    digest,
    ended_at,
    ending_tags,
    final_metrics,
    find_runs,
    get_run,
    log_metrics,
    set_tags,
    split_table,
    upload_files,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

SWEEP_KEY = "(sweep)"  # the trial_key of a parent run, so that it is found among its children
RANKING_FILE = "ranking.json"
_NOTE_TAG = "mlflow.note.content"  # MLflow's page shows it as the run's description
_TABLES_TAG = "mlflow.loggedArtifacts"  # and what this names as tables
_PLACEHOLDER = "waiting-"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages open on runs, not on chats


class Tracker:
    """Writes one experiment. A pickled copy holds only the arguments and must be opened again.

    Args:
        tracking_uri: ``sqlite:///...`` (made absolute) or the address of an MLflow server.
        experiment: the experiment's name, that of the sweep.
        artifact_root: where a SQLite store keeps artifacts; None means ``artifacts`` beside the database. A server
            decides this itself.

    Attributes:
        filled: how many numbers were sent at the ends of runs because the store lacked them.
    """

    def __init__(self, tracking_uri: str, experiment: str, artifact_root: Path | None = None) -> None:
        self.tracking_uri = absolute_uri(tracking_uri)
        self.experiment = experiment
        self.artifact_root = None if artifact_root is None else Path(artifact_root).absolute()
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._outbox = Outbox(redact(self.tracking_uri))
        self._run_ids: dict[str, str] = {}
        self._params: dict[str, Mapping[str, str]] = {}
        self._numbers = Numbers()
        self.filled = 0
        self._shown: dict[str, tuple[str, list[Mapping[str, Any]], list[Path], dict[str, str]]] = {}

    def __reduce__(self) -> tuple[type[Tracker], tuple[str, str, Path | None]]:
        return Tracker, (self.tracking_uri, self.experiment, self.artifact_root)

    # -- opening and closing

    def open(self) -> None:
        """Prepare store and experiment. Raises :class:`ConfigError` within seconds if that fails."""
        client = connect(self.tracking_uri)
        with store_errors(self.tracking_uri):
            found = client.get_experiment_by_name(self.experiment) or self._create_experiment(client)
            if found.lifecycle_stage != "active":
                raise ConfigError(
                    f"the MLflow experiment {self.experiment!r} was deleted; bring it back with "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
                )
            if not found.experiment_id:
                raise ConfigError(f"what answers at {redact(self.tracking_uri)} is not an MLflow server")
            self._experiment_id = str(found.experiment_id)
        self._client = client

    def _create_experiment(self, client: MlflowClient) -> Any:
        from mlflow.exceptions import MlflowException

        artifacts = None  # a server decides itself
        if self.tracking_uri.startswith(SQLITE):
            artifacts = (self.artifact_root or sqlite_path(self.tracking_uri).parent / "artifacts").as_uri()
        try:
            client.create_experiment(self.experiment, artifacts, _EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                raise
        return client.get_experiment_by_name(self.experiment)

    def is_complete(self, sweep_id: str, trial_key: str, *records: RunRecord) -> bool:
        """Whether a trial's run ended with this record, or a sweep's with these. Raises :class:`ConfigError`."""
        with store_errors(self.tracking_uri):
            found = find_runs(self._opened(), self._experiment_id, sweep_id, trial_key)
        return any(
            run.data.tags.get(COMPLETE_TAG) == digest(*records) and run.info.status in RUN_STATUS.values()
            for run in found
        )

    @property
    def lacking(self) -> int:
        """Calls that the store has not taken yet, and those that it refused."""
        return len(self._outbox) + len(self._outbox.refused)

    def close(self, wait_s: float = 10.0) -> int:
        """Send what still waits, trying for ``wait_s`` seconds. Returns how many calls could not be sent."""
        return self._outbox.flush(wait_s)

    # -- runs

    def start_sweep(self, sweep_id: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
        """Find or create the parent run of a sweep and return its run id."""
        return self._start(sweep_id, SWEEP_KEY, self._sweep_name(sweep_id), tags, params)

    def start_trial(
        self, sweep_id: str, trial_key: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, str]
    ) -> str:
        """Find or create a trial's child run, reopen it if it had ended, and return its run id.

        While the store does not answer, a placeholder is returned, which the other methods accept.
        """
        return self._start(sweep_id, trial_key, run_name, tags, params)

    def _start(
        self, sweep_id: str, trial_key: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, str]
    ) -> str:
        placeholder = f"{_PLACEHOLDER}{uuid.uuid4().hex}"
        quoted(sweep_id), quoted(trial_key)  # a name that cannot be searched for is a mistake to report now

        def act() -> None:
            is_sweep = trial_key == SWEEP_KEY
            parent = None if is_sweep else self._find_or_create(sweep_id, SWEEP_KEY, self._sweep_name(sweep_id))
            own = {key: str(value)[:5000] for key, value in tags.items()}
            run_id = self._find_or_create(sweep_id, trial_key, run_name, parent, own)
            add_params(self._opened(), run_id, params)
            self._run_ids[placeholder] = run_id

        self._do(f"start of {run_name}", act)
        run_id = self._run_ids.get(placeholder, placeholder)
        self._params[run_id] = params
        return run_id

    def _sweep_name(self, sweep_id: str) -> str:
        return f"{self.experiment}-{sweep_id}"

    def _find_or_create(
        self,
        sweep_id: str,
        trial_key: str,
        run_name: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """The run with these two tags, the oldest if there are several."""
        client = self._opened()
        found = find_runs(client, self._experiment_id, sweep_id, trial_key)
        every = dict(tags or {}) | {"sweep_id": sweep_id, "trial_key": trial_key}
        if parent is not None:
            every[PARENT_TAG] = parent
        if not found:
            run_id = create_run(client, self._experiment_id, every, run_name)
            if tags is None:  # made to hold the runs of `grass-ray train`: nobody will end it
                client.set_terminated(run_id)
            return run_id
        run_id = str(found[0].info.run_id)
        if tags is not None:  # started anew, not merely looked up as somebody's parent
            self._numbers.reopen(run_id)
            client.update_run(run_id, status="RUNNING")
            set_tags(client, run_id, every)
        return run_id

    # -- numbers and files

    def log_steps(self, run_id: str, points: list[tuple[int, dict[str, float]]]) -> None:
        """Log the metrics of (step, metrics) points. Steps that the run already has are not logged again."""
        if not self._numbers.add(run_id, points):
            self._outbox.has_failed = True  # so that the end of the run looks for what is left out here
        what = f"steps of run {run_id}"
        if what not in self._outbox:  # else the call that waits sends these, too
            self._do(what, lambda: self._numbers.send(self._opened(), run_id, self._known(run_id)))

    def finish(self, run_id: str, record: RunRecord, folder: Path) -> None:
        """End a trial: what its record has and the run lacks, artifacts (record, pictures ...), tags, status.

        In this order, so that a run MLflow calls finished is complete; one that did not finish ends first, since files
        may be what cannot be written. ``folder`` must stay until :meth:`close`.
        """
        tags, status = ending_tags(record), RUN_STATUS[record.status]

        def act() -> None:
            client, known = self._opened(), self._known(run_id)
            if known is None:
                return
            if record.status != "finished":
                set_tags(client, known, tags)
                client.set_terminated(known, status, ended_at(record))
            missing = self._numbers.missing(client, known, record, look_up=self._outbox.has_failed)
            log_metrics(client, known, [*missing, *final_metrics(record)])
            self.filled += len(missing)
            whole = upload_files(client, known, record, folder)
            set_tags(client, known, tags | ({COMPLETE_TAG: digest(record)} if whole else {}))
            client.set_terminated(known, status, ended_at(record))
            params, has_failed = self._params.get(run_id, {}), self._outbox.has_failed
            if has_failed:  # then an answer may have lied
                add_params(client, known, params)
                delete_twins(client, known)
            check_run(client, known, record, params, every_step=has_failed)
            self._outbox.refused.discard(f"steps of run {run_id}")  # they are there now

        self._do(f"end of {record.name}", act)

    def show_sweep(
        self,
        run_id: str,
        *,
        note: str,
        table: Sequence[Mapping[str, Any]],
        files: Sequence[Path] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Show a ranking on a sweep's run, replacing the previous one.

        Args:
            run_id: the parent run.
            note: Markdown for the run's description, and the experiment's.
            table: rows with the same columns; MLflow shows them as a table (``ranking.json``). ``mlflow.log_table``
                would append them to the rows of the last call.
            files: artifacts such as figures; must exist until :meth:`close`.
            tags: further tags.
        """
        self._shown[run_id] = (note, list(table), list(files), dict(tags or {}))
        what = f"ranking of {run_id}"
        if what not in self._outbox:  # else the call that waits sends this one
            self._do(what, lambda: self._show(run_id))

    def _show(self, run_id: str) -> None:
        client, known = self._opened(), self._known(run_id)
        if known is not None:
            note, table, files, tags = self._shown[run_id]
            client.log_text(known, split_table(table), RANKING_FILE)
            for path in files:
                client.log_artifact(known, str(path))
            is_table = to_json([{"path": RANKING_FILE, "type": "table"}])
            set_tags(client, known, {**tags, _NOTE_TAG: note, _TABLES_TAG: is_table})
            client.set_experiment_tag(self._experiment_id, _NOTE_TAG, note)  # the newest sweep's, on the first page

    def finish_sweep(self, run_id: str, *, status: Status = "finished", sha256: str | None = None) -> None:
        """End a sweep's run; ``sha256`` is the digest of all its trials' records if none is left to run."""
        ended = int(time.time() * 1000)

        def act() -> None:
            client, known = self._opened(), self._known(run_id)
            if known is not None:
                set_tags(client, known, {"status": status} | ({} if sha256 is None else {COMPLETE_TAG: sha256}))
                client.set_terminated(known, RUN_STATUS[status], ended)
                if get_run(client, known).info.status != RUN_STATUS[status]:
                    raise EmptyAnswerError(f"the store took the end of run {known} and does not have it")

        self._do("end of the sweep", act)

    # -- the connection

    def _known(self, run_id: str) -> str | None:
        """The run id behind a placeholder; None if the store refused to start that run."""
        return self._run_ids.get(run_id) if run_id.startswith(_PLACEHOLDER) else run_id

    def _opened(self) -> MlflowClient:
        assert self._client is not None, "call Tracker.open() first"
        return self._client

    def _do(self, what: str, act: Callable[[], None]) -> None:
        self._opened()
        self._outbox.send(what, act)
