"""How fast the API may be asked: the pace that it allows, found out as it rejects requests.

Nothing is limited until the API says that it is too much (429, 499). Then the number of requests in flight is
halved, once for each burst of such answers, and grows by one for each such number of answers in a row that are none:
what TCP does, for the same reason. A wait that the API asks of one request is everybody's.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from bisect import insort
from enum import Enum
from itertools import count
from typing import Final

from prefect_ttapi.stopping import Stop

log: Final = logging.getLogger(__name__)

#: Seconds between two looks at whether a wait for a place is still wanted.
POLL: Final = 0.5


class Clock:
    """Time and chance of this machine."""

    def monotonic(self) -> float:
        """Return seconds that only grow."""
        return time.monotonic()

    def now(self) -> float:
        """Return the time as Unix seconds."""
        return time.time()

    def sleep(self, seconds: float, stop: Stop) -> None:
        """Wait so long.

        Raises:
            StopSending: `stop` was set meanwhile.
        """
        if stop.wait(seconds):
            stop.check()

    def jitter(self, most: float) -> float:
        """Return a random number from 0 to `most`."""
        return random.uniform(0, most)  # noqa: S311 - no secret


class Rejection(Enum):
    """What the rejection of a request shows of the pace."""

    ALONE = "nothing else was in flight"
    SLOWED = "the limit falls because of it"
    IN_COMPANY = "the limit has fallen since it started"


class Window:
    """How many requests may be in flight, and when the next one may start (sans-IO, for one thread at a time).

    Attributes:
        limit: requests in flight at once, at most; None: any number.
        in_flight: those that started and have not ended.
        not_before: no request starts earlier, on the caller's clock.
        slowed: how often the limit was lowered; a request remembers what it was when it started.

    >>> window = Window()
    >>> seen = [window.start() for _ in range(8)]
    >>> window.reject(seen[0]).name, window.reject(seen[1]).name, window.limit
    ('SLOWED', 'IN_COMPANY', 4)
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.in_flight = 0
        self.not_before = -math.inf
        self.slowed = 0
        self._answers = 0  # since the limit last changed
        self._wanted = 0  # the most places that were asked for since then

    def wait(self, now: float, queued: int) -> float | None:
        """Return the seconds until the next request may start, or None where another one has to end first.

        Args:
            now: the time on the caller's clock.
            queued: requests that want to start, this one included.
        """
        self._wanted = max(self._wanted, self.in_flight + queued)
        if self.limit is not None and self.in_flight >= self.limit:
            return None
        return max(0.0, self.not_before - now)

    def start(self) -> int:
        """Start a request; return what is to be handed back at its end."""
        self.in_flight += 1
        self._wanted = max(self._wanted, self.in_flight)
        return self.slowed

    def hold(self, until: float) -> None:
        """Let nothing start before `until`."""
        self.not_before = max(self.not_before, until)

    def reject(self, slowed: int) -> Rejection:
        """Lower the limit, as the API says that a request in flight was one too many.

        Not where the request started before the limit last fell: that tells nothing new.
        """
        if slowed != self.slowed:
            return Rejection.IN_COMPANY
        alone = self.in_flight == 1
        self._change(max(1, self.in_flight // 2))
        self.slowed += 1
        return Rejection.ALONE if alone else Rejection.SLOWED

    def answer(self, slowed: int) -> None:
        """Count the answer to a request; one from before the limit last fell doesn't show that it may grow."""
        if self.limit is None or slowed != self.slowed:
            return
        self._answers += 1
        if self._answers >= self.limit:
            self._change(None if self.limit >= self._wanted else self.limit + 1)

    def end(self) -> None:
        """End a request, which is no longer in flight."""
        self.in_flight -= 1

    def _change(self, limit: int | None) -> None:
        self.limit = limit
        self._answers = self._wanted = 0


class Pace:
    """The window that all threads of a client share; who waits longest is let through first."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.window = Window()
        self.lock = threading.Lock()
        self.queue: list[Turn] = []  # of those that wait for a place, the oldest first
        self.numbers = count()  # of its turns
        self._lowest = math.inf

    def wake(self) -> None:
        """Let the first one in the queue look again, with the lock held."""
        if self.queue:
            self.queue[0].woken.notify()

    def tell(self) -> None:
        """Log where the limit is lower than ever, or gone, with the lock held."""
        limit = self.window.limit
        if limit is None and self._lowest < math.inf:
            log.info("the API takes what is asked of it again: no limit on requests in flight")
            self._lowest = math.inf
        elif limit is not None and limit < self._lowest:
            log.warning("the API takes no more for now: at most %d request(s) in flight", limit)
            self._lowest = limit


class Turn:
    """One request's way through the pace, however often it is sent; it has at most one place.

    Args:
        stop: ends the request's waits with `StopSending`.

    Attributes:
        number: the lower, the earlier the request was made.
        woken: notified where it may be the request's turn.
    """

    def __init__(self, pace: Pace, stop: Stop) -> None:
        self.number = next(pace.numbers)
        self.woken = threading.Condition(pace.lock)
        self._pace = pace
        self._stop = stop
        self._has_place = False
        self._slowed = 0  # what the window said when the place was taken

    def take(self) -> None:
        """Wait until the request may be sent. One that was sent before goes ahead of those that never were."""
        pace = self._pace
        with pace.lock:
            insort(pace.queue, self, key=lambda turn: turn.number)
        try:
            while True:
                with pace.lock:
                    first = pace.queue[0] is self
                    wait = pace.window.wait(pace.clock.monotonic(), len(pace.queue)) if first else None
                    if wait == 0:
                        self._slowed, self._has_place = pace.window.start(), True
                        return
                    if wait is None:
                        self.woken.wait(POLL)
                if wait:
                    pace.clock.sleep(wait, self._stop)
                self._stop.check()
        finally:
            with pace.lock:
                pace.queue.remove(self)
                pace.wake()

    def answered(self) -> None:
        """Note that the API had room for the request, which has a place: it works on it, or is done with it."""
        with self._pace.lock:
            self._pace.window.answer(self._slowed)
            self._pace.tell()
            self._pace.wake()

    def rejected(self) -> Rejection:
        """Note that the request, which has a place, was one too many."""
        with self._pace.lock:
            rejection = self._pace.window.reject(self._slowed)
            self._pace.tell()
        return rejection

    def hold(self, seconds: float) -> None:
        """Give the place back, and let no request of the client start within `seconds`."""
        with self._pace.lock:
            self._pace.window.hold(self._pace.clock.monotonic() + seconds)
        self.give_back()

    def give_back(self) -> None:
        """Give the place back, if there is one: the request is no longer in flight."""
        with self._pace.lock:
            if self._has_place:
                self._has_place = False
                self._pace.window.end()
                self._pace.wake()
