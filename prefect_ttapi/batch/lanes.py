"""Run a lane: one task run that carries a list of requests, some of them side by side, and returns their rows.

Lanes are plain tasks with plain results, so that any task runner runs them. What happens to a request is in its row;
only a lane of one request fails with it. In the process of the batch, lanes share places in flight, budget, rate and
stop; elsewhere each has its share of them, and hears of a stop from the store.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.states import Failed
from prefect.tasks import TaskRunNameCallbackWithParameters

from prefect_ttapi.batch.items import Done, Item, Work
from prefect_ttapi.batch.options import SECONDS, Breaker, Plan, workers
from prefect_ttapi.credentials import TTAPICredentials, shared_client
from prefect_ttapi.errors import ACCOUNT_ERRORS, KeyTakenError, ModelNotPermittedError, StoreError
from prefect_ttapi.generation.budget import Spending
from prefect_ttapi.generation.engine import Engine, ledger_for
from prefect_ttapi.generation.limits import Limits, RateLimit
from prefect_ttapi.ledger.ledger import Waiting
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.layout import stop_key
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds for which a lane elsewhere, when it has nothing else to do, waits for claims of other runs, beyond the time
#: for which one of a dead holder stands. Then it gives their requests back: its places are for others.
PATIENCE: Final = 15.0

#: A lane elsewhere goes on for so many times the longest of its requests, or half of its places would be idle while it
#: ends; but no longer than so many seconds.
_TIMES: Final = 4
_MOST_SECONDS: Final = 180.0

#: A lane in this process goes on for so many times what was expected of it, by requests that may have been quicker, as
#: they were paid for already; but for so many seconds at least.
_OVERDUE: Final = 2.0
_SOON: Final = 5.0

#: Seconds between looks whether a lane is still wanted.
_POLL: Final = 0.5

#: Seconds between looks of a lane elsewhere whether the batch has stopped.
LOOK: Final = 2.0

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
        expected: seconds that it takes, by those before it.
    """

    items: tuple[Item, ...]
    width: int
    share: Spending | None = None
    rate: float | None = None
    rate_unused: bool = False
    expected: float = 0.0

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in another process."""
        return self.share is not None

    @property
    def overdue(self) -> float:
        """Seconds after which a lane in this process gives back what it has not begun."""
        return max(_SOON, _OVERDUE * self.expected)


class Shared:
    """The state that the lanes of a batch share within one process; safe from all threads.

    Attributes:
        limits: asked before each send.
        stop: why nothing more is sent, once there is a reason.
        left: set once nobody waits for the lanes any longer.
        idle: how many workers have nothing to do but to wait for claims of other runs.
    """

    def __init__(self, limits: Limits, breaker: Breaker) -> None:
        self.limits = limits
        self.stop = limits.stop
        self.left = Stop()
        self._breaker = breaker
        self._lock = threading.Lock()
        self.idle = 0
        self._known: dict[int, Done | None] = {}
        self._closed: set[int] = set()

    def rest(self, more: int) -> None:
        """Count workers that begin (1) or cease (-1) to wait for claims of other runs."""
        with self._lock:
            self.idle += more

    def begun(self, item: Item) -> bool:
        """Note that an item is being worked on: from now on it may be sent. Return whether its lane is still wanted."""
        with self._lock:
            if item.row not in self._closed:
                self._known[item.row] = None
            return item.row not in self._closed

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

    def close(self, lane: Lane) -> dict[int, Done | None]:
        """Let nothing more of a lane that broke down begin; return what is known of its items, as `known` does."""
        with self._lock:
            rows = {item.row for item in lane.items}
            self._closed |= rows
            return {row: self._known.pop(row) for row in rows & self._known.keys()}

    def known(self) -> dict[int, Done | None]:
        """Return, by row, what became of the items of open lanes; None where an item is being worked on."""
        with self._lock:
            return dict(self._known)

    def judge(self, row: Row) -> None:
        """Stop the batch where other requests would fail in the same way."""
        if row.status not in ("generated", "failed"):
            return
        if row.error_type in _STOPPING:
            self.stop.set(f"{_EARLIER}: {row.error}", row.error_type)
        if row.error_type == ModelNotPermittedError.__name__ and row.request is not None:
            self.limits.barred.setdefault(row.request.model, f"{_EARLIER}: {row.error}")
        if row.error_type == KeyTakenError.__name__ and not row.images:
            return  # nothing was sent, and others may have their keys
        if not row.api_calls and row.error_type in _PERHAPS_EARLIER:
            return  # of an earlier run's send: that says nothing of now
        tripped = self._breaker.note(row.error_type)
        if tripped:
            self.stop.set(f"not sent, because {tripped}, the last with: {row.error}", row.error_type)


#: The state that the lanes of an open batch share, by process, as a fork takes no threads along, and batch.
_OPEN: Final[dict[tuple[int, str], Shared]] = {}


@contextmanager
def shared_here(shared: Shared, batch_id: str) -> Iterator[None]:
    """Let the batch's lanes in this process find the state that they share."""
    key = os.getpid(), batch_id
    _OPEN[key] = shared
    try:
        yield
    finally:
        del _OPEN[key]
        shared.left.set("the batch has ended")


