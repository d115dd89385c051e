"""Text files that are never half written, and JSON that strict readers accept.

Files whose names end with ``.gz`` are written and read with gzip.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pydantic_core
import yaml

from grass_ray.errors import ConfigError


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file for writing and move it to ``path`` when the block succeeds.

    If the disk is full or the process is killed, the previous file stays as it was.
    """
    part = Path(f"{path}.part")
    try:
        with part.open("wb") as raw:
            # without a name and the time, so that equal texts are equal files
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_compressed(path) else raw
            with io.TextIOWrapper(packed, encoding="utf-8") as file:
                yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_text(path: str | Path) -> str:
    """What :func:`whole_file` wrote."""
    content = Path(path).read_bytes()
    return (gzip.decompress(content) if is_compressed(path) else content).decode()


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


def read_yaml(path: str | Path, what: str) -> Any:
    """Read a file that a user wrote.

    Args:
        path: of the file, in UTF-8.
        what: the words for it in messages, such as "the method file".

    Raises:
        ConfigError: it cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {what} {path}: it is no text in UTF-8 ({error.reason})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
