"""Files and folders that are never half written, and JSON that strict readers accept.

Files whose names end with ``.gz`` are written and read with gzip.
"""

from __future__ import annotations

import fcntl
import glob
import gzip
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pydantic_core

from grass_ray.reading import MOST_BYTES, unpack


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file for writing and move it to ``path`` when the block succeeds.

    If the disk is full or the process is killed, the previous file stays as it was. Of several writers at once, each
    has a file of its own and the last to succeed stays; what killed ones left is deleted.
    """
    place = Path(path)
    prefix = f"{place.name}.part-"
    for stale in place.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError), _handle(stale) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink()
    part, lock = _new_part(place, prefix)
    try:
        with part.open("wb") as raw:
            # without a name and the time, so that equal texts are equal files
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_compressed(path) else raw
            with io.TextIOWrapper(packed, encoding="utf-8") as file:
                yield file
        os.fsync(lock)  # else the name may be on the disk before the text
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
        os.close(lock)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text by :func:`whole_file`. A link in its place is replaced, not followed."""
    with whole_file(path) as file:
        file.write(text)


def _new_part(place: Path, prefix: str) -> tuple[Path, int]:
    """A new file beside ``place``, and a handle that keeps it locked until it is closed."""
    while True:
        part = place.with_name(f"{prefix}{secrets.token_hex(4)}")
        lock = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return part, lock
        os.close(lock)  # another writer took it for one that was left


@contextmanager
def part_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``, to be filled and then renamed; what is left of it is deleted at the end.

    What killed processes left of theirs is deleted, too. Those that are being written are locked.
    """
    prefix = f"{folder.name}.part-"
    for stale in folder.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError), _handle(stale) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as name, _handle(Path(name)) as handle:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part = Path(name) / "whole"
        part.mkdir()
        yield part


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    with _handle(path) as handle:
        os.fsync(handle)


@contextmanager
def _handle(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def read_text(path: str | Path) -> str:
    """What :func:`whole_file` wrote. Raises OSError, and ValueError if it is not whole, no text, or without end."""
    check_ordinary(Path(path))
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 1024**2} MiB")
    return (unpack(content) if is_compressed(path) else content).decode()


def check_ordinary(path: Path) -> None:
    """Raise ValueError if a path leads, by a link perhaps, to a device or a pipe, which may have no end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path.name} is no ordinary file")


def is_compressed(path: str | Path) -> bool:
    """Whether a file is written and read with gzip, which its name says."""
    return Path(path).suffix == ".gz"


def to_json(value: object, *, indent: int | None = None, keep: bool = False) -> str:
    """JSON that strict readers take, which know no bare NaN: a number that is none is null.

    With ``keep`` it is the text ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, which :func:`from_json` reads back.
    """
    return pydantic_core.to_json(value, indent=indent, inf_nan_mode="strings" if keep else "null").decode()


def from_json(text: str) -> Any:
    """What :func:`to_json` wrote with ``keep``; a bare NaN is read, too."""
    return _with_numbers(json.loads(text))


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
