"""A lane's items on their way to their rows: no Prefect run is needed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from prefect_ttapi.batch import lanes
from prefect_ttapi.batch.items import Done, Item, Work, row_of
from prefect_ttapi.batch.lanes import Lane, LaneRun, Shared, _Queue
from prefect_ttapi.batch.options import BatchOptions, Breaker
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Usage
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of
from tests.support.ledgers import acquire


def items(count: int) -> tuple[Item, ...]:
    return tuple(
        Item(number, ImageRequest(prompt=f"tree {number}", model="gpt-image-1")) for number in range(count)
    )


def finished(item: Item) -> Done:
    return Done(row_of(item, "sandbox").model_copy(update={"status": "generated", "api_calls": 1}))


class Doing:
    """What is done with each item, as a test wants it."""

    def __init__(self, do: Callable[[Item, Waiting | None], Done | Waiting]) -> None:
        self.outcome = do


def shared() -> Shared:
    return Shared(Limits(), Breaker(3))


def test_one_slow_request_holds_up_no_other():
    """While one request of a lane is slow, its other workers do all the rest."""
    rest = threading.Semaphore(0)

    def do(item: Item, _: Waiting | None) -> Done:
        if item.row == 0:
            for _other in range(5):
                assert rest.acquire(timeout=30)
        else:
            rest.release()
        return finished(item)

    results = LaneRun(Lane(items(6), width=2), Doing(do), shared()).results()
    assert [done.row.row for done in results] == list(range(6))


def test_a_narrow_lane_keeps_the_order():
    """With a width of 1, one request is done after the other."""
    order: list[int] = []

    def do(item: Item, _: Waiting | None) -> Done:
        order.append(item.row)
        return finished(item)

    LaneRun(Lane(items(20), width=1), Doing(do), shared()).results()
    assert order == list(range(20))


def test_who_waits_for_another_run_lets_others_pass(store: ImageStore):
    """A request that waits for somebody else's claim lets those behind it pass, comes back, and is idle meanwhile."""
    claim = acquire(Ledger(store, "sandbox", "theirs"), items(1)[0].request.request_hash)
    ours = Ledger(store, "sandbox", "ours")
    passed: list[int] = []
    batch = shared()

    def do(item: Item, waiting: Waiting | None) -> Done | Waiting:
        if item.row == 0:
            found = ours.try_acquire(item.request.request_hash, waiting=waiting)
            if isinstance(found, Waiting):
                if len(passed) == 4:
                    claim.release()
                return found
            found.release()
        passed.append(item.row)
        return finished(item)

    LaneRun(Lane(items(5), width=1), Doing(do), batch).results()
    assert passed == [1, 2, 3, 4, 0]
    assert batch.idle == 0


def test_a_lane_elsewhere_gives_back_what_another_run_keeps(store):
    """With nothing else to do it waits for a while, and then leaves its places to others."""
    claim = acquire(Ledger(store, "sandbox", "theirs"), items(1)[0].request.request_hash)
    ours = Ledger(store, "sandbox", "ours")

    def do(item: Item, waiting: Waiting | None) -> Done | Waiting:
        found = ours.try_acquire(item.request.request_hash, waiting=waiting) if item.row == 0 else None
        return found if isinstance(found, Waiting) else finished(item)

    lane = Lane(items(3), width=2, share=Spending(None))
    results = LaneRun(lane, Doing(do), shared(), patience=0.2).results()
    assert [done and done.row.row for done in results] == [None, 1, 2]
    claim.release()


@pytest.mark.parametrize("cut", [True, False])
def test_a_lane_elsewhere_gives_back_what_it_does_not_get_to(monkeypatch: pytest.MonkeyPatch, cut: bool):
    """After its time it ends what is under way, and begins nothing more; unless the user says how much it carries."""
    monkeypatch.setattr(lanes, "SECONDS", 0.2)

    def do(item: Item, _: Waiting | None) -> Done:
        time.sleep(0.02 if item.row else 0.1)
        return finished(item)

    lane = Lane(items(60), width=1, share=Spending(None))
    results = LaneRun(lane, Doing(do), shared(), cut=cut).results()
    done = [result is not None for result in results]
    assert done == sorted(done, reverse=True)
    # four times its longest request, and perhaps the time until that is looked at
    assert (10 < sum(done) < 60) if cut else all(done)


def test_a_lane_gives_back_what_others_could_do(monkeypatch: pytest.MonkeyPatch):
    """In this process too, a lane whose requests are slower than expected ends after twice its time."""
    monkeypatch.setattr(lanes, "_SOON", 0.2)

    def do(item: Item, _: Waiting | None) -> Done:
        time.sleep(0 if item.row < 3 else 0.5)
        return finished(item)

    batch = shared()
    results = LaneRun(Lane(items(20), width=1), Doing(do), batch).results()
    assert [done is not None for done in results] == [True] * 4 + [False] * 16
    assert list(batch.known()) == [0, 1, 2, 3]


