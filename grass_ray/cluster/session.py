"""Join a Ray cluster, or start Ray here.

::

    with ray_cluster() as cluster:
        print(cluster.describe())

Joins the cluster that RAY_ADDRESS names, else the one that ``ray start`` started on this machine, else starts Ray. On
the machines of a cluster RAY_ADDRESS is ``auto``, so that a sweep never starts a small Ray there because the cluster is
down.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray

from grass_ray.cluster.orphans import free_orphans
from grass_ray.cluster.resources import ClusterInfo
from grass_ray.config import ConfigError
from grass_ray.process import environment

WORKER_ENVIRONMENT = {
    # a report waits up to this long; Ray's own 2 s would slow the loop, and much less would wake too many processes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# Ray Train's loop runs in a thread, where glibc gives every large tensor fresh pages; keeping freed memory in one arena
# made a step of full fine-tuning on two CPU cores about a tenth faster.
CPU_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
MACHINES_WITHIN_S = 900.0  # a cloud's machines come minutes after the head, with an installation before they join
ANSWER_WITHIN_S = 10.0  # Ray itself would wait for many minutes
_PORT = "RAY_GCS_SERVER_PORT"  # where a Ray that is started listens
_SHORT_FOLDER = "/tmp"
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # the longest below its folder
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes of a Unix socket's path


@contextmanager
def ray_cluster(
    machines: int | None = None, within_s: float = MACHINES_WITHIN_S, *, dashboard: bool = True
) -> Iterator[ClusterInfo]:
    """Join the cluster of RAY_ADDRESS or of this machine, or start a local one; leave it at the end.

    Args:
        machines: wait until so many have joined; None takes those that are there.
        within_s: seconds to wait for them.
        dashboard: a Ray that is started here has one. Ray Train needs it to free what trials held that were stopped
            early; its ten processes take as long to start as a trial.

    Raises:
        ConfigError: the cluster does not answer, or too few machines join.
    """
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # pages for a failed trial; its record says why
    wanted = os.environ.get("RAY_ADDRESS")
    previous = signal.getsignal(signal.SIGTERM)  # Ray has a handler of its own
    try:
        if wanted and wanted not in ("auto", "local"):
            check_address(wanted)
            context = _connect({}, dashboard=dashboard)
        else:
            os.environ.update(token_without_home())
            context = _connect(short_folders(), dashboard=dashboard)
    except ConnectionError as error:
        raise ConfigError(
            f"cannot join the Ray cluster {f'of RAY_ADDRESS={wanted}' if wanted else 'of this machine'}: "
            f"{str(error).strip().splitlines()[0]} Is it running (`ray status`)? "
            "RAY_ADDRESS=local starts a Ray of its own on this machine instead"
        ) from None
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        alive = _await_machines(machines, within_s)
        joined = not _is_own(context)
        held = [node["Resources"] for node in alive]
        yield ClusterInfo(
            address=context.address_info["gcs_address"],
            machines=tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in held),
            joined=joined,
            node_ids=tuple(str(node["NodeID"]) for node in alive),
            memories=tuple(int(node.get("memory", 0)) for node in held),
            dashboard=bool(context.dashboard_url),
            freed=free_orphans() if joined and context.dashboard_url else 0,
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


def check_address(address: str) -> None:
    """Check that the head of a Ray cluster answers at ``address``.

    Raises:
        ConnectionError: it is not of the form HOST:PORT, or no head of a cluster answers.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConnectionError(
            "That is not the address of a cluster's head, HOST:PORT as `ray start --head` prints it (or auto: the "
            "cluster of this machine). http:// is for `ray job submit`, and Ray Client's ray:// is not supported."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_WITHIN_S).close()
    except OSError as error:
        raise ConnectionError(f"Nobody answers there ({error.strerror or error}).") from None
    if "RAY_USE_TLS" in os.environ:
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray speaks
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_WITHIN_S)
        except grpc.FutureTimeoutError:
            raise ConnectionError("What answers there is no head of a Ray cluster; its dashboard, perhaps.") from None


def short_folders() -> dict[str, str]:
    """Return the environment in which a Ray that is started has its sockets at paths that are short enough.

    Raises:
        ConfigError: ``/tmp`` cannot be written to, or RAY_TMPDIR itself is too long.
    """
    given, temporary = os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR")

    def short(folder: str) -> bool:
        return len(os.fsencode(os.path.abspath(folder) + _SOCKET)) <= _LONGEST_SOCKET

    if (given and not short(given)) or (not given and not os.access(_SHORT_FOLDER, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"Ray cannot have its sockets in {given or _SHORT_FOLDER}; set RAY_TMPDIR to a folder that can be written "
            f"to and whose path has at most {_LONGEST_SOCKET - len(_SOCKET)} bytes"
        )
    if temporary is None or short(temporary):
        return {}
    return dict.fromkeys(("RAY_TMPDIR", "TMPDIR"), given or _SHORT_FOLDER)  # Ray's helpers have sockets in TMPDIR


def token_without_home() -> dict[str, str]:
    """Return a secret for a Ray that is started, as environment; empty if Ray can keep one in the home folder."""
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return {}
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "auth_token").exists() or os.access(folder, os.W_OK):
            return {}
    except (OSError, RuntimeError):  # there is no home
        pass
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _connect(folders: Mapping[str, str], *, dashboard: bool) -> Any:
    """Join or start Ray, and tell every process of the sweep which Ray it belongs to."""
    # Ray Train frees what a stopped trial held from a process that looks for its Ray by itself, and gives up if several
    # run on one machine: the resources would never be free again. So the address of a Ray that is started here is
    # chosen beforehand; one that was joined is joined again with its address known.
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    chosen = f"{ray.util.get_node_ip_address()}:{port}"
    kept = {name: os.environ[name] for name in folders if name in os.environ}  # trials write to the user's TMPDIR
    with environment({_PORT: str(port), **folders}):
        context = _init(None, chosen, kept, dashboard)
    address = context.address_info["gcs_address"]
    if address != chosen and not _is_own(context):
        ray.shutdown()  # leaves it
        context = _init(address, address, kept, None)
    return context


def _init(address: str | None, known_as: str, kept: Mapping[str, str], dashboard: bool | None) -> Any:
    import torch  # a sweep whose trials have all ended comes to its end without it

    environment = WORKER_ENVIRONMENT | {"RAY_ADDRESS": known_as, **kept}
    return ray.init(
        address=address,
        include_dashboard=dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment if torch.cuda.is_available() else environment | CPU_ENVIRONMENT},
    )


def _is_own(context: Any) -> bool:
    """Return whether this process started the Ray; a session is named after the process that did."""
    return str(context.address_info["session_dir"]).endswith(f"_{os.getpid()}")


def _await_machines(number: int | None, within_s: float) -> list[dict[str, Any]]:
    """Wait until there are enough machines and return those that are alive. Raises :class:`ConfigError`."""
    deadline = time.monotonic() + within_s
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) >= (number or 1):
            return alive
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--machines {number}, but after {within_s:.0f} seconds the Ray cluster has {len(alive)}; "
                "see `ray status` and /tmp/ray/session_latest/logs/monitor.log on the head, or give a smaller number"
            )
        time.sleep(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End a termination like Ctrl-C: children are stopped, and a message says how to resume."""
    raise KeyboardInterrupt
