"""A lane: one task run that carries a list of requests, some of them side by side, and returns their rows.

Lanes are plain tasks with plain results, so that any task runner runs them. What happens to a request is in its row;
only a lane of one request fails with it. In the process of the batch, lanes share places in flight, budget, rate and
stop; elsewhere each has its share of them, and hears of a stop from the store.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Final

from prefect_ttapi.batch.items import Done, Item, Work
from prefect_ttapi.batch.options import SECONDS, workers
from prefect_ttapi.errors import ACCOUNT_ERRORS, KeyTakenError, ModelNotPermittedError, ModerationError
from prefect_ttapi.generation.budget import Spending
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.ledger.ledger import Waiting
from prefect_ttapi.lineage.manifest import Row

#: Seconds for which a lane elsewhere, when it has nothing else to do, waits for claims of other runs, beyond the time
#: for which one of a dead holder stands. Then it gives their requests back: its places are for others.
PATIENCE: Final = 15.0

#: A lane elsewhere goes on for so many times the longest of its requests, or half of its places would be idle while it
#: ends; but no longer than so many seconds.
_TIMES: Final = 4
_MOST_SECONDS: Final = 180.0

#: Seconds between looks whether a lane is still wanted.
_POLL: Final = 0.5

#: Errors that every later request of the same account would meet, too.
_STOPPING: Final = frozenset(kind.__name__ for kind in ACCOUNT_ERRORS)
_EARLIER: Final = "not sent, because an earlier request failed"

#: Errors that the ledger tells of an earlier send, where this run did not send.
_PERHAPS_EARLIER: Final = frozenset({"UnknownOutcomeError", "InvalidResponseError", "DownloadError"})


@dataclass(frozen=True, eq=False)
class Lane:
    """A list of requests for one task run.

    Attributes:
        items: the requests.
        width: how many are under way side by side.
        share: what a lane in another process may spend; None: the lane shares the batch's budget.
        rate: requests per minute of a lane in another process.
        rate_unused: whether nobody had that rate before, so that the first request may go at once.
    """

    items: tuple[Item, ...]
    width: int
    share: Spending | None = None
    rate: float | None = None
    rate_unused: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in another process."""
        return self.share is not None


_MODERATION: Final = ModerationError.__name__
_MODEL: Final = ModelNotPermittedError.__name__
_KEY: Final = KeyTakenError.__name__


class Breaker:
    """Counts failures of one kind in a row, and refused prompts apart; safe from all threads.

    Args:
        limit: this many trip it; None: never.
        refused: this many refused prompts trip it if none passes meanwhile; None: never.

    >>> breaker = Breaker(limit=2)
    >>> breaker.note("ServerError"), breaker.note("ModerationError"), breaker.note("ServerError")
    (None, None, '2 requests in a row failed with ServerError')
    """

    def __init__(self, limit: int | None = 10, refused: int | None = 50) -> None:
        self._limit = limit
        self._most_refused = refused
        self._lock = threading.Lock()
        self._kind: str | None = None
        self._in_a_row = 0
        self._refused = 0

    def note(self, error_type: str | None) -> str | None:
        """Count a request that has ended, in order of completion; return why to give the batch up, once that is due.

        Args:
            error_type: the name of the error's class; None: the request succeeded.
        """
        if error_type == _MODEL:
            return None  # others may work
        with self._lock:
            if error_type == _MODERATION:
                self._refused += 1
                if self._most_refused is None or self._refused < self._most_refused:
                    return None
                return f"{self._refused} prompts in a row were refused, and none passed"
            self._refused = self._refused if error_type else 0
            self._in_a_row = self._in_a_row + 1 if error_type == self._kind else 1
            self._kind = error_type
            if error_type is None or self._limit is None or self._in_a_row < self._limit:
                return None
            return f"{self._in_a_row} requests in a row failed with {error_type}"


