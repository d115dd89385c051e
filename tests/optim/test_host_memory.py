"""What can be had of the host's memory: the machine's, and what control groups of either version leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import make_llama

from grass_ray import LayerwiseAdamW, UniformSampler
from grass_ray.memory import fit as memory_fit
from grass_ray.optim import host_store
from grass_ray.optim.host_memory import available_bytes

MACHINE = 1000 * 1024


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def available(place: Path) -> int | None:
    return available_bytes(place / "proc", place / "groups")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A machine with 1,000 KiB to have, and no control groups."""
    write(tmp_path / "proc", meminfo="MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    return tmp_path


def second(folder: Path, limit: str, used: int = 700, cache: int = 200) -> None:
    write(folder, memory__max=f"{limit}\n", memory__current=f"{used}\n")
    write(folder, memory__stat=f"anon 5\ninactive_file {cache}\n")


def first(folder: Path, limit: int, used: int = 700, cache: int = 200) -> None:
    write(folder, memory__limit_in_bytes=f"{limit}\n", memory__usage_in_bytes=f"{used}\n")
    write(folder, memory__stat=f"inactive_file 1\ntotal_inactive_file {cache}\n")


def test_without_control_groups_it_is_the_machines(place: Path) -> None:
    assert available(place) == MACHINE
    assert available(place / "elsewhere") is None


def test_the_second_version_inside_a_container(place: Path) -> None:
    write(place / "proc/self", cgroup="0::/\n")
    second(place / "groups", "1000")
    assert available(place) == 500, "page cache can be dropped"
    second(place / "groups", "max")
    assert available(place) == MACHINE
    second(place / "groups", "600", used=900)
    assert available(place) == 0


def test_the_second_version_on_a_machine_with_nested_groups(place: Path) -> None:
    write(place / "proc/self", cgroup="0::/user.slice/run.scope\n")
    second(place / "groups/user.slice/run.scope", "max")
    second(place / "groups/user.slice", "900")
    assert available(place) == 400, "the limit of a group around it"
    second(place / "groups/user.slice/run.scope", "800")
    assert available(place) == 300


def test_the_first_version(place: Path) -> None:
    write(place / "proc/self", cgroup="9:name=systemd:/x\n4:cpu,memory:/docker/1f\n2:cpuset:/docker/1f\n")
    first(place / "groups/memory", 2**63 - 4096)
    assert available(place) == MACHINE, "no limit is a very large one"
    first(place / "groups/memory/docker/1f", 1000)
    assert available(place) == 500
    first(place / "groups/memory", 900)
    assert available(place) == 400, "a container sees its own group as the root"


def test_both_versions_side_by_side(place: Path) -> None:
    write(place / "proc/self", cgroup="4:memory:/a\n0::/a\n")
    first(place / "groups/memory/a", 1000)
    (place / "groups/unified/a").mkdir(parents=True)
    assert available(place) == 500


def test_a_limit_below_the_machines_memory_stops_the_host_store_and_the_check_before_a_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container of 100 MiB on a machine with gigabytes."""
    write(place / "proc", meminfo=f"MemAvailable: {16 * 2**20} kB\n")
    second(place / "groups", str(300 * 2**20), used=200 * 2**20, cache=0)
    for module in (host_store, memory_fit):
        monkeypatch.setattr(module, "available_bytes", lambda: available(place))
    with pytest.raises(MemoryError, match=r"need \d+ MiB of host memory, but only 100 MiB are available"):
        LayerwiseAdamW(make_llama(), UniformSampler(2, 3), offload="lazy")
    model = make_llama()
    assert memory_fit.total_bytes(next(model.parameters()).device) == 100 * 2**20
