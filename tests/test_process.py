"""A process at its edges: encodings, readers that leave, full disks, interruptions. Children are real processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grass_ray.process import Interrupts, describe_failure

pytestmark = pytest.mark.long

SAY = """
from grass_ray.process import leave, prepare_output
prepare_output()
def act():
    print("61.0 \\u00b11.4 \\u2013 \\u2500\\u253c caf\\u00e9 \\U0001f680 \\udcff", flush=True)
    for line in range(LINES): print("x" * 79)
    return 0
leave(act)
"""


def say(lines: int = 0, before: str = "", **options: object) -> subprocess.CompletedProcess[bytes]:
    code = before + SAY.replace("LINES", str(lines))
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "61.0 +-1.4 - -+ caf\\u00e9 \\ud83d\\ude80 \\udcff"),
        ("latin-1", "61.0 ±1.4 - -+ café \\ud83d\\ude80 \\udcff"),
        ("cp1252", "61.0 ±1.4 \u2013 -+ café \\ud83d\\ude80 \\udcff"),
        ("utf-8", "61.0 ±1.4 \u2013 ─┼ café \U0001f680 \\udcff"),
    ],
)
def test_every_encoding_shows_what_it_can(encoding: str, expected: str) -> None:
    done = say(env=os.environ | {"PYTHONIOENCODING": encoding}, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding) == expected + "\n"


def test_a_reader_that_leaves_does_not_stop_the_work() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = say(lines=5000, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_is_lost_on_a_full_disk_is_said_at_the_end() -> None:
    with open("/dev/full", "wb") as full:
        done = say(stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"error: not everything could be printed: No space left on device\n"


def test_files_never_take_the_place_of_closed_streams(tmp_path: Path) -> None:
    """Else what is printed would go into the first file that is opened, such as a database."""
    first = f"import os, sys; [os.close(fd) for fd in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None\n{SAY}"
    opened = first.replace("prepare_output()\n", f"prepare_output()\nfile = open({str(tmp_path / 'a')!r}, 'wb')\n")
    code = opened.replace("LINES", "1").replace("return 0", "return file.fileno()")
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode >= 3
    assert (tmp_path / "a").read_bytes() == b""


def test_what_the_system_refuses_is_one_sentence_and_a_mistake_of_the_program_none() -> None:
    assert describe_failure(OSError(errno.ENOSPC, "No space left on device", "a/b")) == "No space left on device: a/b"
    assert describe_failure(OSError("no folder for temporary files")) == "no folder for temporary files"
    torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 142208 vs 142096")
    assert describe_failure(torch) == "a file could not be written whole"
    wrapped = ValueError("cannot save")
    wrapped.__cause__ = OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert describe_failure(wrapped) == os.strerror(errno.EROFS)
    assert describe_failure(KeyError("model")) is None


@pytest.fixture(autouse=True)
def _as_from_a_terminal() -> Iterator[None]:
    """Under nohup and in the background a process starts with these signals ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def test_what_is_being_finished_is_finished_first(capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.finishing("this step"):  # noqa: PT012
            interrupt()
            done.append("step")
        with pytest.raises(KeyboardInterrupt), interrupts.finishing("the record"):  # noqa: PT012
            interrupt()
            done.append("record")
    assert done == ["step"], "the second one ends it at once"
    assert "stopping after this step; Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_key_hit_again_and_again_does_not_end_the_cleaning_up() -> None:
    cleaned = False
    with Interrupts() as interrupts:
        try:
            interrupt()
        except KeyboardInterrupt:
            interrupt(5)
            interrupts.ignore()
            interrupt(5)
            cleaned = True
    assert cleaned


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_is_heard_like_a_key(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(number)


def test_an_interruption_that_a_library_turns_into_an_error_is_still_one() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():  # noqa: PT012
        try:
            interrupt()
        except KeyboardInterrupt:
            raise ImportError("numpy failed") from None


def test_an_interrupted_command_says_so_without_a_traceback() -> None:
    code = (
        "import sys, time\nfrom grass_ray.process import leave\n"
        "def act():\n print('begun', flush=True)\n time.sleep(60)\n return 0\nleave(act)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "stopped\n")
    assert process.returncode == 130
