"""What the requests of a run share, and ask before they are sent: stop, places in flight, rate, budget, and room."""

from __future__ import annotations

import math
import threading
import time
from types import TracebackType
from typing import Final, Self

from prefect_ttapi.errors import BudgetExceeded, NotStoredError, Outcome, StoreError, TTAPIError
from prefect_ttapi.generation.budget import Spending
from prefect_ttapi.generation.rescue import rescue_place
from prefect_ttapi.images.spool import check_room, room_at
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import GeneratedImages, Usage
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.store import ImageStore

#: After these nothing was paid, so that the claim can be given back and anyone may send again.
SURELY_UNPAID: Final = frozenset({Outcome.NEVER_DELIVERED, Outcome.REJECTED, Outcome.REFUSED})

#: Bytes that must be free for each image before it is paid for: a large one, as the models make them.
IMAGE_ROOM: Final = 8 * 1024 * 1024

#: Seconds between two looks at stop and budget while a request waits for its turn.
_POLL: Final = 0.1


def perhaps_paid(error: BaseException) -> bool:
    """Return whether a request that ended in `error` may cost money all the same."""
    match error:
        case StopSending() | BudgetExceeded():
            return False
        case TTAPIError():
            return error.outcome not in SURELY_UNPAID
        case StoreError():
            return isinstance(error, NotStoredError)
        case _:
            return True


class RateLimit:
    """Space the sends of all threads evenly: one every 60 / `per_minute` seconds.

    There is no burst: time that nobody used is lost, so that no minute has more than `per_minute` sends (and the one
    that opens it).

    Args:
        per_minute: sends per minute; 0.5 is one every two minutes.
        at_once: whether the first send may go at once, or waits for its share of the minute as well.

    Raises:
        ValueError: the rate is not a number above 0.

    >>> rate = RateLimit(30)
    >>> rate.next_start(now=100.0), rate.next_start(now=100.0), rate.next_start(now=110.0)
    (100.0, 102.0, 110.0)
    """

    def __init__(self, per_minute: float, *, at_once: bool = True) -> None:
        if not 0 < per_minute < math.inf:
            raise ValueError(f"a rate is a number of requests per minute above 0, not {per_minute}")
        self._interval = 60.0 / per_minute
        self._lock = threading.Lock()
        self._next = -math.inf
        self._at_once = at_once

    def next_start(self, now: float) -> float:
        """Return when the caller may send, on the caller's clock; the next caller's turn is an interval later."""
        with self._lock:
            if not self._at_once:
                self._next, self._at_once = now + self._interval, True
            start = max(self._next, now)
            self._next = start + self._interval
        return start


class Limits:
    """What the requests of one run share; safe from all threads of a process.

    Args:
        stop: why nothing more is sent, once there is a reason.
        in_flight: requests with the API at once; None: any number.
        rate: spaces the sends.
        spending: the budget of all of them, in which whoever hands a request over has reserved its cost.

    Attributes:
        barred: the models that the account may not use, and why their requests are not sent.
    """

    def __init__(
        self,
        stop: Stop | None = None,
        *,
        in_flight: int | None = None,
        rate: RateLimit | None = None,
        spending: Spending | None = None,
    ) -> None:
        self.stop = stop or Stop()
        self.rate = rate
        self.spending = spending or Spending(None)
        self.barred: dict[str, str] = {}
        self._most = in_flight
        self._taken = 0
        self._changed = threading.Condition()
        self.stop.wake(self._changed)

    @property
    def in_flight(self) -> int:
        """How many requests are with the API, or about to be."""
        return self._taken

    def place(self, request: ImageRequest) -> Place:
        """Return a place in flight for a request, to be used as a context."""
        return Place(self, request)

    def admit(self, attempt: int) -> None:
        """Wait for a turn to send; nothing but sending may follow.

        Raises:
            StopSending: nothing more is sent.
            BudgetExceeded: nothing of this request was sent, and others were dearer than expected.
        """
        if self.rate is not None:
            start = self.rate.next_start(time.monotonic())
            while (left := start - time.monotonic()) > 0 and self.spending.passed() is None:
                if self.stop.wait(min(left, _POLL)):
                    break
        self.stop.check()
        passed = self.spending.passed()
        if passed:
            raise BudgetExceeded(passed) if attempt == 1 else StopSending(passed)

    def take(self) -> None:
        """Take a place, waiting while there is none.

        Raises:
            StopSending: nothing more is sent, and there was none.
        """
        with self._changed:
            while self._most is not None and self._taken >= self._most:
                self.stop.check()
                self._changed.wait()
            self._taken += 1

    def give_back(self) -> None:
        """Give a place back."""
        with self._changed:
            self._taken -= 1
            self._changed.notify()


class Place:
    """One request's place in flight, given back once it is answered, and what becomes of its reservation.

    What is left to do with an answer, such as storing it, takes no place.
    """

    def __init__(self, limits: Limits, request: ImageRequest) -> None:
        self._limits = limits
        self._request = request
        self._taken = False
        self._reserved = True

    def __enter__(self) -> Self:
        self._limits.take()
        self._taken = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reserved:
            self._settle(self._request.n if error is not None and may_cost(error) else 0)
        self._give_back()

    def answered(self, answer: GeneratedImages) -> None:
        """Count what the answer cost, and give the place back."""
        # what is left of an answer is paid, too
        images = len(answer.images) if answer.rest is None else self._request.n
        self._settle(images, answer.usage or Usage())
        self._give_back()

    def wait(self) -> None:
        """Keep the reservation: the request waits for somebody else's record, and comes back."""
        self._reserved = False

    def _settle(self, images: int, usage: Usage | None = None) -> None:
        self._reserved = False
        self._limits.spending.settle(self._request, images, usage)

    def _give_back(self) -> None:
        if self._taken:
            self._taken = False
            self._limits.give_back()


def may_cost(error: BaseException) -> bool:
    """Return whether this very call may have paid: an error without a send is the ledger's, of an earlier call."""
    refused_by_the_ledger = isinstance(error, TTAPIError) and not error.attempts
    return perhaps_paid(error) and not refused_by_the_ledger


def check_room_for(request: ImageRequest, store: ImageStore) -> None:
    """Raise StoreError where this machine could not keep the answer, which would be paid for and lost."""
    size = request.n * IMAGE_ROOM
    rescue = rescue_place(store.rescue_folder)
    for disk, room in (("store's", store.objects.room()), ("rescue folder's", room_at(rescue))):
        if room is not None and room < size:
            raise StoreError(
                f"nothing is sent: the {disk} disk has {room:,} bytes free, and {size:,} may be needed"
            )
    try:
        check_room(size)
    except OSError as error:
        raise StoreError(f"nothing is sent: no temporary file can be written ({error.strerror})") from error