class Shared:
    """What the lanes of a batch share within one process; safe from all threads.

    Attributes:
        limits: asked before each send.
        stop: why nothing more is sent, once there is a reason.
        left: set once nobody waits for the lanes any longer.
        idle: how many workers have nothing to do but to wait for claims of other runs.
    """

    def __init__(self, limits: Limits, breaker: Breaker) -> None:
        self.limits = limits
        self.stop = limits.stop
        self.left = threading.Event()
        self._breaker = breaker
        self._lock = threading.Lock()
        self.idle = 0
        self._known: dict[int, Done | None] = {}

    def rest(self, more: int) -> None:
        """Count workers that begin (1) or cease (-1) to wait for claims of other runs."""
        with self._lock:
            self.idle += more

    def begun(self, item: Item) -> None:
        """Note that an item is being worked on: from now on it may be sent."""
        with self._lock:
            self._known[item.row] = None

    def put_back(self, item: Item) -> None:
        """Note that an item was not sent, and waits for a claim of another run."""
        with self._lock:
            self._known.pop(item.row, None)

    def ended(self, item: Item, done: Done) -> None:
        """Note what became of an item, and whether its failure stops the batch."""
        self.judge(done.row)
        with self._lock:
            self._known[item.row] = done

    def returned(self, lane: Lane) -> None:
        """Forget what is known of a lane's items: it has returned their rows."""
        with self._lock:
            for item in lane.items:
                self._known.pop(item.row, None)

    def known(self) -> dict[int, Done | None]:
        """Return, by row, what became of the items of open lanes; None where an item is being worked on."""
        with self._lock:
            return dict(self._known)

    def judge(self, row: Row) -> None:
        """Stop the batch where a failure will not be the last one of its kind."""
        if row.status not in ("generated", "failed"):
            return
        if row.error_type in _STOPPING:
            self.stop.set(f"{_EARLIER}: {row.error}", row.error_type)
        if row.error_type == _MODEL and row.request is not None:
            self.limits.barred.setdefault(row.request.model, f"{_EARLIER}: {row.error}")
        if row.error_type == _KEY and not row.images:
            return  # nothing was sent, and others may have their keys
        if not row.api_calls and row.error_type in _PERHAPS_EARLIER:
            return  # of an earlier run's send: that says nothing of now
        tripped = self._breaker.note(row.error_type)
        if tripped:
            self.stop.set(f"not sent, because {tripped}, the last with: {row.error}", row.error_type)


