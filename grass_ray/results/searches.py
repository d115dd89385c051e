"""What a search left behind, read from run records: which trials it had, their losses on the way, who won.

::

    for method, trials in searched(records).items():
        print(method, [trial_loss(record) for record in trials], winner(trials))
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from grass_ray.results.record import RunRecord
from grass_ray.training.report import VALIDATION


def is_search(record: RunRecord) -> bool:
    """Whether a record is of a trial that searched, and met no test."""
    return record.search is not None and record.search.stage == "search"


def searched(records: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """The trials of each method's search, in their order; of two sweeps' trials of one number the later stand last."""
    found: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        if is_search(record):
            found[record.config["method"]["name"]].append(record)
    return {method: sorted(own, key=_place) for method, own in found.items()}


def _place(record: RunRecord) -> tuple[str, int]:
    return record.sweep_id, record.search.number if record.search else 0


def trial_loss(record: RunRecord) -> float:
    """The loss on held-out rows at a trial's end; NaN where it did not come there."""
    return record.metrics.get(VALIDATION, math.nan) if record.status == "finished" else math.nan


def winner(records: Sequence[RunRecord]) -> RunRecord | None:
    """The trial with the lowest loss on held-out rows, of equal ones the first; None where none came to its end."""
    finished = [record for record in records if math.isfinite(trial_loss(record))]
    return min(finished, key=lambda record: (trial_loss(record), _place(record)), default=None)


def rung_losses(record: RunRecord) -> dict[int, float]:
    """The losses on held-out rows that were measured on the way, by the number of training steps done."""
    losses = dict(record.series.get(VALIDATION, ()))
    return {done: losses[step] for step, done in record.train_steps(losses).items()}
