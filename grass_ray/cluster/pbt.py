"""A member of a population (PBT, arXiv 1711.09846): generations of training, each from a checkpoint and with settings.

After every generation the member tells Tune its loss on held-out rows, with a small checkpoint that says where the real
one lies (a *standing*), and is put to sleep. The scheduler wakes it with its own standing, or with that of a better
member and changed settings::

    Tuner(tune.with_resources(drive_member, ...), tune_config=TuneConfig(scheduler=Population(...)))

What came of a generation is kept under its name, which says where it began and with what settings. A sweep that goes
on after its driver died begins with the first generation again, whose members tell at once what they told before; since
the scheduler decides the same again (:class:`grass_ray.cluster.schedulers.Population`), nothing is trained twice.
"""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.tune

from grass_ray.cluster.storage import Storage
from grass_ray.cluster.trial import RECORD_FILE, TIME, Job, train
from grass_ray.config import RunConfig, from_json, to_json
from grass_ray.experiment.space import from_plain, values
from grass_ray.experiment.tuning import generation_ends
from grass_ray.training.report import VALIDATION

STANDING_FILE = "standing.json"
GENERATIONS_FOLDER = "generations"
_PAUSED_WITHIN_S = 600.0


@dataclass(frozen=True, kw_only=True)
class MemberState:
    """Where a member stands: updates done, the checkpoint of them, whose it is, and how it came there."""

    updates: int
    checkpoint: str | None
    key: str
    lineage: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        """The standing as text."""
        return to_json(self, keep=True)

    @classmethod
    def from_json(cls, text: str) -> MemberState:
        """The standing again."""
        return cls(**from_json(text))


def drive_member(tune_config: dict[str, Any]) -> None:
    """Train one generation and wait for what the scheduler decides; a Tune function that does no work itself."""
    given = Job(**tune_config["job"])
    storage = Storage(given.storage)
    standing = _standing(given.key)
    job = next_generation(given, standing)
    ended = storage.exists(GENERATIONS_FOLDER, job.train_name) or _train(job, storage, standing)
    if not ended:
        return
    kept = from_json(storage.read_text(GENERATIONS_FOLDER, job.train_name))
    reached = MemberState(**kept["standing"])
    if kept["loss"] is None:  # the last one
        return
    with tempfile.TemporaryDirectory(prefix="grass_ray-standing-") as name:
        (Path(name) / STANDING_FILE).write_text(reached.to_json(), encoding="utf-8")
        message = {"phase": "generation", "steps": [], TIME: reached.updates, VALIDATION: kept["loss"]}
        ray.tune.report(message, checkpoint=ray.tune.Checkpoint.from_directory(name))
    # in step with the others: Tune stops this process here, and starts another one for the next generation
    threading.Event().wait(_PAUSED_WITHIN_S)
    raise RuntimeError(f"{job.key} was not put to sleep after {reached.updates} updates")


def _train(job: Job, storage: Storage, standing: MemberState) -> bool:
    """Train a generation, and keep what came of it; False where its workers died too often."""
    result = train(job, storage)
    if result is None:
        return False
    lineage = job.search["lineage"] if job.search else []
    checkpoint = _uri(storage, job, result)
    reached = MemberState(updates=job.until or 0, checkpoint=checkpoint, key=job.key, lineage=lineage)
    loss: float | None = None
    if storage.exists(job.folder, RECORD_FILE):  # trained to its end, or failed with a reason
        storage.write_text(reached.to_json(), job.folder, STANDING_FILE)
    else:
        assert result.metrics is not None
        loss = result.metrics[VALIDATION]
        _remove_older(storage, job, standing.updates)
    storage.write_text(to_json({"standing": reached, "loss": loss}, keep=True), GENERATIONS_FOLDER, job.train_name)
    return True


def next_generation(given: Job, standing: MemberState) -> Job:
    """The job of the generation that begins at a standing, with the settings that the member has now."""
    assert given.space is not None
    assert given.picks is not None
    space = from_plain(given.space)
    settings = values(space, given.picks)
    config = RunConfig.parse(given.config).override(settings)
    ends = generation_ends(config.training.steps)
    until = next(end for end in ends if end > standing.updates)
    lineage = list(standing.lineage)
    if not lineage or standing.key != given.key or lineage[-1]["settings"] != settings:
        lineage.append({"step": standing.updates, "weights_of": standing.key, "settings": settings})
    return replace(
        given,
        config=config.to_dict(),
        until=until,
        start_from=standing.checkpoint,
        validate_at=(until,) if until < config.training.steps else (),
        watched=tuple(space),
        search={**(given.search or {}), "lineage": lineage},
    )


def _standing(key: str) -> MemberState:
    """What the scheduler woke the member with; at first nothing."""
    checkpoint = ray.tune.get_checkpoint()
    if checkpoint is None:
        return MemberState(updates=0, checkpoint=None, key=key)
    with checkpoint.as_directory() as folder:
        return MemberState.from_json((Path(folder) / STANDING_FILE).read_text(encoding="utf-8"))


def _uri(storage: Storage, job: Job, result: ray.train.Result) -> str | None:
    if result.checkpoint is None:
        return None
    return storage.join("ray", job.train_name, Path(result.checkpoint.path).name).uri


def _remove_older(storage: Storage, job: Job, before: int) -> None:
    """Drop this member's checkpoints that nobody can ask for: all members have passed the generation before last."""
    kept = tuple(f"train-{job.key}-to-{end}-" for end in (before, job.until))
    for name in storage.join("ray").folders():
        if name.startswith(f"train-{job.key}-to-") and not name.startswith(kept):
            storage.remove("ray", name)
