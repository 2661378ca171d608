"""Keeps a batch going: shards are submitted as room comes up, and each request's row is handed on as it comes."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from traceback import format_exception_only
from typing import Any, Final

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from prefect_ttapi.batch.items import Done, Item, lost, perhaps_under_way, row_of, skipped
from prefect_ttapi.batch.notes import remove_note, write_note
from prefect_ttapi.batch.runners import task_runner
from prefect_ttapi.batch.session import Session, Stop
from prefect_ttapi.batch.shape import Shape
from prefect_ttapi.batch.shards import Plan, generate_shard
from prefect_ttapi.batch.source import Came, Ended, Source
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.budget import Budget
from prefect_ttapi.generation.interruption import undisturbed
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds for writing down rows when nobody waits any longer.
_LAST_ROWS: Final = 2.0

#: Seconds for which a shard waits for a slow source to fill it.
_FILLING: Final = 0.5


@dataclass(frozen=True)
class _Back:
    """One item came back."""

    item: Item
    done: Done


class _Told(Enum):
    """What the loop has to hear besides."""

    LOOK_AGAIN = "there may be room now, or nothing to wait for"
    LEAVE = "nobody waits for what is under way any longer"


_Event = _Back | _Told | Came | Ended | PrefectFuture[Any]


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
        self._source: Source
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._shards: dict[PrefectFuture[Any], list[Item]] = {}
        self._shares: dict[PrefectFuture[Any], Budget] = {}  # what each shard may spend
        self._open: dict[int, Item] = {}  # submitted, and not back yet
        self._followers: dict[str, list[Item]] = {}  # by the hash under way that they wait for
        self._ready: deque[Item] = deque()  # to be looked at before what the source gives
        self._came: deque[Item | Done] = deque()  # from the source
        self._ended: Ended | None = None  # the source
        self._filling: list[Item] = []  # taken, and not submitted yet
        self._filled_at = 0.0  # when they are submitted, though they are few
        self._submitted = 0
        self._noted = False
        self._signal: BaseException | None = None  # of a task run's future
        self._leave_at: float | None = None
        self._at_the_end = threading.Event()

    def returned(self, item: Item, done: Done) -> None:
        """One item came back; from any thread."""
        self._events.put(_Back(item, done))

    def waits(self) -> None:
        """One item began to wait for somebody else's claim, so that there may be room; from any thread."""
        self._events.put(_Told.LOOK_AGAIN)

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
        self._source = Source(items, self._events.put, lambda: stop.cancelled and not bounded)

        def interrupted(interruption: BaseException) -> None:
            stop.cancel(f"the batch was interrupted: {_what(interruption)}", type(interruption).__name__)
            logger.warning(
                "Interrupted: nothing more is sent; %d requests under way have %.0f s to be finished and recorded",
                self.in_flight(session),
                grace,
            )

        with task_runner(self._shape.slots) as runner:
            work = partial(self._to_the_end, bounded, session, runner)
            try:
                undisturbed(work, interrupted, partial(self._watch, stop, grace))
            finally:  # where a second interruption waited no longer, each item has its row all the same
                self._events.put(_Told.LEAVE)
                self._at_the_end.wait(_LAST_ROWS)

    def _watch(self, stop: Stop, grace: float) -> None:
        """See that a cancelled batch ends in time."""
        if not stop.cancelled:
            return
        if self._leave_at is None:
            self._leave_at = time.monotonic() + grace
            self._events.put(_Told.LOOK_AGAIN)
        if time.monotonic() >= self._leave_at:
            self._leave_at = math.inf
            self._events.put(_Told.LEAVE)

    def _to_the_end(self, bounded: bool, session: Session, runner: TaskRunner[Any]) -> None:
        self._source.start()
        try:
            self._loop(bounded, session, runner)
        except BaseException as broken:
            self._stop_because(broken, session)
            self._loop(bounded, session, runner)
            raise
        finally:
            if self._noted:
                remove_note(self._store, self._plan.batch_id)
            self._at_the_end.set()
        if self._ended and self._ended.error:
            raise self._ended.error
        if self._signal:
            raise self._signal

    def _loop(self, bounded: bool, session: Session, runner: TaskRunner[Any]) -> None:
        """Until there is nothing left to do or to wait for."""
        while True:
            self._note_stop(session.stop)
            while self._has_room(session) and self._fill(session):
                self._submit(runner, session)
            at_hand = self._ready or self._came or self._filling
            if not (at_hand or self._shards) and (self._ended or (session.stop.cancelled and not bounded)):
                return
            waits_for_more = self._filling and self._has_room(session)
            timeout = max(0.0, self._filled_at - time.monotonic()) if waits_for_more else None
            with suppress(queue.Empty):
                self._settle(self._events.get(timeout=timeout), session)

    def _note_stop(self, stop: Stop) -> None:
        """Shards in this process see the reason by themselves."""
        if stop.reason and self._shards and not (self._shape.local or self._noted):
            self._noted = True
            write_note(self._store, self._plan.batch_id, stop.reason, stop.error_type)

    def _has_room(self, session: Session) -> bool:
        if len(self._shards) >= self._shape.slots:
            return False
        return not self._shape.local or len(self._open) - session.waiting < self._shape.enough

    def _fill(self, session: Session) -> bool:
        """Take what the next shard can carry; whether there is something, and no reason to wait for more."""
        if session.stop.reason:
            self._put_back()
        size = self._shape.size(self._submitted)
        while len(self._filling) < size and (item := self._next_item(session)):
            if not self._filling:
                self._filled_at = time.monotonic() + _FILLING
            self._filling.append(item)
        more_may_come = not (len(self._filling) == size or self._ready or self._came or self._ended)
        return bool(self._filling) and not (more_may_come and time.monotonic() < self._filled_at)

    def _put_back(self) -> None:
        """What was taken and not submitted has become of nothing yet, nor have those that wait for it."""
        for item in self._filling:
            self._ready.extend([item, *self._followers.pop(item.request.request_hash)])
        self._filling = []

    def _next_item(self, session: Session) -> Item | None:
        """The next item to be sent, or None where there is none for now; what isn't sent is handed on as a row."""
        stop, spending = session.stop, session.spending
        while self._ready or self._came:
            item = self._ready.popleft() if self._ready else self._take()
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
        return None

    def _take(self) -> Item | Done:
        self._source.taken()
        return self._came.popleft()

    def _is_recorded(self, item: Item) -> bool:
        """Whether the item costs nothing; where the store doesn't say, its shard meets the store's error."""
        try:
            return self._ledger.look_up(item.request.request_hash, self._plan.not_before) is not None
        except StoreError:
            return True

    def _submit(self, runner: TaskRunner[Any], session: Session) -> None:
        shard = self._filling
        share = session.spending.share(self._shape.slots - len(self._shards), self._shares.values())
        parameters = {
            "items": shard,
            "credentials": self._credentials,
            "store": self._store,
            "plan": self._plan,
            "share": share,
        }
        future = runner.submit(generate_shard, parameters)
        self._filling = []
        self._submitted += 1
        self._open.update((item.row, item) for item in shard)
        self._shards[future] = shard
        self._shares[future] = share
        future.add_done_callback(self._events.put)

    def _settle(self, event: _Event, session: Session) -> None:
        match event:
            case _Back(item, done):
                self._end(item, done)
            case Came(item):
                self._came.append(item)
            case Ended(error):
                self._ended = event
                if error:
                    self._stop_because(error, session)
            case _Told.LOOK_AGAIN:
                pass
            case _Told.LEAVE:
                self._leave(session)
            case future if future in self._shards:
                self._close_shard(future, session)

    def _stop_because(self, broken: BaseException, session: Session) -> None:
        session.stop.because(f"the batch was interrupted: {_what(broken)}", type(broken).__name__)

    def _close_shard(self, future: PrefectFuture[Any], session: Session) -> None:
        try:
            result = future.result(raise_on_failure=False)
        except Exception as error:  # its process died
            result = error
        except BaseException as signal:  # the run is suspended, or its process was interrupted
            self._stop_because(signal, session)
            self._signal = self._signal or signal
            result = [None] * len(self._shards[future])
        shard = self._shards.pop(future)
        del self._shares[future]
        counts = True
        if is_lost := isinstance(result, State | Exception):
            why = str(result.message if isinstance(result, State) else result)
            result = [lost(item, self._ledger.api_origin, why) for item in shard]
        for item, done in zip(shard, result, strict=True):
            if item.row not in self._open:
                continue  # handed on before
            if done is None:
                self._end(item, self._left(item, session, session.under_way()))
            elif self._is_left_over(item, done, session):
                session.spending.settle(item.request, 0, None)
                del self._open[item.row]
                self._ready.extend([item, *self._followers.pop(item.request.request_hash)])
            else:
                session.account(item, done, counts=counts)
                counts = not is_lost  # a task run that breaks down is one failure
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
            self._on_done(Done(leader.row.again(row.row, values=row.values)))

    def _leave(self, session: Session) -> None:
        """Write down what is known of the items that nobody waits for any longer."""
        under_way = session.under_way()  # looked at first: what ends meanwhile has told its outcome
        with suppress(queue.Empty):
            while True:
                self._settle(self._events.get_nowait(), session)
        for item in list(self._open.values()):
            self._end(item, self._left(item, session, under_way))
        self._note_stop(session.stop)
        self._shards.clear()
        self._shares.clear()
        self._noted = False  # the note stays, for shards elsewhere to find
        session.close()

    def _left(self, item: Item, session: Session, under_way: frozenset[int]) -> Done:
        stop = session.stop
        if self._shape.local and item.row not in under_way:
            return skipped(item, self._ledger.api_origin, stop.reason, stop.error_type)
        return perhaps_under_way(item, self._ledger.api_origin, stop.error_type)


def _what(error: BaseException) -> str:
    return format_exception_only(error)[-1].strip()
