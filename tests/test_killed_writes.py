"""Writers that are killed at every moment, or run out of room: the last good state loads, and nothing piles up.

A child process is killed by SIGKILL before each of its calls that change a folder, and by SIGXFSZ within a file,
at a byte that a limit of the system says; so is what C++ and Rust write. With that signal ignored, the same limit is a
disk that is full. `make reliability` takes more sizes.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from result_records import make_record
from small import make_llama, short_run

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, ModelConfig
from grass_ray.experiment.plan import SweepPlan
from grass_ray.export.delta import apply_delta, save_delta
from grass_ray.process import describe_failure
from grass_ray.results.record import RunRecord
from grass_ray.tasks.inference.token_cache import TokenCache
from grass_ray.training.checkpoint import restore_previous
from grass_ray.training.checks import tokenizer_to_check
from grass_ray.training.run import Run

SIZES = 4 if hypothesis.settings.default.max_examples < 100 else 40  # of files at which a writer is stopped
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "fcntl.flock"}
_FINISHED, _REFUSED, _DEFECT = 0, 3, 4


class Writer(NamedTuple):
    """``write`` writes version 1 or 2 of something, and ``read`` says which one is there; None for none."""

    write: Callable[[int], None]
    read: Callable[[], int | None]
    leftover: Callable[[], list[str]]


class _Killed:
    """Counts what changes files below a folder, and kills the process before the n-th."""

    def __init__(self) -> None:
        self.folder, self.left = "", 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder and event in _EVENTS:
            if event == "open" and not _writes(arguments):
                return
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


_KILLED = _Killed()
sys.addaudithook(_KILLED)


def in_a_child(act: Callable[[], None], folder: Path, *, calls: int | None = None, size: int | None = None) -> int:
    """Run ``act`` in a copy of this process, which dies after so many calls or so many bytes in a file.

    Returns:
        How it ended: 0, 3 if it raised an OSError or one that comes of it, or minus the signal that killed it.
    """
    child = os.fork()
    if child == 0:
        code = _DEFECT
        try:
            if size is not None:
                if size < 0:  # the disk is full
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                else:
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (abs(size), abs(size)))
            if calls is not None:
                _KILLED.folder, _KILLED.left = str(folder), calls
            act()
            code = _FINISHED
        except BaseException as error:  # noqa: BLE001 - a forked process must not run the rest of the tests
            code = _REFUSED if isinstance(error, ConfigError) or describe_failure(error) else _DEFECT
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoints(folder: Path) -> Writer:
    runs = {}
    for version in (1, 2):
        runs[version] = Run.prepare(short_run("grass", steps=4), torch.device("cpu"))
        for _ in runs[version].fit(version):
            pass
    place = folder / "checkpoint"
    reader = Run.prepare(short_run("grass", steps=4), torch.device("cpu"))

    def read() -> int | None:
        restore_previous(place)
        if not place.exists():
            return None
        reader.restore(place)
        return reader.state.trained

    return Writer(
        lambda version: runs[version].save(place), read, lambda: [n for n in names(folder) if n != "checkpoint"]
    )


def records(folder: Path) -> Writer:
    path = folder / "record.json.gz"
    found = {version: make_record("full", seed=version) for version in (1, 2)}

    def read() -> int | None:
        return RunRecord.load(path).config["seed"] if path.exists() else None

    return Writer(lambda version: found[version].save(path), read, lambda: [n for n in names(folder) if n != path.name])


def plans(folder: Path) -> Writer:
    storage = Storage.at(str(folder))

    def write(version: int) -> None:
        plan = SweepPlan(
            name="mini", sweep_id=str(version), question="?", tracking_uri="sqlite:///a", trials=(short_run("full"),)
        )
        storage.write_text(plan.to_yaml(), "sweep.yaml")

    def read() -> int | None:
        there = storage.exists("sweep.yaml")
        return int(SweepPlan.from_yaml(storage.read_text("sweep.yaml"), "it").sweep_id) if there else None

    return Writer(write, read, lambda: [n for n in names(folder) if n != "sweep.yaml"])


def deltas(folder: Path) -> Writer:
    """Version 1 is none: nothing is written over a delta."""
    base, trained, place = make_llama(), make_llama(), folder / "delta"
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 1

    def write(version: int) -> None:
        shutil.rmtree(place, ignore_errors=True)
        if version == 2:
            save_delta(base, trained, place, base_model=ModelConfig(name="some/llama"))

    def read() -> int | None:
        if not place.exists():
            return None
        apply_delta(make_llama(), place)
        return 2

    return Writer(write, read, lambda: [n for n in names(folder) if n != "delta"])


def caches(folder: Path) -> Writer:
    """Version 1 is none: a text and its tokens never change."""
    tokenizer = tokenizer_to_check(ModelConfig(name="tiny"))
    texts = [f"What is {number} + 3?" for number in range(20)]
    expected = TokenCache(tokenizer, None).encode(texts)

    def write(version: int) -> None:
        for path in folder.glob("*.npz"):
            path.unlink()
        if version == 2:
            TokenCache(tokenizer, folder).encode(texts)

    def read() -> int | None:
        assert TokenCache(tokenizer, folder).encode(texts) == expected
        return 2

    def leftover() -> list[str]:
        old = list(folder.glob("*.part"))
        for path in old:  # the next writer deletes those of an hour ago
            os.utime(path, (0, 0))
        write(2)
        return [name for name in names(folder) if not name.endswith(".npz")]

    return Writer(write, read, leftover)


WRITERS = {make.__name__: make for make in (checkpoints, records, plans, deltas, caches)}


def largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Writer]:
    return request.param, WRITERS[request.param](tmp_path)


def check_whole(writer: Writer, before: int | None, where: str) -> None:
    """What is there is one of the two versions, whole, and the next writer cleans up."""
    there = writer.read()
    assert there in (before, 2), where
    writer.write(2)
    assert writer.read() == 2, where
    assert writer.leftover() == [], where


def test_a_writer_killed_at_every_call(writer: tuple[str, Writer], tmp_path: Path) -> None:
    name, own = writer
    for calls in range(200):
        own.write(1)
        before = own.read()
        ended = in_a_child(lambda: own.write(2), tmp_path, calls=calls)
        assert ended in (-signal.SIGKILL, _FINISHED), calls
        check_whole(own, before, f"{name}, killed before call {calls}")
        if ended == _FINISHED:
            break
    else:
        raise AssertionError("it was killed again and again")
    assert calls >= 2
    print(f"{name}: killed at {calls} calls")


@pytest.mark.parametrize("full", [False, True], ids=["killed", "full"])
def test_a_writer_stopped_in_the_middle_of_a_file(writer: tuple[str, Writer], tmp_path: Path, full: bool) -> None:
    name, own = writer
    own.write(2)
    most = largest_file(tmp_path)
    for number in range(SIZES):
        own.write(1)
        before = own.read()
        size = 1 + number * (most - 2) // SIZES
        ended = in_a_child(lambda: own.write(2), tmp_path, size=-size if full else size)
        stopped = (_REFUSED, _FINISHED) if full else (-signal.SIGXFSZ,)  # a cache that cannot be written is left out
        assert ended in stopped, (size, ended)
        assert own.read() in (before, 2)
        if full and name != "caches":
            assert ended == _REFUSED
        check_whole(own, before, f"{name}, stopped at {size} of {most} bytes")
