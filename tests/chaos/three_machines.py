"""A Ray cluster of three nodes with one CPU each on this machine, which loses a node whenever it is told to.

Prints its address; every line ``kill`` on its input kills a node that is not the head (SIGKILL), adds another and
answers with the number of nodes. Ends with its input. RAY_TMPDIR must be a folder of its own: Ray writes there which
cluster ``ray.init()`` joins.
"""

from __future__ import annotations

import os
import random
import signal
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    assert os.environ["RAY_TMPDIR"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    chosen = random.Random(0)
    try:
        for _ in sys.stdin:
            node = chosen.choice(sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id)))
            for process in node.all_processes["raylet"]:
                os.kill(process.process.pid, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            print(1 + len(cluster.worker_nodes), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
