"""Time that passes only when somebody sleeps, chance that always gives the most, and an end to all waiting."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.stopping import Stop

T = TypeVar("T")

#: Seconds after which what has not come true has failed the test.
PATIENCE = 60.0


def until(what: Callable[[], T], told: Callable[[], object] = str, seconds: float = PATIENCE) -> T:
    """Wait for something to become true, and return it; `told` says what else is known where it does not."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, told()
        time.sleep(0.02)
    return found


class HangsError(BaseException):
    """A loop that has no end. No `Exception`: nothing catches it, and Hypothesis looks for no shorter example."""


@contextmanager
def ending(seconds: float) -> Iterator[None]:
    """Raise `HangsError` in the main thread after so much CPU time; who sets ITIMER_VIRTUAL again has more."""

    def hangs(*_: object) -> None:
        raise HangsError(f"{seconds:g} s of CPU time are over")

    before = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


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