def _shared_for(lane: Lane, plan: Plan) -> Shared | None:
    """Return the state that the batch's lanes share in this process; for a lane elsewhere, one with its shares.

    None: the batch was left before the lane got a worker.
    """
    if not lane.elsewhere:
        return _OPEN.get((os.getpid(), plan.batch_id))
    limits = Limits(
        in_flight=lane.width,
        # whoever had this share before may just have sent
        rate=RateLimit(lane.rate, at_once=lane.rate_unused) if lane.rate else None,
        spending=lane.share,
    )
    return Shared(limits, Breaker(plan.options.breaker, plan.options.max_refused))


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


def is_over(lane: Lane, seconds: float, longest: float) -> bool:
    """Return whether a lane has lasted for long enough to give back what it has not begun.

    Args:
        seconds: that it has lasted.
        longest: seconds that the longest of its requests took; 0 while none has ended.
    """
    if not lane.elsewhere:
        return seconds >= lane.overdue
    enough = max(SECONDS, min(_TIMES * longest, _MOST_SECONDS))
    return seconds >= enough and (longest > 0 or seconds >= _MOST_SECONDS)


class LaneRun:
    """Works on the items of a lane in threads of its own, which nobody waits for once the batch is left.

    After a while it gives back what it has not begun: the items may be slower than expected, and others idle.

    Args:
        patience: seconds for which a lane elsewhere waits for claims of other runs only.
        cut: whether it gives anything back.
    """

    def __init__(
        self, lane: Lane, work: Work, shared: Shared, *, patience: float = PATIENCE, cut: bool = True
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
        shared.left.wake(self._changed)
        self._patience = patience
        self._cut = cut
        self._began = time.monotonic()
        self._longest = 0.0

    def results(self) -> list[Done | None]:
        """Return a row for each item, in order; None for one that is left, or given back to be tried again."""
        lane = self._lane
        # of a lane elsewhere more than it has places; in this process, other lanes are at work meanwhile
        side_by_side = min(len(lane.items), workers(lane.width) if lane.elsewhere else lane.width)
        try:
            for _ in range(side_by_side):
                # each in a copy of the task run's context, so that what it does is known as the task run's
                run = partial(copy_context().run, self._run)
                threading.Thread(target=run, name="ttapi-lane", daemon=True).start()
            with self._changed:
                while self._missing and not self._ended.is_set() and self._shared.left.reason is None:
                    seconds = time.monotonic() - self._began
                    if self._cut and is_over(lane, seconds, self._longest):
                        self._cut = False
                        self._missing -= self._queue.cut()
                    else:
                        self._changed.wait(self._next_look(seconds))
                if self._broken is not None:
                    raise RuntimeError(f"a worker broke down: {self._broken!r}") from self._broken
                return list(self._results)
        finally:
            self._ended.set()

    def _next_look(self, seconds: float) -> float | None:
        """Return after how many seconds a lane that has lasted so long is looked at, though no item has ended."""
        if self._lane.elsewhere:
            return _POLL
        return max(0.0, self._lane.overdue - seconds) if self._cut else None

    def _run(self) -> None:
        try:
            self._work_through()
        except BaseException as error:  # nobody hears of it in a thread: the lane would never end
            with self._changed:
                self._broken = error
                self._ended.set()
                self._changed.notify_all()

    def _work_through(self) -> None:
        patience: float | None = None
        stop = self._shared.stop
        # once the batch stops, nobody waits for claims any longer
        while (taken := self._queue.take(math.inf if stop.reason else time.monotonic())) is not None:
            if self._shared.left.reason is not None or self._ended.is_set():
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
            if not self._shared.begun(item):
                return
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


def tell_elsewhere(store: ImageStore, plan: Plan, stop: Stop) -> None:
    """Write down for lanes in other processes why nothing more is sent."""
    told = {"batch_id": plan.batch_id, "reason": stop.reason, "error_type": stop.error_type}
    try:
        store.write(stop_key(plan.folder), json.dumps(told).encode(), "application/json")
    except StoreError as error:
        logger.warning("Task runs in other processes finish what they carry: %s", error)


def _is_told(store: ImageStore, plan: Plan, shared: Shared) -> bool:
    try:
        told = json.loads(store.read(stop_key(plan.folder)) or b"{}")
    except (StoreError, ValueError):
        return False
    if told.get("batch_id") != plan.batch_id:  # nothing, or an earlier attempt's
        return False
    shared.stop.set(told["reason"], told["error_type"])
    return True


@contextmanager
def _hearing(store: ImageStore, plan: Plan, shared: Shared) -> Iterator[None]:
    """Look, until a lane elsewhere has ended, whether its batch has told it to stop."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(LOOK) and not _is_told(store, plan, shared):
            pass

    _is_told(store, plan, shared)  # a lane may begin after the stop
    threading.Thread(target=copy_context().run, args=(listen,), name="ttapi-stop", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class Results(list[Done | None]):
    """A lane's rows; Prefect writes the repr of a failed state into the log, where rows and prompts have no place."""

    def __repr__(self) -> str:
        return f"{len(self)} row(s)"


def _lane_name(parameters: dict[str, Any]) -> str:
    """Return `generate-gpt-image-2-3f9a12`, or `generate-34-requests-from-68`."""
    items = parameters["lane"].items
    first = items[0]
    if len(items) == 1:
        return f"generate-{first.request.model}-{first.request.request_hash[:6]}"
    return f"generate-{len(items)}-requests-from-{first.row}"


def _step_aside() -> None:
    """Leave the threads of a Dask worker, if this is in one, to other tasks: a lane waits more than it works."""
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        with suppress(ValueError):  # not in a worker
            distributed.secede()


# retries belong to the client: without `retries` Prefect's setting for all tasks would count
@task(
    name="generate-lane",
    # its protocol has more than what Prefect calls
    task_run_name=cast(TaskRunNameCallbackWithParameters, _lane_name),
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=0,
)
def generate_lane(
    lane: Lane, credentials: TTAPICredentials, store: ImageStore, plan: Plan
) -> list[Done | None] | State[Results]:
    """Generate and deliver each item of a lane; return a row for each, in order.

    None stands for an item that nobody waits for any longer, or one that another run is still paying for. A lane of
    one request that fails is a failed task run, whose state has the row all the same.
    """
    task_ctx = TaskRunContext.get()
    shared = _shared_for(lane, plan)
    if shared is None:
        return [None] * len(lane.items)  # nothing more is sent, and their rows are written
    run = replace(plan.run, task_run_id=str(task_ctx.task_run.id) if task_ctx else None)
    ledger = ledger_for(credentials, store, run.run_id, get_run_logger())
    engine = Engine(shared_client(credentials), store, ledger, run, shared.limits, plan.not_before)
    delivery = plan.options.delivery(run.date, run.flow_run_id, store)
    work = Work(engine, plan.options, delivery)
    patience, cut = store.claim_ttl + PATIENCE, plan.options.shard_size is None
    lane_run = LaneRun(lane, work, shared, patience=patience, cut=cut)
    if lane.elsewhere:
        _step_aside()
        with _hearing(store, plan, shared):
            results = lane_run.results()
    else:
        results = lane_run.results()
    only = results[0] if len(results) == 1 else None
    if only is not None and only.row.status == "failed":
        row = plan.options.shown.row(only.row)
        return Failed(message=f"{row.error_type}: {row.error}", data=Results(results))
    return results
