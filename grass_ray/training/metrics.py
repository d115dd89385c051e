"""Measure the peak memory of training.

On CUDA these are the peaks of the caching allocator. On a CPU, which has no such statistics, ``peak_allocated`` is the
size of the weights, gradients and states at the start of a step plus the peak of the step's own allocations as recorded
by torch's profiler, and ``peak_reserved`` is the peak resident set size of the process since training began.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_ray.training.report import GIB

_MOST_STEPS = 1_000_000  # that torch.quantile takes


class MemoryMeter:
    """Peak memory of a run, in GiB.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self.peak_allocated_gib = 0.0
        self.peak_reserved_gib = 0.0
        self._reserved_gib: list[float] = []  # after each step
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs every start to stderr
            _reset_peak_resident_set()

    @contextmanager
    def watch(self, alive: Iterable[Tensor], *, closely: bool) -> Iterator[None]:
        """Measure the peak inside the block.

        Args:
            alive: tensors on the device at the start of the block. Each storage is counted once.
            closely: whether to profile the allocations of the block, on a CPU. Slow, so only done for some steps.
        """
        if self._cuda:
            yield
            self.raise_to(
                torch.cuda.max_memory_allocated(self._device) / GIB, torch.cuda.max_memory_reserved(self._device) / GIB
            )
        elif closely:
            base = storage_bytes(alive)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profiler:
                yield
            peak = (base + _highest_allocation(profiler)) / GIB
            self.peak_allocated_gib = max(self.peak_allocated_gib, peak)
        else:
            yield
        if not self._cuda:
            self.raise_to(self.peak_allocated_gib, _peak_resident_set_gib())
        self._reserved_gib.append(self._reserved_now_gib())

    def _reserved_now_gib(self) -> float:
        return torch.cuda.memory_reserved(self._device) / GIB if self._cuda else _resident_set_gib()

    def reserved_metrics(self) -> dict[str, float]:
        """The mean and the 99th percentile over steps of the memory reserved after each step, by MLflow key.

        Of this worker alone; nothing before the first step.
        """
        if not self._reserved_gib:
            return {}
        steps = torch.tensor(self._reserved_gib, dtype=torch.float64)
        highest = float(torch.quantile(steps[-_MOST_STEPS:], 0.99))
        return {"memory/mean_reserved_gib": float(steps.mean()), "memory/p99_reserved_gib": highest}

    @property
    def peaks(self) -> tuple[float, float]:
        """Peaks of allocated and reserved memory so far, in GiB."""
        return self.peak_allocated_gib, self.peak_reserved_gib

    def raise_to(self, allocated_gib: float, reserved_gib: float) -> None:
        """Raise the peaks to those of another worker or of the run before it was resumed; they never decrease."""
        self.peak_allocated_gib = max(self.peak_allocated_gib, allocated_gib)
        self.peak_reserved_gib = max(self.peak_reserved_gib, reserved_gib)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far for a checkpoint."""
        return {
            "peak_allocated_gib": self.peak_allocated_gib,
            "peak_reserved_gib": self.peak_reserved_gib,
            "reserved_gib": list(self._reserved_gib),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the peaks of :meth:`state_dict` if they are higher, and the steps before."""
        self.raise_to(state["peak_allocated_gib"], state["peak_reserved_gib"])
        self._reserved_gib = [*state.get("reserved_gib", ()), *self._reserved_gib]


def release_memory() -> None:
    """Give what earlier runs of this process left back to the device and to the system.

    Before the next run asks what memory there is, and measures its own.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size in bytes of the storages of ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _highest_allocation(profiler: torch.profiler.profile) -> int:
    """Return the peak of allocated minus freed bytes on the CPU in the profiled block."""
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    current = highest = 0
    for _, nbytes in changes:
        current += nbytes
        highest = max(highest, current)
    return highest


def _reset_peak_resident_set() -> None:
    """Reset the peak resident set size on Linux; elsewhere it covers the lifetime of the process."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not permitted in some containers; the peak then includes loading the model
            return


def _peak_resident_set_gib() -> float:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _resident_set_gib() -> float:
    """Memory that is resident now; elsewhere than on Linux its peak."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / GIB
    return _peak_resident_set_gib()


def default_device() -> torch.device:
    """Return the CUDA device of this local rank, or the CPU if there is none."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
