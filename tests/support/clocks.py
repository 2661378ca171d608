"""Time that passes only when somebody sleeps, and chance that always gives the most."""

from __future__ import annotations

import threading

from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.stopping import Stop


class StoppedClock(Clock):
    """A clock for a client; `sleeps` is how long it slept each time."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self._seconds = 0.0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self._seconds

    def now(self) -> float:
        return 1_700_000_000.0 + self._seconds

    def sleep(self, seconds: float, stop: Stop | None = None) -> None:
        with self._lock:
            self.sleeps.append(seconds)
            self._seconds += seconds
        if stop is not None:
            stop.check()

    def jitter(self, most: float) -> float:
        return most
