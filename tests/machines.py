"""A Ray cluster of several machines on this one, in a process of its own, that loses and gains machines when told to.

::

    with Machines(3) as machines:
        subprocess.run([...], env=machines.environment)
        machines.tell("kill")

Each has one CPU, the head perhaps none. Run as a program it prints the cluster's address, and answers each line of its
input with the number of machines: ``kill`` ends one that is not the head (SIGKILL) and adds another, ``lose`` ends one
(``lose NODE_ID`` that one), ``add`` adds one (``add NAME=VALUE ...`` with these in its environment). ``head``
kills the head's control service and starts it again seconds later, which Ray survives if RAY_gcs_storage=rocksdb and
RAY_gcs_storage_path were set, or RAY_REDIS_ADDRESS.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from grass_ray.process import environment

HEAD_AWAY_S = 5


class Machines:
    """The cluster as tests see it.

    Attributes:
        folder: of its own, with a short name: Ray's sockets lie in it, and which cluster ``ray.init()`` joins.
        environment: makes a program join the cluster.
        enter: words before a command that is to run on the head.
        process: has all of the cluster's processes as children.
    """

    enter: tuple[str, ...] = ()

    def __init__(self, number: int, head_cpus: int = 1, before: Sequence[str] = ()) -> None:
        """``before``: words of a program that runs the cluster, as ``env`` or ``unshare`` do."""
        self.folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
        own = {**os.environ, "RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            own.pop(name, None)
        self._log = (self.folder / "machines.log").open("w")
        self.process = subprocess.Popen(
            [*before, sys.executable, __file__, str(number), str(head_cpus)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=own,
        )  # fmt: skip
        own.pop("RAY_REDIS_ADDRESS", None)  # the head's alone
        self.environment = own | {"RAY_ADDRESS": self._answer()}

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """End the cluster; the folder stays where a test has failed."""
        children = self.processes()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        self._log.close()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """All of the cluster's."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def tell(self, word: str) -> int:
        """Let it kill, lose or add a machine; the number of machines then."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, Path(self._log.name).read_text()
        return line


def main(number: int, head_cpus: int) -> None:
    """Be the cluster until the input ends."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": head_cpus, "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(number - 1):
        cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    chosen = random.Random(0)
    try:
        for line in sys.stdin:
            word = line.strip()
            if word.startswith(("kill", "lose")):
                nodes = sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id))
                named = [node for node in nodes if node.node_id == word.partition(" ")[2]]
                node = chosen.choice(named or nodes)
                for process in node.all_processes["raylet"]:
                    os.kill(process.process.pid, signal.SIGKILL)
                cluster.remove_node(node, allow_graceful=False)
            if word == "head":
                cluster.head_node.kill_gcs_server()
                time.sleep(HEAD_AWAY_S)
                cluster.head_node.start_gcs_server()
            if word.startswith(("kill", "add")):
                with environment(dict(pair.split("=", 1) for pair in word.split()[1:])):
                    cluster.add_node(num_cpus=1)
            print(1 + len(cluster.worker_nodes), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
