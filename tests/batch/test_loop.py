"""A batch at work: what it is given to do, and what task runs leave that break down. No Prefect run is needed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from prefect_ttapi.batch.dispatch import Dispatch
from prefect_ttapi.batch.items import Done, Item, skipped
from prefect_ttapi.batch.lanes import Lane, Shared
from prefect_ttapi.batch.loop import Came, Ended, Running, Source
from prefect_ttapi.batch.options import BatchOptions, Breaker, Plan, Sizing
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import run_of
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

Events = queue.SimpleQueue[Came | Ended]


def items(given: list[int], blocked: threading.Event | None = None) -> Iterator[Item]:
    for number in range(1_000_000):
        if blocked and number == 3:
            blocked.wait()
        given.append(number)
        yield Item(number, ImageRequest(prompt="a tree"))


def test_a_source_that_hangs_has_told_all_it_gave():
    """What came before a source hangs is at hand, though nobody asked for more than that."""
    events: Events = queue.SimpleQueue()
    blocked, stop = threading.Event(), Stop()
    Source(items([], blocked), events, stop, bounded=False).start()
    assert [events.get(timeout=30).item.row for _ in range(3)] == [0, 1, 2]
    stop.cancel("enough")
    blocked.set()
    assert events.get(timeout=30).item.row == 3  # it was being read
    assert events.get(timeout=30) == Ended()


@pytest.mark.parametrize("bounded", [False, True])
def test_an_endless_source_is_read_only_as_far_as_its_items_are_taken(bounded: bool):
    """Nothing is read for which there is no room; and nothing once the batch is cancelled, unless it has an end."""
    events: Events = queue.SimpleQueue()
    given: list[int] = []
    stop = Stop()
    source = Source(items(given), events, stop, bounded=bounded)
    source.start()
    for _ in range(100):
        events.get(timeout=30)
        source.told()
        source.taken(0)
    assert 100 <= len(given) < 150
    stop.cancel("enough")
    after = 0
    while after < 100 and isinstance(events.get(timeout=30), Came):
        after += 1
        source.told()
        source.taken(0)
    assert (after == 100) == bounded


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()])
def test_what_breaks_a_source_is_told(error: BaseException):
    """A source's error is its end."""

    def broken() -> Iterator[Item]:
        yield from ()
        raise error

    events: Events = queue.SimpleQueue()
    Source(broken(), events, Stop(), bounded=True).start()
    assert events.get(timeout=30) == Ended(error)


class Dying:
    """An engine whose task runs all break down."""

    def submit(self, _: Lane) -> Future[None]:
        future: Future[None] = Future()
        future.set_exception(RuntimeError("the cluster is gone"))
        return future


class Rows(list[Done]):
    """Rows as they come."""

    add = list.append


def rows_of_lost(store: ImageStore, stop: Stop, count: int = 12) -> Rows:
    """What becomes of requests whose task runs all break down, in other processes, three to a task run."""
    rows, options = Rows(), BatchOptions(max_in_flight=2, shard_size=3)
    plan = Plan("b", run_of(), options, folder="batches/b")
    shared = Shared(Limits(stop), Breaker(None))
    dispatch = Dispatch(Sizing.of(options, count, local=False), shared, "sandbox", options)
    asked = (Item(row, ImageRequest(prompt=f"tree {row}")) for row in range(count))
    Running(dispatch, Ledger(store, "sandbox", "run"), plan, rows, Dying()).run(asked, bounded=True)
    return rows


def test_where_cluster_and_store_are_gone_the_ledger_is_asked_once(s3_server: S3Server, new_bucket):
    """What it would say of the next lost requests is not known either: each row says that it may be paid for."""

    def refuse_ledger(method: str, path: str, headers: dict[str, str]) -> int | None:
        return 503 if "/ledger/" in path else None

    with meddling_proxy(s3_server.url, refuse_ledger) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        store = ImageStore(url=f"s3://{new_bucket()}", patience_before=0, **settings)
        rows = rows_of_lost(store, Stop())
        assert sum("/ledger/" in path for _, path in proxy.seen) == 1
        assert sorted(done.row.row for done in rows) == list(range(12))
        assert {(done.row.status, done.row.error_type) for done in rows} == {("failed", "LaneLostError")}
        assert all(done.row.maybe_paid == (done.row.error,) for done in rows)
        assert {done.images_paid for done in rows} == {1}

        stop = Stop()
        threading.Timer(0.5, stop.set, ["the account is empty"]).start()
        began = time.monotonic()
        rows = rows_of_lost(store.model_copy(update={"patience_before": 60}), stop)
        assert time.monotonic() - began < 30
    assert {done.row.status for done in rows} == {"failed", "skipped"}
    lost = [done.row for done in rows if done.row.status == "failed"]
    assert all(row.maybe_paid and "not sent" not in row.error for row in lost)


def test_lost_requests_that_were_never_sent_are_not_called_paid(store: ImageStore):
    """Where the ledger knows nothing of them, they were not sent."""
    rows = rows_of_lost(store, Stop())
    assert {done.row.maybe_paid for done in rows} == {()}
    assert all(done.row.error.startswith("not sent, as its task run broke down: ") for done in rows)


def test_what_an_endless_source_gave_has_a_row_after_a_cancellation(store: ImageStore):
    """What was read ahead when the batch was cancelled was taken from its source, and is listed as not sent."""
    cancelled, stop, given = threading.Event(), Stop(), list[int]()
    options = BatchOptions()
    sizing = Sizing.of(options, None, local=True)
    dispatch = Dispatch(sizing, Shared(Limits(stop), Breaker(None)), "sandbox", options)

    def asked() -> Iterator[Item | Done]:
        for item in items(given):
            yield item if item.row else skipped(item, "sandbox", "not this one", None)
            if item.row == 5:
                stop.cancel("not sent, because the batch was cancelled")
                cancelled.set()

    class Slow(Rows):
        def add(self, done: Done) -> None:
            self.append(done)
            assert cancelled.wait(30)

    rows, plan = Slow(), Plan("b", run_of(), options)
    Running(dispatch, Ledger(store, "sandbox", "run"), plan, rows, Dying()).run(asked(), bounded=False)
    assert [done.row.row for done in rows] == given
    assert {done.row.status for done in rows} == {"skipped"}
