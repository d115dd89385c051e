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
next call and at :meth:`Tracker.close`; each can be repeated without counting anything twice.
"""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_ray.config import ConfigError, to_json
from grass_ray.errors import redact
from grass_ray.results.connection import SQLITE, absolute_uri, connect, metric_name, quoted, sqlite_path, store_errors
from grass_ray.results.outbox import Outbox
from grass_ray.results.record import RunRecord, Status
from grass_ray.results.store import PARENT_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_STATUS: Mapping[Status, str] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "out_of_memory": "FAILED",
}
SWEEP_KEY = "(sweep)"  # the trial_key of a parent run, so that it is found among its children
RANKING_FILE = "ranking.json"
_NOTE_TAG = "mlflow.note.content"  # MLflow's page shows it as the run's description
_TABLES_TAG = "mlflow.loggedArtifacts"  # and what this names as tables
_PLACEHOLDER = "waiting-"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages open on runs, not on chats
_FILES = ("config.yaml", "record.json", "examples.jsonl", "lm_eval_examples.jsonl", "engagement.json", "engagement.txt")
_PICTURES = ("*.png", "*.svg", "*.pdf", "plots/*.png", "plots/*.svg", "plots/*.pdf")
_METRICS_A_BATCH = 1000
_OTHERS_A_BATCH = 100


class Tracker:
    """Writes one experiment. A pickled copy holds only the arguments and must be opened again.

    Args:
        tracking_uri: ``sqlite:///...`` (made absolute) or the address of an MLflow server.
        experiment: the experiment's name, that of the sweep.
        artifact_root: where a SQLite store keeps artifacts; None means ``artifacts`` beside the database. A server
            decides this itself.
    """

    def __init__(self, tracking_uri: str, experiment: str, artifact_root: Path | None = None) -> None:
        self.tracking_uri = absolute_uri(tracking_uri)
        self.experiment = experiment
        self.artifact_root = None if artifact_root is None else Path(artifact_root).absolute()
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._outbox = Outbox(redact(self.tracking_uri))
        self._run_ids: dict[str, str] = {}
        self._reopened: set[str] = set()
        self._logged: dict[tuple[str, str], int] = {}
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

    @property
    def waiting(self) -> int:
        """Calls that the store has not taken yet."""
        return len(self._outbox)

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
            _add_params(self._opened(), run_id, params)
            self._run_ids[placeholder] = run_id

        self._do(f"start of {run_name}", act)
        return self._run_ids.get(placeholder, placeholder)

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
        """The run with these two tags. They are set at its creation, so a killed process leaves no run without them."""
        client = self._opened()
        wanted = f"tags.sweep_id = {quoted(sweep_id)} and tags.trial_key = {quoted(trial_key)}"
        found = client.search_runs([self._experiment_id], wanted, max_results=1, order_by=["attributes.start_time ASC"])
        every = dict(tags or {}) | {"sweep_id": sweep_id, "trial_key": trial_key}
        if parent is not None:
            every[PARENT_TAG] = parent
        if not found:
            return str(client.create_run(self._experiment_id, tags=every, run_name=run_name).info.run_id)
        run_id = str(found[0].info.run_id)
        if tags is not None:  # started anew, not merely looked up as somebody's parent
            self._reopened.add(run_id)
            self._logged = {known: step for known, step in self._logged.items() if known[0] != run_id}
            client.update_run(run_id, status="RUNNING")
            _set_tags(client, run_id, every)
        return run_id

    # -- numbers and files

    def log_steps(self, run_id: str, points: list[tuple[int, dict[str, float]]]) -> None:
        """Log the metrics of (step, metrics) points. Steps that a reopened run already had are not logged again."""
        from mlflow.entities import Metric

        moment = int(time.time() * 1000)  # fixed here: MLflow drops exact repetitions, so a retry adds nothing
        rows = [
            Metric(metric_name(key), float(value), moment, step)
            for step, values in points
            for key, value in values.items()
        ]

        def act() -> None:
            known = self._known(run_id)
            if known is not None:
                _log_metrics(self._opened(), known, [row for row in rows if row.step > self._last_step(known, row.key)])

        self._do(f"{len(points)} steps", act)

    def _last_step(self, run_id: str, key: str) -> int:
        if run_id not in self._reopened:
            return -1
        if (run_id, key) not in self._logged:
            history = self._opened().get_metric_history(run_id, key)
            self._logged[run_id, key] = max((metric.step for metric in history), default=-1)
        return self._logged[run_id, key]

    def finish(self, run_id: str, record: RunRecord, folder: Path) -> None:
        """End a trial: final metrics, artifacts (record, configuration, examples, pictures), tags, status.

        In this order, so that a run MLflow calls finished is complete; one that did not finish ends first, since files
        may be what cannot be written. ``folder`` must stay until :meth:`close`.
        """
        from mlflow.entities import Metric

        ended = int(datetime.fromisoformat(record.finished_at).timestamp() * 1000)
        last = max((points[-1][0] for points in record.series.values() if points), default=0)
        rows = [
            Metric(metric_name(key), float(value), ended, last)
            for key, value in record.metrics.items()
            if record.series.get(key, [])[-1:] != [(last, value)]
        ]
        tags = {
            "status": record.status,
            "hardware": record.hardware,
            "world_size": str(record.world_size),
            "git_commit": record.git_commit or "-",
            "git_dirty": "-" if record.git_dirty is None else str(record.git_dirty).lower(),
        }
        if record.reused_from:
            tags["reused_from"] = record.reused_from
        if record.failure:
            tags["failure"] = record.failure[:5000]

        def act() -> None:
            client, known = self._opened(), self._known(run_id)
            if known is None:
                return
            if record.status != "finished":
                _set_tags(client, known, tags)
                client.set_terminated(known, RUN_STATUS[record.status], ended)
            _log_metrics(client, known, rows)
            try:
                upload(client, known)
            except OSError as error:
                if record.status == "finished" or error.errno != errno.ENOSPC:
                    raise  # else there is no room for the files; what is behind this call must not wait for it
            _set_tags(client, known, tags)
            client.set_terminated(known, RUN_STATUS[record.status], ended)

        def upload(client: MlflowClient, known: str) -> None:
            client.log_text(known, record.model_dump_json(indent=1), "record.json")
            files = [folder / name for name in _FILES if name != "record.json"]
            files += [path for pattern in _PICTURES for path in sorted(folder.glob(pattern))]
            for path in files:
                if path.is_file() and not path.is_symlink():  # a link may lead out of the run's folder
                    inside = path.parent.relative_to(folder).as_posix()
                    client.log_artifact(known, str(path), None if inside == "." else inside)

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
            client.log_text(known, _split_table(table), RANKING_FILE)
            for path in files:
                client.log_artifact(known, str(path))
            is_table = to_json([{"path": RANKING_FILE, "type": "table"}])
            _set_tags(client, known, {**tags, _NOTE_TAG: note, _TABLES_TAG: is_table})
            client.set_experiment_tag(self._experiment_id, _NOTE_TAG, note)  # the newest sweep's, on the first page

    def finish_sweep(self, run_id: str, *, status: Status = "finished") -> None:
        """End a sweep's run."""
        ended = int(time.time() * 1000)

        def act() -> None:
            client, known = self._opened(), self._known(run_id)
            if known is not None:
                _set_tags(client, known, {"status": status})
                client.set_terminated(known, RUN_STATUS[status], ended)

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


def _add_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    present = client.get_run(run_id).data.params  # params never change in MLflow: only new ones are sent
    new = {metric_name(key): str(value)[:6000] for key, value in params.items()}
    rows = [Param(key, value) for key, value in new.items() if key not in present]
    for start in range(0, len(rows), _OTHERS_A_BATCH):
        client.log_batch(run_id, params=rows[start : start + _OTHERS_A_BATCH])


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(metric_name(key), value) for key, value in tags.items()])


def _log_metrics(client: MlflowClient, run_id: str, rows: list[Any]) -> None:
    for start in range(0, len(rows), _METRICS_A_BATCH):
        client.log_batch(run_id, metrics=rows[start : start + _METRICS_A_BATCH])


def _split_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as ``pandas.DataFrame.to_json(orient="split")`` writes them, which MLflow shows as a table."""
    columns = list(rows[0]) if rows else []
    return to_json({"columns": columns, "data": [[row[column] for column in columns] for row in rows]})
