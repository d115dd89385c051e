"""What the MLflow store has not taken yet: calls that wait in order and are tried again.

A store that fails in mid-run never stops training; each call can be repeated without counting anything twice. ::

    outbox = Outbox("sqlite:///results/mlflow.db")
    outbox.send("12 steps", lambda: client.log_batch(run_id, metrics=rows))
    left = outbox.flush(wait_s=10)
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from grass_ray.errors import redact
from grass_ray.results.connection import failures, impatient

log = logging.getLogger(__name__)

# Answers that stay the same however often one asks; waiting for another would block everything behind them.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")


class Outbox:
    """Calls to a store, made in order.

    Args:
        store: the store's address, for warnings.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._calls: deque[tuple[str, Callable[[], None]]] = deque()
        self._not_before = 0.0
        self._failing = False

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, what: object) -> bool:
        """Whether a call of that description waits."""
        return any(waiting == what for waiting, _ in self._calls)

    def send(self, what: str, act: Callable[[], None]) -> None:
        """Make a call after those that wait. ``what`` describes it in warnings; ``act`` may be repeated."""
        self._calls.append((what, act))
        if time.monotonic() >= self._not_before:
            self._send()

    def flush(self, wait_s: float) -> int:
        """Try for ``wait_s`` seconds to make the calls that wait. Returns how many are left."""
        deadline = time.monotonic() + wait_s
        while not self._send() and time.monotonic() < deadline:
            time.sleep(0.5)
        return len(self)

    def _send(self) -> bool:
        """Make the waiting calls in order. Returns whether none is left."""
        while self._calls:
            (what, act), started = self._calls[0], time.monotonic()
            try:
                with impatient(timeout_s=15):
                    act()
            except failures() as error:
                if getattr(error, "error_code", None) not in _REFUSALS:
                    self._wait(what, error, time.monotonic() - started)
                    return False
                log.warning("MLflow refuses the %s, which is left out: %s", what, redact(str(error)))
            self._calls.popleft()
        if self._failing:
            log.warning("MLflow at %s answers again; everything that waited is logged", self._store)
        self._failing = False
        return True

    def _wait(self, what: str, error: Exception, took_s: float) -> None:
        # An address that hangs instead of refusing must not slow training by more than a tenth.
        self._not_before = time.monotonic() + (10 * took_s if took_s > 1 else 0)
        if not self._failing:
            first = redact(str(error)).strip().splitlines() or [type(error).__name__]
            log.warning("MLflow failed at the %s; training goes on and logging is tried again: %s", what, first[0])
        self._failing = True
