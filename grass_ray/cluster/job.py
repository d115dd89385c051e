"""What the processes of a trial are told: the run's configuration, and where in a sweep it belongs."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from grass_ray.cluster.resources import TrialResources
from grass_ray.cluster.storage import Storage
from grass_ray.config import Code, Parallel, RunConfig
from grass_ray.errors import redact
from grass_ray.execute import RunContext
from grass_ray.experiment.search import rungs
from grass_ray.experiment.space import Params, Space
from grass_ray.results.provenance import hardware
from grass_ray.results.record import SearchPart

TIME = "step"  # training steps, in the reports that Tune's schedulers look at
HELD = "held"  # in a report: its process waits at a rung until it is let pass
RECORD_FILE = "record.json"
TRACEBACK_FILE = "traceback.txt"  # of a trial whose processes died too often
FAILURE_FILE = "failure.json"  # why one worker of several ended its trial
# what the telling line of Ray's messages on memory and on killed processes has; their last line says something else
_TELLING = ("low on memory", "NODE_OUT_OF_MEMORY", "is dead because", "because its node")
_ADDRESS = re.compile(r"\bip(?:: ?|=)([0-9a-f.:]*[0-9a-f])", re.IGNORECASE)


def has_ended(storage: Storage, config: RunConfig) -> bool:
    """Return whether a trial of the sweep in ``storage`` need not run again: it has a record, and did not die."""
    folder = config.folder
    return storage.exists(folder, RECORD_FILE) and not storage.exists(folder, TRACEBACK_FILE)


class SweepContext(BaseModel):
    """What all trials of a sweep share.

    Attributes:
        sweep: the sweep's name.
        sweep_id: which execution of it.
        storage: URI of the sweep's folder.
        resources: of each trial.
        parallel: whether each worker holds the whole model, or shards of it.
        keep_checkpoints: keep what each trial trained.
        memory_check: refuse trials that cannot fit into memory.
        memory_bytes: what each worker may take; None is that of its device.
        max_failures: how often a process may die before its trial counts as failed.
        code: of methods of the user's own, which the workers run.
    """

    model_config = ConfigDict(frozen=True)

    sweep: str
    sweep_id: str
    storage: str
    resources: TrialResources
    parallel: Parallel = "replicate"
    keep_checkpoints: bool = False
    memory_check: bool = True
    memory_bytes: int | None = None
    max_failures: int = 2
    code: tuple[Code, ...] = ()

    def describe(self, machine: str) -> str:
        """A machine in words; speed and memory of shards, or of a changing number of workers, are not comparable."""
        suffix = ", model sharded" if self.parallel == "shard" else ""
        return machine + suffix + (f", elastic from {self.resources.min_workers}" if self.resources.elastic else "")


class Job(BaseModel):
    """One trial, or one generation of a population's member.

    It travels to Tune as plain values (:meth:`to_dict`), since Tune puts placeholders in the place of objects.

    Attributes:
        config: the run.
        key: the trial's key, which stays when a population changes the configuration.
        folder: the trial's folder in the sweep's.
        context: what all trials of the sweep share.
        search: which search the trial belongs to.
        until: training steps after which a generation ends.
        start_from: URI of the checkpoint that the run begins with.
        space: of a population's search.
        params: the member's point of ``space``, which PBT changes.
    """

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    key: str
    folder: str
    context: SweepContext
    search: SearchPart | None = None
    until: int | None = None
    start_from: str | None = None
    space: Space | None = None
    params: Params | None = None

    @classmethod
    def of(cls, config: RunConfig, context: SweepContext, **fields: Any) -> Job:
        """The job of a trial; ``fields`` are further attributes."""
        return cls(config=config, key=config.fingerprint, folder=config.folder, context=context, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``Job.model_validate`` reads them."""
        return self.model_dump(mode="json")

    @property
    def train_name(self) -> str:
        """The Train run's name: the same in every attempt, so that Train finds the last checkpoint.

        Each generation of a population has its own, or a member would always continue from its own checkpoint.
        """
        if self.until is None:
            return f"train-{self.key}"
        origin = json.dumps([self.start_from, self.config.to_dict()], sort_keys=True)
        return f"train-{self.key}-to-{self.until}-{hashlib.sha256(origin.encode()).hexdigest()[:8]}"

    @property
    def validate_at(self) -> tuple[int, ...]:
        """Training steps after which the loss on held-out rows is measured on the way."""
        steps = self.config.training.steps
        if self.until is not None:
            return (self.until,) if self.until < steps else ()
        if self.search is None or self.search.stage != "search" or self.search.scheduler != "asha":
            return ()
        return rungs(steps)

    @property
    def hardware(self) -> str:
        """This machine in words, as the record says it."""
        return self.context.describe(hardware())

    @property
    def run_context(self) -> RunContext:
        """What the trial's record says of it."""
        return RunContext(
            sweep=self.context.sweep,
            sweep_id=self.context.sweep_id,
            run_id=f"{self.context.sweep_id}-{self.key}",
            hardware=self.hardware,
            world_size=self.context.resources.workers,
            search=self.search,
        )


def describe_death(error: str, times: int) -> str:
    """What a record says of a trial whose worker died ``times`` times, the last time with the message ``error``."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    found = (line for words in _TELLING for line in lines if words in line)
    telling = next(found, lines[-1] if lines else "no reason known")
    telling = telling.partition(" Some common causes include:")[0]  # three lines of guesses
    address = _ADDRESS.search(error)
    where = f" (machine {address[1]})" if address and address[1] not in telling else ""
    return redact(f"the worker failed {times} time(s): {telling}{where}")
