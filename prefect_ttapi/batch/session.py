"""What the shards of one batch share within one process: workers, the budget, the reason to stop.

In the process of the coordinator there is one session for the whole batch, so that `max_in_flight` requests are
under way whatever shards they came in. A shard that runs in another process has a session of its own, with its share.
"""

from __future__ import annotations

import heapq
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Final

from prefect_ttapi.batch.breaker import Breaker
from prefect_ttapi.batch.items import Done, Item
from prefect_ttapi.errors import ACCOUNT_ERRORS
from prefect_ttapi.generation.budget import Spending
from prefect_ttapi.ledger.ledger import Waiting
from prefect_ttapi.responses import GeneratedImages
from prefect_ttapi.wire.limiter import RateLimit

#: To be called as soon as the API has answered: what is then left to do takes no place in flight.
OnAnswer = Callable[[GeneratedImages], None]

#: From an item, and what it waited for the last time, to its row; or to what it waits for now.
Work = Callable[[Item, Waiting | None, OnAnswer], Done | Waiting]

#: Is given each item's outcome as soon as it is there.
OnDone = Callable[[Item, Done], None]

#: Places of items whose jobs have ended; None: the batch was left.
_Jobs = queue.SimpleQueue[tuple[int, Future[Done | Waiting | None]] | None]

_STOPPING: Final = frozenset(kind.__name__ for kind in ACCOUNT_ERRORS)


def workers(in_flight: int) -> int:
    """Threads that keep so many requests with the API while others' images are stored; one at a time stays in order.

    >>> workers(1), workers(8), workers(32)
    (1, 12, 48)
    """
    return in_flight + in_flight // 2


class Stop:
    """Why the rest of a batch is not sent, once there is a reason; set and read by threads of one process."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.error_type: str | None = None
        self.cancelled = False

    def cancel(self, why: str = "the batch was cancelled", error_type: str = "CancelledError") -> None:
        """Whoever waits for the batch does so no longer: stop sending, and reading what has no known end."""
        self.because(why, error_type)
        self.cancelled = True

    def because(self, why: str, error_type: str | None) -> None:
        """Stop sending; the first reason stays."""
        if self.reason is None:  # whoever sees the reason is to see its kind
            self.error_type, self.reason = error_type, f"not sent, because {why}"


class _Flight:
    """An item's place in flight, given back once, and what its answer cost."""

    def __init__(self, item: Item, places: threading.Semaphore, spending: Spending) -> None:
        self._item = item
        self._places = places
        self._spending = spending
        self.landed = False
        self.settled = False
        places.acquire()

    def answered(self, answer: GeneratedImages) -> None:
        self._spending.settle(self._item.request, len(answer.images), answer.usage)
        self.settled = True
        self.land()

    def land(self) -> None:
        if not self.landed:
            self.landed = True
            self._places.release()


