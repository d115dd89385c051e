"""A member of a population (PBT, arXiv 1711.09846): generations of training, each from a checkpoint and with settings.

After every generation the member tells Tune its loss on held-out rows, with a small checkpoint that says where the real
one is (a :class:`MemberState`), and is put to sleep. The scheduler wakes it with its own state, or with that of a
better member and changed settings::

    Tuner(tune.with_resources(single_member, ...), tune_config=TuneConfig(scheduler=Population(...)))

What came of a generation is kept under its name, which says where it began and with what settings. A sweep that is
resumed after its driver died begins with the first generation again, whose members tell at once what they told before;
since the scheduler decides the same again (:class:`grass_ray.cluster.schedulers.Population`), nothing is trained twice.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.tune
from pydantic import AliasChoices, Field

from grass_ray.cluster.job import RECORD_FILE, TIME, Job
from grass_ray.cluster.ray_worker import TuneWorker
from grass_ray.cluster.storage import Storage
from grass_ray.cluster.trial import train
from grass_ray.cluster.worker import work
from grass_ray.experiment.search import generation_ends
from grass_ray.experiment.space import values
from grass_ray.results.record import LineageStep, RecordPart
from grass_ray.training.report import VALIDATION

STATE_FILE = "standing.json"
GENERATIONS_FOLDER = "generations"
_PAUSED_WITHIN_S = 600.0


class MemberState(RecordPart):
    """Where a member is.

    Attributes:
        train_step: training steps done.
        checkpoint: URI of the checkpoint after them; None at the beginning.
        key: of the member whose checkpoint it is.
        lineage: how it came there.
    """

    train_step: int = Field(default=0, validation_alias=AliasChoices("train_step", "updates"))
    checkpoint: str | None = None
    key: str
    lineage: list[LineageStep] = Field(default_factory=list)


class Generation(RecordPart):
    """What came of a generation: where the member is now, and its loss on held-out rows; None after the last one."""

    state: MemberState = Field(validation_alias=AliasChoices("state", "standing"))
    loss: float | None


Trained = tuple[str | None, Mapping[str, Any]]
"""The last checkpoint's URI, and the last report."""


def single_member(params: dict[str, Any]) -> None:
    """A member with one worker; a Tune function that trains one generation and waits for what the scheduler decides."""
    _take_part(params, _train_here)


def drive_member(params: dict[str, Any]) -> None:
    """A member with several workers: as :func:`single_member`, but Ray Train does the work."""
    _take_part(params, _train_by_workers)


def _take_part(params: dict[str, Any], train: Callable[[Job, Storage], Trained | None]) -> None:
    given = Job.model_validate(params["job"])
    storage = Storage(given.context.storage)
    state = _restored_state(given.key)
    job = next_generation(given, state)
    if not storage.exists(GENERATIONS_FOLDER, job.train_name):
        trained = train(job, storage)
        if trained is None:
            return
        _keep(job, storage, state, *trained)
    generation = Generation.model_validate_json(storage.read_text(GENERATIONS_FOLDER, job.train_name))
    if generation.loss is None:
        return
    with tempfile.TemporaryDirectory(prefix="grass_ray-standing-") as name:
        (Path(name) / STATE_FILE).write_text(generation.state.model_dump_json(), encoding="utf-8")
        message = {"phase": "generation", "steps": [], TIME: generation.state.train_step, VALIDATION: generation.loss}
        ray.tune.report(message, checkpoint=ray.tune.Checkpoint.from_directory(name))
    # all members wait for each other: Tune stops this thread or its process here, and starts the next generation
    threading.Event().wait(_PAUSED_WITHIN_S)
    raise RuntimeError(f"{job.key} was not put to sleep after {generation.state.train_step} training steps")


def _train_here(job: Job, storage: Storage) -> Trained:
    worker = TuneWorker(storage.join("ray", job.train_name))
    work(job, worker)
    return worker.latest, worker.last_report


def _train_by_workers(job: Job, storage: Storage) -> Trained | None:
    """None if the workers died too often."""
    result = train(job, storage)
    if result is None:
        return None
    name = None if result.checkpoint is None else Path(result.checkpoint.path).name
    uri = None if name is None else storage.join("ray", job.train_name, name).uri
    return uri, result.metrics or {}


def _keep(job: Job, storage: Storage, state: MemberState, checkpoint: str | None, report: Mapping[str, Any]) -> None:
    """Keep what came of a generation."""
    ended = storage.exists(job.folder, RECORD_FILE)  # trained to its end, or failed with a reason
    lineage = job.search.lineage if job.search else []
    reached = MemberState(train_step=job.until or 0, checkpoint=checkpoint, key=job.key, lineage=lineage)
    if ended:
        storage.write_text(reached.model_dump_json(), job.folder, STATE_FILE)
    else:
        _remove_older(storage, job, state.train_step)
    generation = Generation(state=reached, loss=None if ended else report[VALIDATION])
    storage.write_text(generation.model_dump_json(), GENERATIONS_FOLDER, job.train_name)


def next_generation(given: Job, state: MemberState) -> Job:
    """The job of the generation that begins at ``state``, with the settings that the member has now."""
    assert given.space is not None
    assert given.params is not None
    assert given.search is not None
    settings = values(given.space, given.params)
    config = given.config.override(settings)
    lineage = list(state.lineage)
    if not lineage or state.key != given.key or lineage[-1].settings != settings:
        lineage.append(LineageStep(step=state.train_step, weights_of=state.key, settings=settings))
    changes = {
        "config": config,
        "until": next(end for end in generation_ends(config.training.steps) if end > state.train_step),
        "start_from": state.checkpoint,
        "search": given.search.model_copy(update={"lineage": lineage}),
    }
    return given.model_copy(update=changes)


def _restored_state(key: str) -> MemberState:
    """What the scheduler woke the member with; at first nothing."""
    checkpoint = ray.tune.get_checkpoint()
    if checkpoint is None:
        return MemberState(key=key)
    with checkpoint.as_directory() as folder:
        return MemberState.model_validate_json((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))


def _remove_older(storage: Storage, job: Job, before: int) -> None:
    """Delete this member's checkpoints that are not needed: all members have passed the generation before last."""
    kept = tuple(f"train-{job.key}-to-{end}-" for end in (before, job.until))
    for name in storage.join("ray").folders():
        if name.startswith(f"train-{job.key}-to-") and not name.startswith(kept):
            storage.remove("ray", name)
