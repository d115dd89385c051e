"""One process of a trial as Ray knows it: a worker of Ray Train, or the trial's own process in Ray Tune.

A trial with one worker needs no process group, no controller and nobody who watches it, so it trains in the process
that Tune starts for it, and the next trial takes that process over with all that it has imported. Several workers, and
workers whose number changes, are Ray Train's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.tune
from ray._private.state import state as cluster_state

from grass_ray.cluster.storage import Storage

_LATEST_FILE = "latest"  # names the last checkpoint that is complete


class RayWorker(Protocol):
    """What a trial's process asks of Ray.

    Attributes:
        rank: among the trial's workers.
        workers: how many there are.
        waits: whether :meth:`report` returns after the scheduler has decided about what was reported.
    """

    rank: int
    workers: int
    waits: bool

    def report(self, message: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Tell the driver; with several workers a barrier. A ``checkpoint`` is in the storage when this returns."""

    def checkpoint(self) -> AbstractContextManager[Path | None]:
        """A local copy of the trial's last checkpoint; None if there is none."""

    def loses_its_machine(self) -> bool:
        """Whether a machine of the trial is about to be taken away."""


class TrainWorker:
    """A worker of Ray Train, which keeps the checkpoints and starts all workers again if one dies."""

    waits = False

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.workers = context.get_world_size()

    def report(self, message: dict[str, Any], checkpoint: Path | None = None) -> None:
        """See :meth:`RayWorker.report`."""
        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
        ray.train.report(message, checkpoint=kept)

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """See :meth:`RayWorker.checkpoint`."""
        last = ray.train.get_checkpoint()
        if last is None:
            yield None
        else:
            with last.as_directory() as folder:
                yield Path(folder)

    def loses_its_machine(self) -> bool:
        """See :meth:`RayWorker.loses_its_machine`."""
        return ray.train.get_preemption_info() is not None


class TuneWorker:
    """The only worker of a trial, in Tune's process. Tune starts it again if it dies; checkpoints are kept here.

    Args:
        storage: of the trial's checkpoints. They outlive the Tuner: a sweep that is resumed has another.

    Attributes:
        last_report: what the driver was told last.
    """

    rank = 0
    workers = 1
    waits = True

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.last_report: dict[str, Any] = {}
        self._node = ray.get_runtime_context().get_node_id()

    def report(self, message: dict[str, Any], checkpoint: Path | None = None) -> None:
        """See :meth:`RayWorker.report`; ends this thread if the scheduler stops the trial."""
        if checkpoint is not None:
            self._keep(checkpoint)
        self.last_report = message
        ray.tune.report(message)

    @property
    def latest(self) -> str | None:
        """The last checkpoint's URI; None if there is none."""
        if not self._storage.exists(_LATEST_FILE):
            return None
        return self._storage.join(self._storage.read_text(_LATEST_FILE)).uri

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """See :meth:`RayWorker.checkpoint`."""
        latest = self.latest
        if latest is None:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="grass_ray-checkpoint-") as folder:
            Storage(latest).download(Path(folder))
            yield Path(folder)

    def loses_its_machine(self) -> bool:
        """See :meth:`RayWorker.loses_its_machine`."""
        return self._node in cluster_state.get_draining_nodes()

    def _keep(self, checkpoint: Path) -> None:
        """Copy a checkpoint to the storage, and only then forget the one before."""
        folders = self._storage.folders()
        name = f"checkpoint_{1 + max((int(folder.rpartition('_')[2]) for folder in folders), default=-1):06d}"
        self._storage.upload(checkpoint, name)
        self._storage.write_text(name, _LATEST_FILE)
        for folder in folders:
            self._storage.remove(folder)
