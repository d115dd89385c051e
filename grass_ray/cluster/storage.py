"""A sweep's files under one URI: a local folder, or anything pyarrow reaches (``s3://``, ``gs://``, ``hdfs://``).

Workers and the driver may run on different machines; both see a trial only through its folder here::

    storage = Storage.at("s3://bucket/grass_ray_results")
    storage.upload(local_folder, "quickstart", sweep_id, trial_folder)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import fs

from grass_ray.config import ConfigError, write_whole
from grass_ray.errors import redact


@dataclass(frozen=True)
class Storage:
    """The files under ``uri``, which is absolute since workers run in directories of their own."""

    uri: str

    @classmethod
    def at(cls, place: str) -> Storage:
        """Return the storage at a URI or folder. Raises :class:`ConfigError` if pyarrow cannot reach it."""
        storage = cls((place if "://" in place else os.path.abspath(os.path.expanduser(place))).rstrip("/"))
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
        return Storage("/".join([place, *parts]) + mark + options)

    def exists(self, *parts: str) -> bool:
        """Return whether a file or folder exists."""
        filesystem, path = self._open(*parts)
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def folders(self) -> list[str]:
        """Return the names of the folders directly here, sorted; none if this folder does not exist."""
        filesystem, path = self._open()
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def read_text(self, *parts: str) -> str:
        """Read a file as UTF-8."""
        filesystem, path = self._open(*parts)
        with filesystem.open_input_file(path) as file:
            return bytes(file.read()).decode("utf-8")

    def write_text(self, text: str, *parts: str) -> None:
        """Write a file and create its folder; the file changes at once or, if the process dies, not at all."""
        filesystem, path = self._open(*parts)
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        if isinstance(filesystem, fs.LocalFileSystem):
            write_whole(path, text)
            return
        # an object store shows an object once it is whole
        with filesystem.open_output_stream(path) as stream:
            stream.write(text.encode("utf-8"))

    def upload(self, folder: Path, *parts: str) -> None:
        """Copy the files of a local folder here."""
        filesystem, path = self._open(*parts)
        filesystem.create_dir(path, recursive=True)
        fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)

    def download(self, folder: Path, *parts: str) -> None:
        """Copy the files here into a local folder; none if there is nothing here."""
        if self.exists(*parts):
            filesystem, path = self._open(*parts)
            fs.copy_files(path, str(folder), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())

    def remove(self, *parts: str) -> None:
        """Delete a file or folder if it exists."""
        filesystem, path = self._open(*parts)
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == fs.FileType.File:
            filesystem.delete_file(path)

    def _open(self, *parts: str) -> tuple[fs.FileSystem, str]:
        filesystem, path = fs.FileSystem.from_uri(self.uri)
        return filesystem, "/".join([str(path), *parts])
