"""Workers that the shards of a batch share: no Prefect run is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from prefect_ttapi.batch.breaker import Breaker
from prefect_ttapi.batch.items import Done, Item, row_of
from prefect_ttapi.batch.notes import NotedStop, remove_note, write_note
from prefect_ttapi.batch.session import Session, session_for, shared
from prefect_ttapi.batch.shards import Plan
from prefect_ttapi.batch.shards import _own_session as own_session
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import Usage
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.store import ImageStore


def item(number: int) -> Item:
    return Item(number, ImageRequest(prompt=f"tree {number}", model="gpt-image-1"))


def finished(item: Item, error_type: str | None = None) -> Done:
    status = "failed" if error_type else "generated"
    return Done(
        row_of(item, "sandbox").model_copy(update={"status": status, "error_type": error_type}), (), 1
    )


def session(in_flight: int, budget: Budget | None = None, **options: object) -> Session:
    return Session(in_flight, Spending(budget), breaker=Breaker(3), **options)


def in_threads(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def test_one_slow_request_holds_up_no_other():
    """While one request of a shard is slow, the other workers do all the rest, of that shard and of the next."""
    rest = threading.Semaphore(0)

    def work(item: Item, *_: object) -> Done:
        if item.row == 0:
            for _other in range(11):
                assert rest.acquire(timeout=30)
        else:
            rest.release()
        return finished(item)

    with shared(session(2), "batch") as one:
        first, second = [item(n) for n in range(6)], [item(n) for n in range(6, 12)]
        outcomes = in_threads(lambda: one.run(first, work), lambda: one.run(second, work))
    assert [done.row.row for shard in outcomes for done in shard] == list(range(12))


def test_who_waits_for_another_takes_no_place_in_flight(store: ImageStore):
    """With one worker, a request that waits for somebody else's claim lets those behind it pass, and comes back."""
    theirs = Ledger(store, "sandbox", "theirs")
    claimed = item(0)
    waits: list[int] = []
    claim = theirs.acquire(claimed.request.request_hash)
    ours = Ledger(store, "sandbox", "ours")
    passed: list[int] = []

    def work(item: Item, waiting: Waiting | None, _: object) -> Done | Waiting:
        if item.row == 0:
            found = ours.try_acquire(item.request.request_hash, waiting=waiting)
            if isinstance(found, Waiting):
                return found
            found.release()
        passed.append(item.row)
        if len(passed) == 4:
            claim.release()
        return finished(item)

    with shared(session(1, on_waiting=lambda: waits.append(one.waiting)), "batch") as one:
        one.run([item(n) for n in range(5)], work)
    assert passed == [1, 2, 3, 4, 0]
    assert set(waits) == {1}
    assert one.waiting == 0


def test_nobody_waits_for_what_is_under_way_when_a_batch_is_left():
    """A shard ends as soon as its session is closed, whatever its workers still wait for."""
    answer = threading.Event()
    one = session(1)

    def work(item: Item, *_: object) -> Done:
        one.close()
        assert answer.wait(30)
        return finished(item)

    assert one.run([item(0), item(1)], work) == [None, None]
    assert one.under_way() == {0}
    answer.set()


def test_failures_in_a_row_stop_the_rest_and_are_counted_as_they_end():
    """The third failure of one kind in a row is the reason to stop; successes in between begin the count anew."""
    kinds = ["ServerError", "ServerError", None, "ServerError", "ServerError", "ServerError"]
    one = session(1)
    one.run([item(n) for n in range(5)], lambda item, *_: finished(item, kinds[item.row]))
    assert one.stop.reason is None
    one.run([item(5)], lambda item, *_: finished(item, kinds[item.row]))
    one.close()
    assert one.stop.reason.startswith("not sent, because 3 requests in a row failed with ServerError")


def test_spending_is_settled_as_each_request_ends():
    """Tokens and images are counted when a request comes back, and a limit that is passed says by how much."""
    usage = Usage(input_tokens=10, output_tokens=90, total_tokens=100)
    one = session(1, Budget(tokens=150, images=4))

    def work(item: Item, *_: object) -> Done:
        assert one.spending.denial(0) is None
        done = finished(item)
        return Done(done.row.model_copy(update={"usage": usage}), (), 1)

    one.spending.reserve(2)
    one.run([item(0), item(1)], work)
    one.close()
    assert (one.spending.images, one.spending.reserved, one.spending.tokens) == (2, 0, 200)
    assert one.spending.denial(0) == "200 tokens were used, the limit is 150"
    assert one.spending.overshoot() == (
        "50 tokens over the limit of 150, by what was under way when it was reached",
    )


def test_a_shard_elsewhere_has_workers_of_its_own():
    """A batch's session is for its own shards in this process; any other shard makes one, and closes it."""
    with shared(session(1), "batch") as one:
        with session_for("batch", lambda: session(1)) as here:
            assert here is one
        with session_for("another", lambda: session(1)) as elsewhere:
            assert elsewhere is not one
            assert [done.row.row for done in elsewhere.run([item(7)], lambda item, *_: finished(item))] == [7]
    assert one.run([item(0)], lambda item, *_: finished(item)) == [None]


def test_a_note_in_the_store_stops_shards_elsewhere(store: ImageStore):
    """A shard in another process hears of a stop by a note, looks for it now and then, and keeps its own reason."""
    stop = NotedStop(store, "batch")
    assert stop.reason is None
    write_note(store, "batch", "not sent, because the batch was cancelled", "CancelledError")
    assert stop.reason is None  # it has just looked
    noted = NotedStop(store, "batch")
    assert (noted.reason, noted.error_type) == ("not sent, because the batch was cancelled", "CancelledError")
    remove_note(store, "batch")
    later = NotedStop(store, "batch")
    later.because("of a reason of its own", "ValueError")
    assert later.reason == "not sent, because of a reason of its own"


def test_each_further_task_run_elsewhere_keeps_the_rate(store: ImageStore):
    """A shard in a process of its own waits for its share of the minute before its first send, too."""
    plan = Plan("batch", "run", "campaign", datetime.now(UTC), rate_limit=1.0)
    stop = Stop()
    stop.set("enough waited")
    with session_for("elsewhere", lambda: own_session(plan, store, Budget())) as one:
        assert one.rate
        with pytest.raises(StopSending):  # it would have waited for a minute
            one.rate.wait(stop)
