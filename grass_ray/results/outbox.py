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
from grass_ray.results.connection import impatient

log = logging.getLogger(__name__)

# Answers that stay the same however often one asks; waiting for another would block everything behind them.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
_SLOW_S = 1.0  # a healthy store answers faster
_MOST_S = 5.0  # that slow and failing calls may take at once
_SHARE = 0.1  # of the time, that they may take in the long run


class Outbox:
    """Calls to a store, made in order.

    Args:
        store: the store's address, for warnings.

    Attributes:
        has_failed: whether any call has failed or was refused, so that what is in the store must be looked up.
        refused: descriptions of the calls that the store refused for good.
    """

    def __init__(self, store: str) -> None:
        self.has_failed = False
        self.refused: set[str] = set()
        self._store = store
        self._calls: deque[tuple[str, Callable[[], None]]] = deque()
        self._spent_s, self._since = 0.0, time.monotonic()
        self._failing = False

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, what: object) -> bool:
        """Whether a call of that description waits."""
        return any(waiting == what for waiting, _ in self._calls)

    def send(self, what: str, act: Callable[[], None]) -> None:
        """Make a call after those that wait. ``what`` describes it in warnings; ``act`` may be repeated."""
        self._calls.append((what, act))
        self._send(patient=False)

    def flush(self, wait_s: float) -> int:
        """Try for ``wait_s`` seconds to make the calls that wait. Returns how many are left."""
        deadline = time.monotonic() + wait_s
        while not self._send(patient=True) and time.monotonic() < deadline:
            time.sleep(0.5)
        return len(self)

    def _send(self, *, patient: bool) -> bool:
        """Make the waiting calls in order. Returns whether none is left."""
        while self._calls:
            if not patient and not self._has_time():
                return False
            (what, act), started = self._calls[0], time.monotonic()
            try:
                with impatient(timeout_s=15):
                    act()
                self.refused.discard(what)
            except Exception as error:  # noqa: BLE001 - whatever MLflow's parsers make of a broken answer
                self.has_failed = True
                if not is_refusal(error):
                    self._warn(what, error)
                    return False
                if what not in self.refused:
                    log.warning("MLflow refuses the %s, which is left out: %s", what, redact(str(error)))
                self.refused.add(what)
            finally:
                took_s = time.monotonic() - started
                self._spent_s += took_s if took_s > _SLOW_S else 0
            self._calls.popleft()
        if self._failing:
            log.warning("MLflow at %s answers again; everything that waited is logged", self._store)
        self._failing = False
        return True

    def _has_time(self) -> bool:
        """Whether a call may be made now: a store that hangs or is slow must not slow training by more than a tenth."""
        now = time.monotonic()
        self._spent_s = max(0.0, self._spent_s - _SHARE * (now - self._since))
        self._since = now
        return self._spent_s <= _MOST_S

    def _warn(self, what: str, error: Exception) -> None:
        if not self._failing:
            first = redact(str(error)).strip().splitlines() or [type(error).__name__]
            log.warning("MLflow failed at the %s; training goes on and logging is tried again: %s", what, first[0])
            log.debug("how it failed", exc_info=error)
        self._failing = True


def is_refusal(error: Exception) -> bool:
    """Whether the store would answer the same however often it is asked."""
    return getattr(error, "error_code", None) in _REFUSALS
