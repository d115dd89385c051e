"""Pin host memory in the background, before it is needed: 0.4 s a GiB that no switch of layers then waits for."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from torch import Tensor

from grass_ray.optim.host_memory import RESERVE_BYTES, available_bytes

Allocate = Callable[[int], Tensor]


class BlocksAhead:
    """Blocks of host memory that a thread allocates one after another.

    It takes no more than half of the memory that is available when it starts, so that what is never needed
    displaces nothing; then blocks are allocated when they are asked for, as without it. The thread ends with its
    work, with this object, or with the first block that cannot be had.

    Args:
        sizes: bytes of the blocks, in the order in which they may be asked for.
        allocate: makes one; raises RuntimeError if it cannot.
    """

    def __init__(self, sizes: Iterable[int], allocate: Allocate) -> None:
        wanted = list(sizes)
        available = available_bytes()
        self._work = work = _Work()
        if available is None or sum(wanted) + RESERVE_BYTES <= available / 2:
            self._thread = threading.Thread(target=work.run, args=(wanted, allocate), daemon=True, name="pinning")
            self._thread.start()
            weakref.finalize(self, work.stopped.set)

    @property
    def bytes(self) -> int:
        """Bytes of the blocks that were not asked for yet."""
        with self._work.lock:
            return sum(block.nbytes for blocks in self._work.ready.values() for block in blocks)

    def take(self, nbytes: int) -> Tensor | None:
        """A block of this size; None if there is none, and then one less is allocated."""
        with self._work.lock:
            blocks = self._work.ready[nbytes]
            if blocks:
                return blocks.pop()
            self._work.late[nbytes] += 1
            return None


class _Work:
    """What the thread and its owner share; the thread must not keep the owner alive."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.ready: dict[int, list[Tensor]] = defaultdict(list)
        self.late: Counter[int] = Counter()

    def run(self, sizes: Iterable[int], allocate: Allocate) -> None:
        for nbytes in sizes:
            if self.stopped.is_set():
                return
            with self.lock:
                if self.late[nbytes]:
                    self.late[nbytes] -= 1  # its owner could not wait
                    continue
            try:
                block = allocate(nbytes)
            except RuntimeError:
                return  # the owner will be told when it asks for a block itself
            with self.lock:
                self.ready[nbytes].append(block)
