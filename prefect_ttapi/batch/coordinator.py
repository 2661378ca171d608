"""Keeps a batch going: shards are submitted as others end, and each request's row is handed on as it comes."""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from prefect_ttapi.batch.budget import Spending
from prefect_ttapi.batch.shards import Done, Item, Plan, Stop, generate_shard, recorded, row_of, stop_of
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.storage.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)


class Coordinator:
    """Runs the items of a batch, `slots` shards of `shard_size` requests at a time. Used by one thread.

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

    def run(self, items: Iterator[Item | Row], *, bounded: bool) -> None:
        """Every item to its row. On an interruption what is under way is finished, and nothing more is sent.

        Args:
            bounded: `items` come to an end, so that after an interruption the rest can be listed as skipped.
        """
        with stop_of(self._plan.batch_id) as stop:
            try:
                self._loop(items, stop)
            except BaseException as interruption:
                stop.because(interruption)
                logger.warning(
                    "Interrupted; finishing %d request(s) under way", sum(map(len, self._open.values()))
                )
                while self._open:
                    self._settle(self._returned.get())
                if bounded:
                    self._loop(items, stop)
                raise

    def _loop(self, items: Iterator[Item | Row], stop: Stop) -> None:
        while True:
            while len(self._open) < self._slots and (shard := self._next_shard(items, stop)):
                self._submit(shard)
            if not self._open:
                return
            self._settle(self._returned.get())

    def _next_shard(self, items: Iterator[Item | Row], stop: Stop) -> list[Item]:
        shard: list[Item] = []
        while len(shard) < self._shard_size and (item := self._next_item(items, stop)):
            shard.append(item)
        return shard

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
            elif recorded(self._ledger, request_hash, self._plan.not_before):
                self._followers[request_hash] = []
                return replace(item, may_pay=False)
            else:
                self._skip(item, denial, "BudgetExceeded")

    def _skip(self, item: Item, reason: str, error_type: str | None) -> None:
        row = row_of(item, self._ledger.api_origin)
        self._on_done(Done(row.model_copy(update={"error": reason, "error_type": error_type})))

    def _submit(self, shard: list[Item]) -> None:
        future = generate_shard.submit(shard, self._credentials, self._store, self._plan)
        self._open[future] = shard
        future.add_done_callback(self._returned.put)

    def _settle(self, future: PrefectFuture[Any]) -> None:
        shard = self._open.pop(future)
        result = future.result(raise_on_failure=False)
        dones = (
            _lost(shard, result, self._ledger.api_origin) if isinstance(result, State | Exception) else result
        )
        for item, done in zip(shard, dones, strict=True):
            if item.may_pay:
                self._spending.settle(item.request, done.images_paid, done.row.usage)
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


def _lost(shard: list[Item], result: object, api_origin: str) -> list[Done]:
    """The rows of a shard whose task run broke down, so that what became of its requests is not known."""
    message = result.message if isinstance(result, State) else str(result)
    update = {"status": "failed", "error": f"its task run broke down: {message}", "error_type": "ShardLost"}
    return [
        Done(row_of(item, api_origin).model_copy(update=update), images_paid=item.request.n) for item in shard
    ]
