"""Keeps a batch going: shards are submitted as others end, and each request's row is handed on as it comes."""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from traceback import format_exception_only
from typing import Any, Final

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prefect_ttapi.batch.budget import Spending
from prefect_ttapi.batch.shards import Done, Item, Plan, Stop, generate_shard, row_of, stop_of
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import ACCOUNT_ERRORS, StoreError
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.storage.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.threads import undisturbed

logger = logging.getLogger(__name__)

_STOPPING: Final = frozenset(kind.__name__ for kind in ACCOUNT_ERRORS)


class Coordinator:
    """Runs the items of a batch, `slots` shards of `shard_size` requests at a time. It works in a thread of its own.

    A request that stands in the batch more than once is sent once: the later ones wait until the first is back and
    then find it in the ledger, or fail with it.
    """

    def __init__(
        self,
        credentials: TTAPICredentials,
        store: ImageStore,
        ledger: Ledger,
        plan: Plan,
        spending: Spending,
        *,
        slots: int,
        shard_size: int,
        on_done: Callable[[Done], None],
    ) -> None:
        self._credentials = credentials
        self._store = store
        self._ledger = ledger
        self._plan = plan
        self._spending = spending
        self._slots = slots
        self._shard_size = shard_size
        self._on_done = on_done
        self._returned: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
        self._open: dict[PrefectFuture[Any], list[Item]] = {}
        self._followers: dict[str, list[Item]] = {}  # by the hash under way that they wait for
        self._ready: deque[Item] = deque()  # to be looked at before the source
        self._shard: list[Item] = []  # taken, and not submitted yet

    def run(self, items: Iterator[Item | Row], *, bounded: bool) -> None:
        """Every item to its row. On an interruption what is under way is finished, and nothing more is sent.

        Args:
            bounded: `items` come to an end, so that after an interruption the rest can be listed as skipped.
        """
        with stop_of(self._plan.batch_id) as stop, _task_runner(self._slots) as runner:
            source = items if bounded else takewhile(lambda _: not stop.cancelled, items)

            def interrupted(interruption: BaseException) -> None:
                stop.cancel(f"the batch was interrupted: {_what(interruption)}", type(interruption).__name__)
                logger.warning("Interrupted; finishing what is under way")

            undisturbed(partial(self._to_the_end, source, bounded, stop, runner), interrupted)

    def _to_the_end(
        self, source: Iterator[Item | Row], bounded: bool, stop: Stop, runner: TaskRunner[Any]
    ) -> None:
        try:
            self._loop(source, stop, runner)
        except BaseException as broken:
            stop.because(f"the batch was interrupted: {_what(broken)}", type(broken).__name__)
            while self._open:
                self._settle(next(iter(self._open)), stop)
            self._put_back()
            self._loop(source if bounded else iter(()), stop, runner)
            raise

    def _loop(self, items: Iterator[Item | Row], stop: Stop, runner: TaskRunner[Any]) -> None:
        while True:
            while len(self._open) < self._slots and self._fill_shard(items, stop):
                self._submit(runner)
            if not self._open:
                return
            self._settle(self._returned.get(), stop)

    def _fill_shard(self, items: Iterator[Item | Row], stop: Stop) -> bool:
        while len(self._shard) < self._shard_size and (item := self._next_item(items, stop)):
            self._shard.append(item)
        return bool(self._shard)

    def _put_back(self) -> None:
        """What was taken and not submitted has become of nothing yet, nor have those that wait for it."""
        for item in self._shard:
            self._ready.extend([item, *self._followers.pop(item.request.request_hash)])
        self._shard = []

    def _next_item(self, items: Iterator[Item | Row], stop: Stop) -> Item | None:
        """The next item to be sent, or None where there is none for now; what isn't sent is handed on as a row."""
        while True:
            item = self._ready.popleft() if self._ready else next(items, None)
            if item is None:
                return None
            if isinstance(item, Row):
                self._on_done(Done(item))
            elif stop.reason:
                self._skip(item, stop.reason, stop.error_type)
            elif (request_hash := item.request.request_hash) in self._followers:
                self._followers[request_hash].append(item)
            elif (denial := self._spending.denial(item.request.n)) is None:
                self._spending.reserve(item.request.n)
                self._followers[request_hash] = []
                return item
            elif self._spending.reserved:  # what is under way may turn out to be free
                self._ready.appendleft(item)
                return None
            elif self._is_recorded(item):
                self._followers[request_hash] = []
                return replace(item, may_pay=False)
            else:
                self._skip(item, denial, "BudgetExceeded")

    def _is_recorded(self, item: Item) -> bool:
        """Whether the item costs nothing; where the store doesn't say, its shard meets the store's error."""
        try:
            return self._ledger.look_up(item.request.request_hash, self._plan.not_before) is not None
        except StoreError:
            return True

    def _skip(self, item: Item, reason: str, error_type: str | None) -> None:
        row = row_of(item, self._ledger.api_origin)
        self._on_done(Done(row.model_copy(update={"error": reason, "error_type": error_type})))

    def _submit(self, runner: TaskRunner[Any]) -> None:
        parameters = {
            "items": self._shard,
            "credentials": self._credentials,
            "store": self._store,
            "plan": self._plan,
        }
        future = runner.submit(generate_shard, parameters)
        self._open[future], self._shard = self._shard, []
        future.add_done_callback(self._returned.put)

    def _settle(self, future: PrefectFuture[Any], stop: Stop) -> None:
        try:
            result = future.result(raise_on_failure=False)
        except Exception as error:  # its process died
            result = error
        shard = self._open.pop(future)
        dones = (
            _lost(shard, result, self._ledger.api_origin) if isinstance(result, State | Exception) else result
        )
        for item, done in zip(shard, dones, strict=True):
            if item.may_pay:
                self._spending.settle(item.request, done.images_paid, done.row.usage)
            if done.row.status == "failed" and done.row.error_type in _STOPPING:
                # shards in other processes have a `Stop` of their own
                stop.because(f"an earlier request failed: {done.row.error}", done.row.error_type)
            self._on_done(done)
            for follower in self._followers.pop(item.request.request_hash):
                self._follow(follower, done)

    def _follow(self, follower: Item, leader: Done) -> None:
        """After its leader a duplicate is found in the ledger; where the leader has no images it has none either."""
        if leader.row.images:
            self._ready.append(follower)
        else:
            outcome = leader.row.model_dump(include={"status", "error", "error_type"})
            self._on_done(Done(row_of(follower, self._ledger.api_origin).model_copy(update=outcome)))


def _what(error: BaseException) -> str:
    return format_exception_only(error)[-1].strip()


@contextmanager
def _task_runner(slots: int) -> Iterator[TaskRunner[Any]]:
    """The flow's; inside a task threads of its own, because tasks that wait for others in one pool may fill it."""
    flow_run = FlowRunContext.get()
    if flow_run and TaskRunContext.get() is None:
        yield flow_run.task_runner
    else:
        own: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=slots)
        with own:
            yield own


def _lost(shard: list[Item], result: object, api_origin: str) -> list[Done]:
    """The rows of a shard whose task run broke down, so that what became of its requests is not known."""
    message = result.message if isinstance(result, State) else str(result)
    error = f"its task run broke down: {message}"
    update = {"status": "failed", "error": error, "error_type": "ShardLost", "maybe_paid": (error,)}
    return [
        Done(row_of(item, api_origin).model_copy(update=update), images_paid=item.request.n) for item in shard
    ]
