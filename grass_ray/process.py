"""The edges of a process: output that any terminal can show, interrupts, and the exit code.

::

    prepare_output()
    leave(lambda: verb.run())                 # exits 0, 1, 2, or 130 when it was interrupted; never with a traceback
                                              # for a mistake in the input, a full disk or Ctrl-C

    with Interrupts() as interrupts:
        with interrupts.finishing("this step"):   # the first Ctrl-C waits for the end of the block
            ...
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from grass_ray.config import ConfigError
from grass_ray.errors import redact

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
CLEANING_S = 5.0  # a key that is hit again and again must not interrupt the cleaning up

# ------------------------------------------------------------------------------------------------------- the terminal

# characters that some terminals cannot show
_PLAIN = {
    "±": "+-", "\u00d7": "x", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "…": "...", "•": "*", "\u2013": "-",
    "\u2014": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "─": "-", "━": "-",
    "═": "=", "│": "|", "┃": "|", "║": "|", "█": "#",
}  # fmt: skip


def _readable(error: UnicodeError) -> tuple[str, int]:
    r"""Replace characters that an encoding lacks: by similar ones of ASCII, else as JSON writes them (``\u00e9``)."""
    assert isinstance(error, UnicodeEncodeError)
    parts = []
    for character in error.object[error.start : error.end]:
        drawn = "+" if "\u2500" <= character <= "\u257f" else json.dumps(character)[1:-1]
        parts.append(_PLAIN.get(character, drawn))
    return "".join(parts), error.end


codecs.register_error("grass_ray.readable", _readable)


class _Output(io.FileIO):
    """A terminal, pipe or file to print to. What it refuses is dropped, so that the work goes on."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return len(data)


def prepare_output() -> None:
    """Make printing safe with any encoding, a reader that leaves, a full disk, and closed standard streams."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file to be opened, a database perhaps, would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None:
            if stream is not getattr(sys, f"__{name}__") or type(_raw(stream)) is not io.FileIO:
                continue  # redirected, by a test perhaps, or prepared already
            stream.flush()
        buffer = io.BufferedWriter(_Output(number, "w", closefd=False))
        encoding = "utf-8" if stream is None else stream.encoding
        prepared = io.TextIOWrapper(buffer, encoding, "grass_ray.readable", line_buffering=True)
        setattr(sys, name, prepared)
        setattr(sys, f"__{name}__", prepared)


def _raw(stream: Any) -> Any:
    """Return the file behind a stream, buffered or not."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _lost_output() -> str | None:
    """Return why not everything could be printed; None if it could, or if its reader has left."""
    sys.stdout.flush()
    failure = getattr(_raw(sys.stdout), "failure", None)
    if failure is None or failure.errno in (errno.EPIPE, errno.EIO):
        return None
    return f"not everything could be printed: {describe_failure(failure)}"


# ------------------------------------------------------------------------------------------------------------ the end

# the system's messages, as libraries repeat them in their own errors
_REFUSALS = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "File too large",
    "Input/output error",
    "database or disk is full",
)
_REFUSED_TO_TORCH = ("inline_container.cc", "iostream error")  # torch keeps the reason to itself


def describe_failure(error: BaseException) -> str | None:
    """Return one sentence if the system refused something (a full disk, a read-only folder); None for other errors."""
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return error.strerror + place if error.strerror else str(error) or type(error).__name__
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        if found := [words for words in _REFUSALS if words in text]:
            return found[0]
        if any(words in text for words in _REFUSED_TO_TORCH):
            return "a file could not be written whole"
        link = link.__cause__ or link.__context__
    return None


def leave(act: Callable[[], int], stopped: Callable[[], str] = lambda: "stopped") -> NoReturn:
    """Call ``act`` and exit with its code; bad input, a refusal of the system and Ctrl-C print one message each.

    Args:
        act: returns the exit code.
        stopped: returns the message about an interruption.
    """
    try:
        with Interrupts():
            _check_current_folder()
            code = act()
    except ConfigError as mistake:
        print(f"error: {redact(str(mistake))}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        print(stopped(), file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        reason = describe_failure(error)
        if reason is None:
            raise
        print(f"error: {redact(reason)}", file=sys.stderr)
        code = FAILED
    if lost := _lost_output():
        print(f"error: {lost}", file=sys.stderr)
        code = code or FAILED
    if isinstance(_raw(sys.stdout), _Output):  # this process is a command, and all that is left is Python's own end
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current folder cannot be used ({error.strerror}); change to another") from None


# ---------------------------------------------------------------------------------------------------------- the middle


class Interrupts:
    """Raises ``KeyboardInterrupt`` in a block at Ctrl-C, at SIGTERM, and when the terminal is closed.

    It is raised at once, except inside :meth:`finishing`. Call :meth:`ignore` before cleaning up.

    Attributes:
        heard: number of interrupts so far.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._finishing: str | None = None
        self._ignoring = False
        self._cleaning_until = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._hear)  # nohup keeps its meaning
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and self.heard and not self._ignoring:
            raise KeyboardInterrupt from error  # some libraries turn an interrupt into an error of their own

    @contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Defer the first Ctrl-C to the end of the block, and announce it; a second one ends the block at once."""
        before = self.heard
        self.defer(what)
        try:
            yield
        finally:
            self._finishing = None
        if self.heard > before:
            raise KeyboardInterrupt

    def defer(self, what: str) -> None:
        """Only announce the first Ctrl-C, saying that the process stops after ``what``, until :meth:`deliver`."""
        self._finishing = what

    def deliver(self) -> None:
        """Raise ``KeyboardInterrupt`` if one was deferred, and defer none from now on."""
        self._finishing = None
        self.check()

    def ignore(self) -> None:
        """Ignore all further interrupts."""
        self._ignoring = True

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` again if it was raised where it got lost, as in a destructor."""
        if self.heard:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard += 1
        if self._ignoring or time.monotonic() < self._cleaning_until:
            return
        if self._finishing is None or self.heard > 1:
            self._cleaning_until = time.monotonic() + CLEANING_S
            raise KeyboardInterrupt
        with suppress(RuntimeError):  # it came in the middle of another print
            print(f"\nstopping after {self._finishing}; Ctrl-C again stops at once", file=sys.stderr)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside a block, and what they were before afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
