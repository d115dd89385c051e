"""A sweep's files under one URI: a local folder, or anything pyarrow reaches (``s3://``, ``gs://``, ``hdfs://``).

Workers and the driver may run on different machines; both see a trial only through its folder here::

    storage = Storage.at("s3://bucket/grass_ray_results")
    storage.upload(local_folder, "quickstart", sweep_id, trial_folder)

An object store that does not answer is asked again for minutes, as MLflow's server is, but for the first time: a wrong
address is one message at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import fs

from grass_ray.config import ConfigError, write_whole
from grass_ray.errors import redact

PATIENCE_S = 300.0
LONGEST_PAUSE_S = 30.0
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Storage:
    """The files under a URI.

    Attributes:
        uri: absolute, since workers run in directories of their own.
        patience_s: for how long anything that fails in a storage elsewhere is tried again.
    """

    uri: str
    patience_s: float = PATIENCE_S

    @classmethod
    def at(cls, place: str) -> Storage:
        """Return the storage at a URI or folder, without patience.

        Raises:
            ConfigError: pyarrow cannot reach it.
        """
        uri = (place if "://" in place else os.path.abspath(os.path.expanduser(place))).rstrip("/")
        storage = cls(uri, patience_s=0)
        try:
            storage._open()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise ConfigError(
                f"cannot use the storage path {place!r}: {error}; give a folder or an s3:// URI"
            ) from None
        return storage

    @property
    def shown(self) -> str:
        """The URI without keys and tokens, for people and records."""
        return redact(self.uri)

    @property
    def local_folder(self) -> Path | None:
        """The folder; None if the storage is not on this machine."""
        filesystem, path = self._open()
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def join(self, *parts: str) -> Storage:
        """Return the storage below this one; what follows a ``?`` (an endpoint, a region) stays at the end."""
        place, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return Storage("/".join([place, *parts]) + mark + options, self.patience_s)

    def exists(self, *parts: str) -> bool:
        """Return whether a file or folder exists."""
        return self._try(lambda system, path: bool(system.get_file_info(path).type != fs.FileType.NotFound), *parts)

    def folders(self) -> list[str]:
        """Return the names of the folders directly here, sorted; none if this folder does not exist."""
        found = self._try(lambda system, path: system.get_file_info(fs.FileSelector(path, allow_not_found=True)))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def read_text(self, *parts: str) -> str:
        """Read a file as UTF-8."""

        def read(filesystem: fs.FileSystem, path: str) -> str:
            with filesystem.open_input_file(path) as file:
                return bytes(file.read()).decode("utf-8")

        return self._try(read, *parts)

    def write_text(self, text: str, *parts: str) -> None:
        """Write a file and create its folder; the file changes at once or, if the process dies, not at all."""

        def write(filesystem: fs.FileSystem, path: str) -> None:
            filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
            if isinstance(filesystem, fs.LocalFileSystem):
                write_whole(path, text)
                return
            # an object store shows an object once it is whole
            with filesystem.open_output_stream(path) as stream:
                stream.write(text.encode("utf-8"))

        self._try(write, *parts)

    def upload(self, folder: Path, *parts: str) -> None:
        """Copy the files of a local folder here."""

        def copy(filesystem: fs.FileSystem, path: str) -> None:
            filesystem.create_dir(path, recursive=True)
            fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)

        self._try(copy, *parts)

    def download(self, folder: Path, *parts: str) -> None:
        """Copy the files here into a local folder; none if there is nothing here."""

        def copy(filesystem: fs.FileSystem, path: str) -> None:
            fs.copy_files(path, str(folder), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())

        if self.exists(*parts):
            self._try(copy, *parts)

    def remove(self, *parts: str) -> None:
        """Delete a file or folder if it exists."""

        def delete(filesystem: fs.FileSystem, path: str) -> None:
            kind = filesystem.get_file_info(path).type
            if kind == fs.FileType.Directory:
                filesystem.delete_dir(path)
            elif kind == fs.FileType.File:
                filesystem.delete_file(path)

        self._try(delete, *parts)

    def _try(self, act: Callable[[fs.FileSystem, str], Answer], *parts: str) -> Answer:
        """Do it, and again while a storage elsewhere fails and there is patience; what is done twice is done once."""
        began, pause_s = time.monotonic(), 1.0
        while True:
            try:
                return act(*self._open(*parts))
            except FileNotFoundError:
                raise
            except OSError as error:
                if time.monotonic() + pause_s > began + self.patience_s or not self._is_elsewhere:
                    raise
                if pause_s == 1:
                    log.warning("%s does not answer and is asked again: %s", self.shown, redact(str(error)))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    @property
    def _is_elsewhere(self) -> bool:
        return "://" in self.uri and not self.uri.startswith("file:")

    def _open(self, *parts: str) -> tuple[fs.FileSystem, str]:
        filesystem, path = fs.FileSystem.from_uri(self.uri)
        return filesystem, "/".join([str(path), *parts])
