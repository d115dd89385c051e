"""What the machines of a cluster have, and what each trial gets of it.

::

    with ray_cluster() as cluster:
        cluster.check_storage(storage)
        resources = cluster.trial_resources(cpus=None, gpus=None, max_concurrent=None)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError

PROBE_FILE = ".seen-by-every-machine"


class TrialResources(BaseModel):
    """What each worker of a trial gets, and how many trials run at once.

    An elastic trial goes on with any number of workers from ``min_workers`` to ``workers``.
    """

    model_config = ConfigDict(frozen=True)

    cpus: int
    gpus: int
    slots: int = 1
    workers: int = 1
    min_workers: int = Field(default_factory=lambda fields: fields["workers"])

    @property
    def elastic(self) -> bool:
        """Whether a trial goes on with fewer workers when machines are missing."""
        return self.min_workers < self.workers


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """The machines of the Ray cluster that was joined or started.

    Attributes:
        address: of its head, HOST:PORT.
        machines: (CPUs, GPUs) of each.
        joined: whether it was there already; otherwise it was started here and ends with this process.
        node_ids: Ray's names of the machines.
        memories: bytes that each machine offers to tasks.
        dashboard: whether Ray's dashboard runs.
        freed: number of placement groups that dead sweeps still held.
    """

    address: str
    machines: tuple[tuple[int, int], ...]
    joined: bool = False
    node_ids: tuple[str, ...] = ()
    memories: tuple[int, ...] = ()
    dashboard: bool = True
    freed: int = 0

    def describe(self) -> str:
        """One line about the cluster."""
        cpus, gpus = (sum(machine[place] for machine in self.machines) for place in (0, 1))
        how = "joined" if self.joined else "started"
        freed = f" ({self.freed} placement groups of dead jobs freed)" if self.freed else ""
        return f"{how} Ray at {self.address}: {len(self.machines)} machine(s), {cpus} CPUs, {gpus} GPUs{freed}"

    def check_storage(self, storage: Storage) -> None:
        """Check that every machine sees the storage; one that does not would lose its trials' results.

        Raises:
            ConfigError: a machine does not see it.
        """
        if len(self.machines) < 2:
            return
        storage.write_text("", PROBE_FILE)
        looks = [
            _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote(storage.uri)
            for node in self.node_ids
        ]
        blind = [place for sees, place in ray.get(looks) if not sees]
        storage.remove(PROBE_FILE)
        if blind:
            raise ConfigError(
                f"{len(blind)} of {len(self.machines)} machines do not see the storage path {storage.shown} "
                f"({', '.join(blind)}); give --storage-path a folder that every machine mounts, or a URI (s3://, gs://)"
            )

    def check_dashboard(self) -> None:
        """Check that the resources of trials that are stopped early will be freed.

        Raises:
            ConfigError: Ray's dashboard, which frees them, does not run.
        """
        if not self.dashboard:
            raise ConfigError(
                f"the Ray at {self.address} runs without its dashboard, through which Ray Train frees the resources of "
                "trials that are stopped early; start it with --include-dashboard=true, or take --scheduler none"
            )

    def trial_resources(
        self,
        *,
        cpus: int | None,
        gpus: int | None,
        max_concurrent: int | None,
        workers: int = 1,
        min_workers: int | None = None,
    ) -> TrialResources:
        """Divide the machines among trials.

        Args:
            cpus: of each worker; None takes its GPU's part of the machine, or the whole machine without GPUs.
            gpus: of each worker; None takes one if a machine has any.
            max_concurrent: the most trials at once.
            workers: of each trial.
            min_workers: room for so many is enough for an elastic trial; other trials run beside it only if there is
                room for all ``workers`` of each.

        Raises:
            ConfigError: the machines cannot hold a trial's workers; Ray would wait without end.
        """
        min_workers = workers if min_workers is None else min_workers
        if gpus is None:
            gpus = 1 if any(machine[1] for machine in self.machines) else 0
        able = [machine for machine in self.machines if machine[1] >= gpus and machine[0] >= (cpus or 1)]
        if able and cpus is None:
            on_one = -(-workers // len(able))  # workers that must share a machine
            cpus = min(
                max(1, machine[0] // on_one if gpus == 0 else machine[0] * gpus // machine[1]) for machine in able
            )
        room = sum(min(machine[0] // (cpus or 1), machine[1] // gpus if gpus else machine[0]) for machine in able)
        if room < min_workers:
            raise ConfigError(self._no_room(cpus or 1, gpus, min_workers))
        slots = max(room // workers, 1)
        return TrialResources(
            cpus=cpus or 1,
            gpus=gpus,
            slots=min(slots, max_concurrent or slots),
            workers=workers,
            min_workers=min_workers,
        )

    def _no_room(self, cpus: int, gpus: int, workers: int) -> str:
        held = ", ".join(f"{machine[0]} CPUs and {machine[1]} GPUs" for machine in self.machines)
        if workers > 1:
            return (
                f"the cluster cannot hold {workers} workers of {cpus} CPUs and {gpus} GPUs each; "
                f"it has {held}; lower --workers-per-trial, --cpus-per-trial or --gpus-per-trial"
            )
        return (
            f"no machine can hold a trial of {cpus} CPUs and {gpus} GPUs; the cluster has {held}; "
            "lower --cpus-per-trial or --gpus-per-trial"
        )


def driver_memory(machines: Sequence[int], slots: int) -> int:
    """Compute how much memory a trial's driver must claim so that ``slots`` of them, and no more, fit the machines.

    Args:
        machines: bytes that each offers.
        slots: how many trials may run at once.
    """
    sizes = {memory // count for memory in machines for count in range(1, slots + 1) if memory >= count}
    return min(size for size in sizes if sum(memory // size for memory in machines) <= slots)


@ray.remote(num_cpus=0, max_retries=3)  # type: ignore[untyped-decorator]
def _sees(uri: str) -> tuple[bool, str]:
    """Return whether this machine sees the storage's file, and the machine's address."""
    return Storage(uri, patience_s=0).exists(PROBE_FILE), ray.util.get_node_ip_address()
