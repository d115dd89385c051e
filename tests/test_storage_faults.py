"""A full file system, a read-only one, folders without permission, several writers of a file, a bad object store.

A child process gets a file system of its own in memory, mounted where nobody else sees it; skipped where the system
lets nobody do that.
"""

from __future__ import annotations

import ctypes
import http.server
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from test_killed_writes import WRITERS, Writer, check_whole, in_a_child, names

from grass_ray.cluster.storage import Storage
from grass_ray.config import ConfigError, write_whole
from grass_ray.process import describe_failure

_FINISHED, _REFUSED = 0, 3
STEPS = 6 if hypothesis.settings.default.max_examples < 100 else 24  # sizes of a file system
NOBODY = 65534
_NEWNS, _NEWUSER = 0x20000, 0x10000000
_RDONLY, _REMOUNT, _PRIVATE = 1, 32, (1 << 18) | 16384
_LIBC = ctypes.CDLL(None, use_errno=True)


def _mount(kind: bytes | None, place: Path, flags: int = 0, data: str = "") -> None:
    if _LIBC.mount(b"none", bytes(place), kind, flags, data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(place))


def _own_mounts(place: Path) -> None:
    """Let this process mount what others do not see, and put a file system in memory at ``place``."""
    uid, gid = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEWNS | (_NEWUSER if uid else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    _mount(None, Path("/"), _PRIVATE)
    _mount(b"tmpfs", place, data="size=256m")


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("mounts")
    if in_a_child(lambda: _own_mounts(place), place) != _FINISHED:
        pytest.skip("this system lets no process mount a file system of its own")


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Writer]:
    return request.param, WRITERS[request.param](tmp_path)


def refused(act: Callable[[], None]) -> bool:
    """Whether the system refuses what ``act`` does; every other error is a defect."""
    try:
        act()
    except ConfigError:
        return True
    except Exception as error:
        if describe_failure(error) is None:
            raise
        return True
    return False


def test_a_full_file_system(writer: tuple[str, Writer], tmp_path: Path, mounts: None) -> None:
    """Of every size from what is written already to what the next version needs."""
    name, own = writer

    def act() -> None:
        _own_mounts(tmp_path)
        often, room, whole = 0, 0, 1
        while True:
            own.write(1)
            before, system = own.read(), os.statvfs(tmp_path)
            used = (system.f_blocks - system.f_bfree) * system.f_bsize
            _mount(None, tmp_path, _REMOUNT, f"size={max(used + room * 4096, 4096)}")
            full = refused(lambda: own.write(2))
            there = own.read()
            assert there in (before, 2), f"{name} with {room} pages left"
            _mount(None, tmp_path, _REMOUNT, "size=256m")
            check_whole(own, before, f"{name} with {room} pages left")
            often += full
            if whole == 1:  # how much room it takes: the first measure of what is there
                system = os.statvfs(tmp_path)
                whole = max((system.f_blocks - system.f_bfree) // STEPS, 1)
            if room > STEPS * whole:
                break
            room += whole
        assert often or name == "caches", "it was never full"  # a cache that cannot be written is left out

    assert in_a_child(act, tmp_path) == _FINISHED


def test_a_read_only_file_system(writer: tuple[str, Writer], tmp_path: Path, mounts: None) -> None:
    name, own = writer

    def act() -> None:
        _own_mounts(tmp_path)
        own.write(1)
        before = own.read()
        _mount(None, tmp_path, _REMOUNT | _RDONLY, "size=256m")
        assert refused(lambda: own.write(2)) or name == "caches"
        assert own.read() in (before, 2)
        _mount(None, tmp_path, _REMOUNT, "size=256m")
        check_whole(own, before, name)

    assert in_a_child(act, tmp_path) == _FINISHED


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user reaches, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        yield folder
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["no writing", "nothing"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_without_permission(name: str, mode: int) -> None:
    with open_folder() as folder:
        own = WRITERS[name](folder)
        own.write(1)
        before = own.read()
        folder.chmod(mode)

        def act() -> None:
            if os.getuid() == 0:  # nothing is forbidden to root
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            assert refused(lambda: own.write(2)) or name == "caches"
            # safetensors' files are their owner's alone
            assert refused(own.read) or own.read() in (before, 2, None)

        assert in_a_child(act, folder) == _FINISHED
        folder.chmod(0o755)
        check_whole(own, before, name)


# ------------------------------------------------------------------------------------------------- writers of one file


def test_several_writers_of_one_file(tmp_path: Path) -> None:
    """Each text is there whole, no writer fails, and nothing is left beside it."""
    path, texts = tmp_path / "record.json", [letter * 100_000 for letter in "abcd"]
    read: list[str] = []
    errors: list[OSError] = []

    def write(text: str) -> None:
        try:
            for _ in range(25):
                write_whole(path, text)
                read.append(path.read_text())
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    children = [os.fork() for _ in range(1)]
    if children == [0]:
        write(texts[0])
        os._exit(len(errors))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0]
    assert errors == []
    assert set(read) <= set(texts)
    assert names(tmp_path) == ["record.json"]


# --------------------------------------------------------------------------------------------------------- object store


class Store(http.server.BaseHTTPRequestHandler):
    """Answers every request with a code."""

    code = 500

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize("code", [403, 500, None])
def test_an_object_store_that_fails_is_one_sentence(code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it refuses; None for nobody listening. pyarrow tries again a few times itself."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "planted-key-of-the-store")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Store,), {"code": code}))
    if code is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    options = f"endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=any"
    storage = Storage.at(f"s3://bucket/results?{options}")
    acts: list[Callable[[], Any]] = [lambda: storage.exists("sweep.yaml")]
    if code == 403:  # the only answer after which pyarrow does not try again for seconds
        acts += [lambda: storage.read_text("sweep.yaml"), lambda: storage.write_text("text", "sweep.yaml")]
    for act in acts:
        with pytest.raises(OSError, match=r"AWS Error|Couldn't connect") as found:
            act()
        said = describe_failure(found.value)
        assert said
        assert "planted" not in said
    if code is not None:
        server.shutdown()
