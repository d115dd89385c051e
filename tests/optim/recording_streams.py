"""Streams of a test: they run everything at once like a CPU, and note what CUDA streams would be free to reorder."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Operation:
    """One piece of work: where it ran, what it touched, and the operations it is certain to come after."""

    stream: str
    reads: set[Hashable]
    writes: set[Hashable]
    after: set[int]


@dataclass
class RecordingStreams:
    """Runs everything at once like a CPU, and notes what CUDA streams would be free to reorder."""

    without: str | None = None
    operations: list[Operation] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)
    _behind: dict[str, set[int]] = field(default_factory=dict)

    @contextlib.contextmanager
    def on(self, stream: str, *, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()) -> Iterator[None]:
        behind = self._behind.setdefault(stream, set())
        # what the host has waited for is done when anything is issued later
        self.operations.append(Operation(stream, set(reads), set(writes), behind | self._behind.get("host", set())))
        behind.add(len(self.operations) - 1)
        yield

    def record(self, stream: str) -> frozenset[int]:
        return frozenset(self._behind.setdefault(stream, set()))

    def wait(self, stream: str, event: frozenset[int], reason: str) -> None:
        self.reasons.add(reason)
        if reason != self.without:
            self._behind.setdefault(stream, set()).update(event)

    def wait_on_host(self, event: frozenset[int], reason: str) -> None:
        self.wait("host", event, reason)

    def collisions(self) -> list[tuple[Operation, Operation]]:
        """Pairs of operations on the same memory, one of them writing, that nothing puts in order."""
        found = []
        for later, operation in enumerate(self.operations):
            for earlier in range(later):
                other = self.operations[earlier]
                touched = (operation.writes & (other.reads | other.writes)) | (operation.reads & other.writes)
                if touched and earlier not in operation.after:
                    found.append((other, operation))
        return found
