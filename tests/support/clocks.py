"""Time that passes only when somebody sleeps, and chance that always gives the most."""

from __future__ import annotations

import threading

from prefect_ttapi.wire.clock import Clock


class StoppedClock:
    """`clock` is for a client; `sleeps` is how long it slept each time."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self._seconds = 0.0
        self._lock = threading.Lock()
        self.clock = Clock(
            monotonic=lambda: self._seconds,
            now=lambda: 1_700_000_000.0 + self._seconds,
            sleep=self._sleep,
            jitter=lambda most: most,
        )

    def _sleep(self, seconds: float) -> None:
        with self._lock:
            self.sleeps.append(seconds)
            self._seconds += seconds