def test_nothing_more_begins_of_a_lane_that_broke_down():
    """Its requests have rows by then, which say that they were not sent."""
    batch, lane, begun = shared(), Lane(items(3), width=1), list[int]()

    def do(item: Item, _: Waiting | None) -> Done:
        begun.append(item.row)
        assert batch.close(lane) == {0: None}
        return finished(item)

    LaneRun(lane, Doing(do), batch)._work_through()
    assert begun == [0]


def test_nobody_waits_for_what_is_under_way_when_a_batch_is_left():
    """A lane ends as soon as its batch is left, whatever its workers still wait for; it begins nothing more."""
    answer = threading.Event()
    batch = shared()
    begun: list[int] = []

    def do(item: Item, _: Waiting | None) -> Done:
        begun.append(item.row)
        batch.left.set("the batch was left")
        assert answer.wait(30)
        return finished(item)

    assert LaneRun(Lane(items(3), width=1), Doing(do), batch).results() == [None] * 3
    assert batch.known() == {0: None}
    answer.set()
    assert begun == [0]


@pytest.mark.parametrize("error", [ValueError("odd"), asyncio.CancelledError("the loop was closed")])
def test_what_nobody_foresees_costs_one_row(store: ImageStore, client, error: BaseException):
    """Whatever is raised while an item is worked on, it has a row, which says that it may be paid for."""

    class Broken(Ledger):
        def try_acquire(self, *_: object, **__: object) -> NoReturn:
            raise error

    spending = Spending(Budget(images=5))
    assert [spending.reserve(item.request) for item in items(2)] == [None, None]
    ledger = Broken(store, client.api_origin, "one")
    engine = engine_of(store, client, ledger, limits=Limits(spending=spending))
    results = LaneRun(Lane(items(2), width=2), Work(engine, BatchOptions(), None), shared()).results()
    assert [done.row.status for done in results] == ["failed", "failed"]
    assert all(done.row.maybe_paid for done in results)
    assert (spending.spent.images, spending.reserved) == (2, 0)


def test_what_a_limit_keeps_back_claims_nothing(store: ImageStore, client):
    """Where others were dearer than expected it is skipped at once, and nothing stays reserved for it."""

    class Unasked(Ledger):
        def try_acquire(self, *_: object, **__: object) -> NoReturn:
            raise AssertionError

    spending, (one, other) = Spending(Budget(tokens=100)), items(2)
    spending.learn(one.request, 1, Usage(total_tokens=40))
    assert [spending.reserve(of.request) for of in (one, other)] == [None, None]
    spending.settle(one.request, 1, Usage(total_tokens=61))
    engine = engine_of(store, client, Unasked(store, "sandbox", "one"), limits=Limits(spending=spending))
    done = Work(engine, BatchOptions(), None).outcome(other, None)
    assert isinstance(done, Done)
    assert (done.row.error_type, spending.reserved) == ("BudgetExceeded", 0)


def test_a_lane_whose_worker_breaks_down_ends():
    """Its task run fails, instead of waiting for a row that will never come."""

    def do(item: Item, _: Waiting | None) -> Done:
        raise SystemExit("no more")

    with pytest.raises(RuntimeError, match="a worker broke down: SystemExit"):
        LaneRun(Lane(items(2), width=2), Doing(do), shared()).results()


def test_who_has_nothing_left_to_do_does_not_turn_in_circles():
    """After a stop, too, workers sleep while the last request of their lane is under way."""
    turns: list[int] = []

    class Counting(Shared):
        def rest(self, more: int) -> None:
            turns.append(more)
            super().rest(more)

    batch = Counting(Limits(), Breaker(3))
    batch.stop.set("the account is empty")

    def do(item: Item, _: Waiting | None) -> Done:
        time.sleep(0.3 if item.row == 0 else 0.0)
        return finished(item)

    LaneRun(Lane(items(4), width=4), Doing(do), batch).results()
    assert len(turns) < 20


def test_a_lane_gives_nothing_back_that_it_has_begun(store: ImageStore):
    """The decision to give items back and the beginning of one exclude each other."""
    claim = acquire(Ledger(store, "sandbox", "theirs"), items(1)[0].request.request_hash)
    waiting = Ledger(store, "sandbox", "ours").try_acquire(items(1)[0].request.request_hash)
    assert isinstance(waiting, Waiting)
    queue = _Queue(items(1))
    place, item, _ = queue.take(0.0)
    assert not queue.close_if_idle()
    queue.hold(place, item, waiting, 0.0)
    assert queue.close_if_idle()
    assert queue.take(1_000.0) is None
    claim.release()


def test_prefects_setting_for_all_tasks_does_not_repeat_a_lane():
    """Retries belong to the client, and what a lane has settled must not be settled again."""
    code = "from prefect_ttapi.batch.lanes import generate_lane; print(generate_lane.retries)"
    environment = os.environ | {"PREFECT_TASKS_DEFAULT_RETRIES": "3"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "0"
