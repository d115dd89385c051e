"""The numbers of runs on their way to a store: which wait, and which of them it has.

::

    numbers = Numbers()
    numbers.add(run_id, [(1, {"train/loss": 2.0})])
    numbers.send(client, run_id, run_id)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grass_ray.results.connection import metric_name
from grass_ray.results.outbox import is_refusal
from grass_ray.results.record import RunRecord
from grass_ray.results.writes import ended_at, log_metrics, logged_steps, missing_steps

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_MOST_WAITING = 200_000  # numbers, some 50 MB; those beyond are taken from the record at the run's end


class Numbers:
    """Metrics of runs, each sent once."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Metric]] = {}
        self._reopened: set[str] = set()
        self._logged: dict[tuple[str, str], int] = {}  # the last step of each metric

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def reopen(self, run_id: str) -> None:
        """Know that the store may have numbers of a run that another process sent."""
        self._reopened.add(run_id)
        self._logged = {known: step for known, step in self._logged.items() if known[0] != run_id}

    def add(self, run_id: str, points: Sequence[tuple[int, dict[str, float]]]) -> bool:
        """Let the metrics of (step, metrics) points wait; returns False if too many wait already."""
        from mlflow.entities import Metric

        if len(self) > _MOST_WAITING:
            return False
        moment = int(time.time() * 1000)  # fixed here: MLflow drops exact repetitions, so a retry adds nothing
        self._waiting.setdefault(run_id, []).extend(
            Metric(metric_name(key), float(value), moment, step)
            for step, values in points
            for key, value in values.items()
        )
        return True

    def send(self, client: MlflowClient, run_id: str, known: str | None) -> None:
        """Send what waits for a run; ``known`` is its id in the store, None if the store refused to start it."""
        rows = self._waiting.pop(run_id, [])
        if known is None:
            return
        try:
            new = [row for row in rows if row.step > self._last_step(client, known, row.key)]
            log_metrics(client, known, new)
        except Exception as error:
            if not is_refusal(error):
                self._waiting[run_id] = rows
            raise
        for row in new:
            self._logged[known, row.key] = max(row.step, self._logged[known, row.key])

    def missing(self, client: MlflowClient, run_id: str, record: RunRecord, *, look_up: bool) -> list[Metric]:
        """What a record's series have and its run lacks; ``look_up``: the store may have lost something."""
        from mlflow.entities import Metric

        if look_up or run_id in self._reopened:
            return missing_steps(client, run_id, record.series, ended_at(record))
        return [
            Metric(metric_name(key), float(value), ended_at(record), step)
            for key, points in record.series.items()
            for step, value in points
            if step > self._last_step(client, run_id, metric_name(key))
        ]

    def _last_step(self, client: MlflowClient, run_id: str, key: str) -> int:
        if (run_id, key) not in self._logged:
            steps = logged_steps(client, run_id, key) if run_id in self._reopened else set()
            self._logged[run_id, key] = max(steps, default=-1)
        return self._logged[run_id, key]
