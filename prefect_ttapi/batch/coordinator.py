"""Keeps a batch going: shards are submitted as room comes up, and each request's row is handed on as it comes."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from traceback import format_exception_only
from typing import Any, Final

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prefect_ttapi.batch.items import Done, Item, row_of, skipped
from prefect_ttapi.batch.session import Session, Stop
from prefect_ttapi.batch.shape import Shape
from prefect_ttapi.batch.shards import Plan, generate_shard
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.threads import undisturbed

logger = logging.getLogger(__name__)

#: Seconds for which a shard waits for a slow source to fill it.
_FILLING: Final = 0.5


@dataclass(frozen=True)
class _Ended:
    """One item came back."""

    item: Item
    done: Done


class _Left:
    """Nobody waits for what is under way any longer."""


class Coordinator:
    """Runs the items of a batch in shards, so that the session's workers never lack work.

    A request that stands in the batch more than once is sent once: the later ones wait until the first is back and
    have then its images, or fail with it.
    """

    def __init__(
        self,
        credentials: TTAPICredentials,
        store: ImageStore,
        ledger: Ledger,
        plan: Plan,
        shape: Shape,
    ) -> None:
        self._credentials = credentials
        self._store = store
        self._ledger = ledger
        self._plan = plan
        self._shape = shape
        self._on_done: Callable[[Done], None]
        self._events: queue.SimpleQueue[_Ended | _Left | PrefectFuture[Any]] = queue.SimpleQueue()
        self._shards: dict[PrefectFuture[Any], list[Item]] = {}
        self._open: dict[int, Item] = {}  # submitted, and not back yet
        self._followers: dict[str, list[Item]] = {}  # by the hash under way that they wait for
        self._ready: deque[Item] = deque()  # to be looked at before the source
        self._filling: list[Item] = []  # taken, and not submitted yet
        self._submitted = 0
        self._leave_at: float | None = None

    def returned(self, item: Item, done: Done) -> None:
        """One item came back; from any thread."""
        self._events.put(_Ended(item, done))

    def in_flight(self, session: Session) -> int:
        """How many requests are under way; an estimate where shards run in other processes."""
        elsewhere = min(len(self._open), self._shape.in_flight * len(self._shards))
        return session.in_flight() if self._shape.local else elsewhere

    def run(
        self,
        items: Iterator[Item | Done],
        session: Session,
        on_done: Callable[[Done], None],
        *,
        bounded: bool,
        grace: float,
    ) -> None:
        """Every item to its row. On an interruption what is under way is finished, and nothing more is sent.

        Args:
            on_done: is given each row, in a thread of the batch.
            bounded: `items` come to an end, so that after an interruption the rest can be listed as skipped.
            grace: seconds for which an interruption waits for what is under way.
        """
        self._on_done = on_done
        stop = session.stop
        source = items if bounded else takewhile(lambda _: not stop.cancelled, items)

        def interrupted(interruption: BaseException) -> None:
            stop.cancel(f"the batch was interrupted: {_what(interruption)}", type(interruption).__name__)
            logger.warning(
                "Interrupted: nothing more is sent; %d requests under way have %.0f s to be finished and recorded",
                self.in_flight(session),
                grace,
            )

        with _task_runner(self._shape.slots) as runner:
            work = partial(self._to_the_end, source, bounded, session, runner)
            undisturbed(work, interrupted, partial(self._watch, stop, grace))

    def _watch(self, stop: Stop, grace: float) -> None:
        """See that a cancelled batch ends in time."""
        if not stop.cancelled:
            return
        self._leave_at = self._leave_at or time.monotonic() + grace
        if time.monotonic() >= self._leave_at:
            self._leave_at = math.inf
            self._events.put(_Left())

    def _to_the_end(
        self, source: Iterator[Item | Done], bounded: bool, session: Session, runner: TaskRunner[Any]
    ) -> None:
        try:
            self._loop(source, session, runner)
        except BaseException as broken:
            session.stop.because(f"the batch was interrupted: {_what(broken)}", type(broken).__name__)
            while self._shards:
                self._settle(self._events.get(), session)
            self._put_back()
            self._loop(source if bounded else iter(()), session, runner)
            raise

    def _loop(self, items: Iterator[Item | Done], session: Session, runner: TaskRunner[Any]) -> None:
        while True:
            while self._has_room() and self._fill(items, session):
                self._submit(runner, session)
            if not self._shards:
                return
            self._settle(self._events.get(), session)

    def _has_room(self) -> bool:
        if self._shape.local:
            return len(self._open) < self._shape.enough
        return len(self._shards) < self._shape.slots

    def _fill(self, items: Iterator[Item | Done], session: Session) -> bool:
        size = self._shape.size(self._submitted)
        began = time.monotonic()
        while len(self._filling) < size and (item := self._next_item(items, session)):
            self._filling.append(item)
            if time.monotonic() - began > _FILLING:
                break
        return bool(self._filling)

    def _put_back(self) -> None:
        """What was taken and not submitted has become of nothing yet, nor have those that wait for it."""
        for item in self._filling:
            self._ready.extend([item, *self._followers.pop(item.request.request_hash)])
        self._filling = []

    def _next_item(self, items: Iterator[Item | Done], session: Session) -> Item | None:
        """The next item to be sent, or None where there is none for now; what isn't sent is handed on as a row."""
        stop, spending = session.stop, session.spending
        while True:
            item = self._ready.popleft() if self._ready else next(items, None)
            if item is None:
                return None
            if isinstance(item, Done):
                self._on_done(item)
            elif stop.reason:
                self._on_done(skipped(item, self._ledger.api_origin, stop.reason, stop.error_type))
            elif (request_hash := item.request.request_hash) in self._followers:
                self._followers[request_hash].append(item)
            elif (denial := spending.denial(item.request.n)) is None:
                spending.reserve(item.request.n)
                self._followers[request_hash] = []
                return item
            elif spending.reserved:  # what is under way may turn out to be free
                self._ready.appendleft(item)
                return None
            elif not item.known_absent and self._is_recorded(item):
                self._followers[request_hash] = []
                return replace(item, may_pay=False)
            else:
                self._on_done(skipped(item, self._ledger.api_origin, denial, "BudgetExceeded"))

    def _is_recorded(self, item: Item) -> bool:
        """Whether the item costs nothing; where the store doesn't say, its shard meets the store's error."""
        try:
            return self._ledger.look_up(item.request.request_hash, self._plan.not_before) is not None
        except StoreError:
            return True

    def _submit(self, runner: TaskRunner[Any], session: Session) -> None:
        shard = self._filling
        parameters = {
            "items": shard,
            "credentials": self._credentials,
            "store": self._store,
            "plan": self._plan,
            "share": session.spending.share(self._shape.slots),
        }
        # before its items can come back
        self._open.update((item.row, item) for item in shard)
        self._filling = []
        self._submitted += 1
        future = runner.submit(generate_shard, parameters)
        self._shards[future] = shard
        future.add_done_callback(self._events.put)

    def _settle(self, event: _Ended | _Left | PrefectFuture[Any], session: Session) -> None:
        match event:
            case _Ended(item, done):
                self._end(item, done)
            case _Left():
                self._leave(session)
            case future if future in self._shards:
                self._close_shard(future, session)

    def _close_shard(self, future: PrefectFuture[Any], session: Session) -> None:
        try:
            result = future.result(raise_on_failure=False)
        except Exception as error:  # its process died
            result = error
        shard = self._shards.pop(future)
        if isinstance(result, State | Exception):
            result = [_lost(item, result, self._ledger.api_origin) for item in shard]
        for item, done in zip(shard, result, strict=True):
            if done is None or item.row not in self._open:
                continue  # handed on before
            if self._is_left_over(item, done, session):
                session.spending.settle(item.request, 0, None)
                del self._open[item.row]
                self._ready.extend([item, *self._followers.pop(item.request.request_hash)])
            else:
                session.account(item, done)
                self._end(item, done)

    def _is_left_over(self, item: Item, done: Done, session: Session) -> bool:
        """Whether only the share of its shard was used up, and the batch has something left for the item."""
        return (
            done.row.error_type == "BudgetExceeded"
            and item.may_pay
            and session.stop.reason is None
            and session.spending.denial(0) is None
        )

    def _end(self, item: Item, done: Done) -> None:
        if self._open.pop(item.row, None) is None:
            return  # its row was written when the batch was left
        self._on_done(done)
        for follower in self._followers.pop(item.request.request_hash):
            self._follow(follower, done)

    def _follow(self, follower: Item, leader: Done) -> None:
        """A duplicate has its leader's images, and copies of its own; where the leader has none it has none either."""
        row = row_of(follower, self._ledger.api_origin)
        if not leader.row.images:
            outcome = leader.row.model_dump(include={"status", "error", "error_type"})
            self._on_done(Done(row.model_copy(update=outcome)))
        elif self._plan.deliver_to is not None:
            self._ready.append(replace(follower, known_absent=False))
        else:
            again = {"row": row.row, "values": row.values, "status": "cached", "api_calls": 0, "seconds": 0.0}
            self._on_done(Done(leader.row.model_copy(update=again)))

    def _leave(self, session: Session) -> None:
        """Write down what is known of the items that nobody waits for any longer."""
        stop, under_way = session.stop, session.under_way()
        for item in list(self._open.values()):
            done = skipped(item, self._ledger.api_origin, stop.reason, stop.error_type)
            if not self._shape.local or item.row in under_way:
                error = "it was under way when the batch ended: if it is answered yet, the ledger will know"
                what = {"status": "failed", "error": error, "maybe_paid": (error,)}
                done = Done(done.row.model_copy(update=what))
            self._end(item, done)
        self._shards.clear()


def _what(error: BaseException) -> str:
    return format_exception_only(error)[-1].strip()


@contextmanager
def _task_runner(slots: int) -> Iterator[TaskRunner[Any]]:
    """The flow's; inside a task threads of its own, because tasks that wait for others in one pool may fill it."""
    runner = flow_task_runner()
    if runner is not None:
        yield runner
    else:
        own: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=slots)
        with own:
            yield own


def flow_task_runner() -> TaskRunner[Any] | None:
    """The task runner of the flow that this is called in; None inside a task."""
    flow_run = FlowRunContext.get()
    return flow_run.task_runner if flow_run and TaskRunContext.get() is None else None


def _lost(item: Item, result: object, api_origin: str) -> Done:
    """The row of a request whose task run broke down, so that what became of it is not known."""
    message = result.message if isinstance(result, State) else str(result)
    error = f"its task run broke down: {message}"
    update = {"status": "failed", "error": error, "error_type": "ShardLost", "maybe_paid": (error,)}
    return Done(row_of(item, api_origin).model_copy(update=update), images_paid=item.request.n)
