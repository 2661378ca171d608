"""One way to stop: a token that every loop that waits looks at, and the pauses between its tries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from weakref import WeakSet


class StopSending(Exception):  # noqa: N818 - a decision of the caller, not an error
    """The request is no longer wanted; the message says why.

    Where nothing was sent it reaches the caller as it is, else the error of the last attempt says it too.
    """


class Stop:
    """Say why nothing more is sent, once there is a reason; safe from all threads of a process.

    Attributes:
        reason: why, in words; None while work goes on.
        error_type: the name of the error class behind the reason, where there is one.
        cancelled: whether the caller waits no longer, so that what has no known end is not read any further.

    >>> stop = Stop()
    >>> stop.wait(0.0)
    False
    >>> stop.set("the account is empty", "InsufficientBalanceError")
    >>> stop.wait(60.0), stop.reason
    (True, 'the account is empty')
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.error_type: str | None = None
        self.cancelled = False
        self._lock = threading.Lock()
        self._is_set = threading.Event()
        self._waiting: WeakSet[threading.Condition] = WeakSet()

    def wake(self, condition: threading.Condition) -> None:
        """Notify whoever waits for `condition` once it is set."""
        with self._lock:
            self._waiting.add(condition)

    def set(self, reason: str, error_type: str | None = None) -> None:
        """Stop sending. The first reason stays."""
        with self._lock:
            if self.reason is None:  # whoever sees the reason must see its type
                self.error_type, self.reason = error_type, reason
            waiting = list(self._waiting)
        self._is_set.set()
        for condition in waiting:
            with condition:
                condition.notify_all()

    def cancel(self, reason: str, error_type: str | None = None) -> None:
        """Stop sending, because whoever asked waits no longer."""
        self.set(reason, error_type)
        self.cancelled = True

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, at most so many seconds; return whether it is."""
        return self._is_set.wait(max(0.0, seconds))

    def check(self) -> None:
        """Raise `StopSending` once it is set."""
        if self.reason is not None:
            raise StopSending(self.reason)


def backoff(first: float, longest: float) -> Iterator[float]:
    """Yield pauses in seconds without end, each twice the one before, up to `longest`.

    >>> pauses = backoff(0.5, 3.0)
    >>> [next(pauses) for _ in range(4)]
    [0.5, 1.0, 2.0, 3.0]
    """
    pause = first
    while True:
        yield min(pause, longest)
        pause = min(2 * pause, longest)
