"""So many requests a minute, evenly spaced."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final

#: Seconds between two looks whether the wait is still wanted.
POLL: Final = 0.1


class RateLimit:
    """Lets one caller through every 60 / `per_minute` seconds, in the order in which they came.

    There is no burst: time that nobody used is lost, so that no minute has more than `per_minute` starts (and the one
    that opens it). Safe from all threads.

    Args:
        per_minute: starts per minute; 0.5 is one every two minutes.
        at_once: whether the first caller is let through at once, or waits for its share of the minute as well.
        monotonic, sleep: time, for tests.

    Raises:
        ValueError: the rate is not a number above 0.
    """

    def __init__(
        self,
        per_minute: float,
        *,
        at_once: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < per_minute < math.inf:
            raise ValueError(f"a rate is a number of requests per minute above 0, not {per_minute}")
        self._interval = 60.0 / per_minute
        self._monotonic = monotonic
        self._sleep = sleep
        self._lock = threading.Lock()
        self._next = -math.inf if at_once else monotonic() + self._interval

    def wait(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait for the next start; returns early once `stopped` says so, which is asked ten times a second."""
        with self._lock:
            start = max(self._next, self._monotonic())
            self._next = start + self._interval
        while not stopped() and (left := start - self._monotonic()) > 0:
            self._sleep(min(left, POLL))
