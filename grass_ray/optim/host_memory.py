"""How much host memory can be had: what the machine has available, and what a container's own limit leaves of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
# what must stay free for other processes when host memory is taken
RESERVE_BYTES = 256 * 1024 * 1024


class _Files(NamedTuple):
    """Where a version of Linux's control groups says what; ``cache`` is a line of ``stat``."""

    limit: str
    used: str
    cache: str


_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = _Files("memory.max", "memory.current", "inactive_file")


def available_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Host memory that can be had without swapping or exceeding a container's limit; None where nothing says.

    Args:
        proc: where the kernel describes the machine and this process.
        groups: where control groups are mounted, of either version.
    """
    return min((*_in_machine(proc), *_in_control_groups(proc, groups)), default=None)


def _in_machine(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _in_control_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What each limit on this process's group, or on one around it, leaves."""
    places = [("", ""), ("memory", "")]  # inside a container the mounted root is the container's own group
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            places.append(("memory" if controllers else "", path.strip("/")))
    for mount, path in places:
        own = groups / mount / path
        for folder in (own, *own.parents):
            if folder.is_relative_to(groups):
                yield from _left(folder, _FIRST if mount else _SECOND)


def _left(folder: Path, files: _Files) -> Iterator[int]:
    """What the limit of one group leaves, page cache that can be dropped included; nothing without a limit."""
    limit, used, stat = (_lines(folder / name) for name in (files.limit, files.used, "memory.stat"))
    if limit and used and limit[0] != "max":
        cache = sum(int(line.split()[1]) for line in stat if line.startswith(f"{files.cache} "))
        yield max(int(limit[0]) - int(used[0]) + cache, 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