class _Queue:
    """A lane's items that are still to be worked on; one that waits for a claim of another run lets others pass."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = deque(enumerate(items))
        self._held: list[tuple[float, int, Item, Waiting]] = []
        self._under_way = 0
        self._closed = False
        self._lock = threading.Lock()

    def take(self, now: float) -> tuple[int, Item, Waiting | None] | float | None:
        """Return the next item, its place and what it waited for; or seconds to wait for one; or None at the end."""
        with self._lock:
            if self._closed:
                return None
            if self._items:
                self._under_way += 1
                return *self._items.popleft(), None
            if self._held and self._held[0][0] <= now:
                self._under_way += 1
                _, place, item, waiting = heapq.heappop(self._held)
                return place, item, waiting
            if self._held:
                return self._held[0][0] - now
            # one that is under way may still come to wait for a claim
            return _POLL if self._under_way else None

    def hold(self, place: int, item: Item, waiting: Waiting, now: float) -> None:
        """Take an item back until its claim is worth another look."""
        with self._lock:
            self._under_way -= 1
            heapq.heappush(self._held, (now + waiting.pause, place, item, waiting))

    def done(self) -> None:
        """Count an item as finished."""
        with self._lock:
            self._under_way -= 1

    def cut(self) -> int:
        """Give out nothing more that was not begun; return how much that is."""
        with self._lock:
            left = len(self._items)
            self._items.clear()
            return left

    def close_if_idle(self) -> bool:
        """Give out nothing more if all that is left waits for claims of other runs; return whether that is so."""
        with self._lock:
            self._closed = not self._items and not self._under_way
            return self._closed


class LaneRun:
    """Works on the items of a lane in threads of its own, which nobody waits for once the batch is left.

    A lane elsewhere, of which nothing is heard before it ends, gives back after a while what it has not begun.

    Args:
        patience: seconds for which a lane elsewhere waits for claims of other runs only.
        cut: whether it gives anything back.
    """

    def __init__(
        self,
        lane: Lane,
        work: Work,
        shared: Shared,
        *,
        patience: float = PATIENCE,
        cut: bool = True,
    ) -> None:
        self._lane = lane
        self._work = work
        self._shared = shared
        self._queue = _Queue(lane.items)
        self._results: list[Done | None] = [None] * len(lane.items)
        self._missing = len(lane.items)
        self._ended = threading.Event()  # nobody waits for this lane's items any longer
        self._broken: BaseException | None = None
        self._changed = threading.Condition()
        self._patience = patience
        self._cut = cut and lane.elsewhere
        self._began = time.monotonic()
        self._longest = 0.0

    def results(self) -> list[Done | None]:
        """Return a row for each item, in order; None for one that is left, or given back to be tried again."""
        side_by_side = min(
            len(self._lane.items), self._lane.width if self._lane.width == 1 else self._workers
        )
        try:
            for _ in range(side_by_side):
                # each in a copy of the task run's context, so that what it does is known as the task run's
                run = partial(copy_context().run, self._run)
                threading.Thread(target=run, name="ttapi-lane", daemon=True).start()
            with self._changed:
                while self._missing and not self._ended.is_set() and not self._shared.left.is_set():
                    if self._cut and self._is_over:
                        self._cut = False
                        self._missing -= self._queue.cut()
                    else:
                        self._changed.wait(_POLL)
                if self._broken is not None:
                    raise RuntimeError(f"a worker broke down: {self._broken!r}") from self._broken
                return list(self._results)
        finally:
            self._ended.set()

    @property
    def _is_over(self) -> bool:
        seconds = time.monotonic() - self._began
        enough = max(SECONDS, min(_TIMES * self._longest, _MOST_SECONDS))
        return seconds >= enough and (self._longest > 0 or seconds >= _MOST_SECONDS)

    @property
    def _workers(self) -> int:
        """Of a lane elsewhere more than it has places; in this process, other lanes are at work meanwhile."""
        return workers(self._lane.width) if self._lane.elsewhere else self._lane.width

    def _run(self) -> None:
        try:
            self._work_through()
        except BaseException as error:  # nobody hears of it in a thread: the lane would never end
            self._broken = error
            self._ended.set()

    def _work_through(self) -> None:
        patience: float | None = None
        stop = self._shared.stop
        # once the batch stops, nobody waits for claims any longer
        while (taken := self._queue.take(math.inf if stop.reason else time.monotonic())) is not None:
            if self._shared.left.is_set() or self._ended.is_set():
                return
            if isinstance(taken, float):
                now = time.monotonic()
                patience = patience or now + self._patience
                if self._lane.elsewhere and now >= patience and self._queue.close_if_idle():
                    self._ended.set()
                    return
                self._shared.rest(1)
                self._ended.wait(min(taken, _POLL))
                self._shared.rest(-1)
                continue
            patience = None
            place, item, waiting = taken
            self._shared.begun(item)
            began = time.monotonic()
            found = self._work.outcome(item, waiting)
            if isinstance(found, Waiting):
                self._shared.put_back(item)
                self._queue.hold(place, item, found, time.monotonic())
                continue
            self._shared.ended(item, found)
            self._queue.done()
            with self._changed:
                self._results[place] = found
                self._missing -= 1
                self._longest = max(self._longest, time.monotonic() - began)
                self._changed.notify_all()