class Session:
    """Workers for the requests of a batch, and an account of what becomes of them.

    Args:
        in_flight: how many requests are under way at once.
        spending: the budget of all of them.
        breaker: stops the batch after failures in a row.
        rate: spaces the sends.
        stop: the reason to stop, shared with whoever may cancel the batch.
        on_done: is given each outcome at once, from a worker; None: `run` returns them.
        on_waiting: called when an item begins to wait for somebody else's claim.

    Attributes:
        waiting: how many items wait for somebody else's claim.
    """

    def __init__(
        self,
        in_flight: int,
        spending: Spending,
        *,
        breaker: Breaker,
        rate: RateLimit | None = None,
        stop: Stop | None = None,
        on_done: OnDone | None = None,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.spending = spending
        self.rate = rate
        self.stop = stop or Stop()
        self._breaker = breaker
        self.waiting = 0
        self._on_done = on_done
        self._on_waiting = on_waiting
        self._places = threading.Semaphore(in_flight)
        self._workers = ThreadPoolExecutor(workers(in_flight), thread_name_prefix="ttapi-batch")
        self._accounting = threading.Lock()
        self._flights: dict[int, _Flight] = {}
        self._runs: set[_Jobs] = set()

    def close(self) -> None:
        """Start nothing more; what is under way goes on, but `run` waits for it no longer."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        for ended in self._runs.copy():
            ended.put(None)

    def under_way(self) -> frozenset[int]:
        """The rows that are with the API, or being stored and delivered."""
        return frozenset(self._flights.copy())

    def in_flight(self) -> int:
        """How many requests are with the API."""
        return sum(not flight.landed for flight in self._flights.copy().values())

    def run(self, items: Sequence[Item], work: Work) -> list[Done | None]:
        """Every item to its outcome, in order; None for one that was handed on, or left when the batch was.

        An item that waits for somebody else's claim takes no place in flight: it comes back after its pause.
        """
        outcomes: list[Done | None] = [None] * len(items)
        ended: _Jobs = queue.SimpleQueue()
        later: list[tuple[float, int, Waiting]] = []

        def start(place: int, waiting: Waiting | None = None) -> None:
            # each in a copy of the task run's context, so that what it does is known as the task run's
            job: Future[Done | Waiting | None]
            try:
                job = self._workers.submit(copy_context().run, self._outcome, work, items[place], waiting)
            except RuntimeError:  # closed, as the batch was left
                job = Future()
                job.cancel()
            job.add_done_callback(lambda done: ended.put((place, done)))

        self._runs.add(ended)
        for place in range(len(items)):
            start(place)
        missing = len(items)
        while missing:
            try:
                job = ended.get(timeout=max(0.0, later[0][0] - time.monotonic()) if later else None)
            except queue.Empty:
                _, place, waiting = heapq.heappop(later)
                self._count_waiting(-1)
                start(place, waiting)
                continue
            if job is None:
                break
            place, result = job
            found = None if result.cancelled() else result.result()
            if isinstance(found, Waiting):
                heapq.heappush(later, (time.monotonic() + found.pause, place, found))
                self._count_waiting(1)
            else:
                outcomes[place] = found
                missing -= 1
        self._runs.discard(ended)
        return outcomes

    def _count_waiting(self, more: int) -> None:
        with self._accounting:
            self.waiting += more
        if more > 0:
            self._on_waiting()

    def _outcome(self, work: Work, item: Item, waiting: Waiting | None) -> Done | Waiting | None:
        flight = self._flights[item.row] = _Flight(item, self._places, self.spending)
        try:
            done = work(item, waiting, flight.answered)
            flight.land()
            if isinstance(done, Waiting):
                return done
            self.account(item, done, settled=flight.settled)
            if self._on_done is None:
                return done
            self._on_done(item, done)
            return None
        finally:  # until its outcome is told it counts as under way
            flight.land()
            del self._flights[item.row]

    def account(self, item: Item, done: Done, *, settled: bool = False, counts: bool = True) -> None:
        """Note what an item cost, unless that is `settled`, and whether its failure, if it `counts`, stops the rest."""
        row = done.row
        with self._accounting:
            if item.may_pay and not settled:
                self.spending.settle(item.request, done.images_paid, row.usage)
            if row.status == "failed" and row.error_type in _STOPPING:
                self.stop.because(f"an earlier request failed: {row.error}", row.error_type)
            counts &= (
                bool(row.api_calls) or row.error_type != "UnknownOutcomeError"
            )  # that says nothing of now
            if row.status in ("generated", "failed") and counts:
                tripped = self._breaker.note(row.error_type)
                if tripped:
                    self.stop.because(f"{tripped}, the last with: {row.error}", row.error_type)


#: By process, as a fork takes no threads along, and batch.
_OPEN: dict[tuple[int, str], Session] = {}


@contextmanager
def shared(session: Session, batch_id: str) -> Iterator[Session]:
    """Make the session known to the batch's shards in this process; closed at the end."""
    key = os.getpid(), batch_id
    _OPEN[key] = session
    try:
        yield session
    finally:
        del _OPEN[key]
        session.close()


@contextmanager
def session_for(batch_id: str, own: Callable[[], Session]) -> Iterator[Session]:
    """The batch's session in this process, or one of the shard's own."""
    session = _OPEN.get((os.getpid(), batch_id))
    if session is not None:
        yield session
        return
    session = own()
    try:
        yield session
    finally:
        session.close()
