"""A batch's requests, lanes and rows, driven through every order of events: no thread, no Prefect run."""

from __future__ import annotations

import pickle
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefect_ttapi.batch.dispatch import Dispatch
from prefect_ttapi.batch.items import Done, Item, lost, row_of, skipped
from prefect_ttapi.batch.lanes import Lane, Shared
from prefect_ttapi.batch.options import BatchOptions, Breaker, Sizing
from prefect_ttapi.generation.budget import Budget, Price, Spending
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import StoredImage, Usage
from prefect_ttapi.storage.store import ImageStore
from tests.support.clocks import ending

IMAGE = StoredImage(
    uri="file:///a.png", sha256="0" * 64, size_bytes=1, media_type="image/png", width=1, height=1, index=0
)


#: Seconds of CPU time that a step takes at most.
STEP = 3.0


@pytest.fixture(autouse=True)
def _no_step_hangs() -> Iterator[None]:
    """What never ends fails."""
    with ending(STEP):
        yield


def next_lanes(dispatch: Dispatch, now: float = 0.0, most: int = 100) -> list[Lane]:
    """The lanes that are to be submitted now."""
    lanes = []
    while (lane := dispatch.next_lane(now)) is not None:
        lanes.append(lane)
        assert len(lanes) <= most, "there are more lanes than requests"
    return lanes


def item(row: int, prompt: str | None = None, *, known_absent: bool = False, size: str = "auto") -> Item:
    request = ImageRequest(prompt=prompt or f"tree {row}", model="gpt-image-1", size=size)
    return Item(row, request, known_absent=known_absent)


def generated(of: Item, images: int = 1, usage: Usage | None = None) -> Done:
    row = row_of(of, "sandbox").model_copy(
        update={"status": "generated", "images": (IMAGE,) * images, "api_calls": 1, "usage": usage}
    )
    return Done(row, images_paid=images)


def failed(of: Item, error_type: str, *, paid: int = 0) -> Done:
    row = row_of(of, "sandbox").model_copy(
        update={"status": "failed", "error": "no", "error_type": error_type, "api_calls": 1}
    )
    return Done(row, images_paid=paid)


def dispatch_of(
    total: int | None = None,
    in_flight: int = 4,
    shard_size: int | None = None,
    *,
    local: bool = True,
    budget: Budget | None = None,
    breaker: int | None = 3,
    delivers: bool = False,
) -> tuple[Dispatch, Shared]:
    shared = Shared(Limits(in_flight=in_flight, spending=Spending(budget)), Breaker(breaker))
    shop = ImageStore(url="./shop") if delivers else None
    options = BatchOptions(max_in_flight=in_flight, shard_size=shard_size, deliver_to=shop)
    return Dispatch(Sizing.of(options, total, local=local), shared, "sandbox", options), shared


def all_come(dispatch: Dispatch, total: int, *args: str, **facts: bool) -> None:
    """Let the source give so many items, and end."""
    for row in range(total):
        dispatch.came(item(row, *args, **facts))
    dispatch.source_ended()


def find(dispatch: Dispatch, *, paid: bool) -> None:
    """Tell what the ledger says of requests that were given up."""
    while dispatch.lost_for_good:
        given_up = dispatch.lost_for_good.popleft()
        dispatch.found(given_up.item, lost(given_up.item, "sandbox", "died") if paid else given_up.unsent)


def finish(dispatch: Dispatch, shared: Shared, lane: Lane, done: list[Done | None]) -> None:
    """End a lane as its task run does: in this process, what became of its items is shared at once."""
    if not lane.elsewhere:
        for of, one in zip(lane.items, done, strict=True):
            if one is not None:
                shared.begun(of)
                if of.may_pay:
                    shared.limits.spending.settle(of.request, one.images_paid, one.row.usage)
                shared.ended(of, one)
    dispatch.returned(lane, done, seconds=1.0)


def test_a_duplicate_waits_for_the_first_and_has_its_images():
    """One of two equal requests is sent; the other one's row is cached, with the same images."""
    dispatch, shared = dispatch_of(2)
    all_come(dispatch, 2, "a tree")
    lane = dispatch.next_lane(0.0)
    assert lane is not None
    assert [of.row for of in lane.items] == [0]
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, lane, [generated(lane.items[0])])
    assert [(done.row.row, done.row.status, len(done.row.images)) for done in dispatch.rows] == [
        (0, "generated", 1),
        (1, "cached", 1),
    ]
    assert dispatch.finished


def test_a_duplicate_that_is_delivered_goes_through_a_lane_of_its_own():
    """It has copies under keys of its own, which no other row can give it."""
    dispatch, shared = dispatch_of(2, delivers=True)
    for row in range(2):
        dispatch.came(item(row, "a tree"))
    first = dispatch.next_lane(0.0)
    assert first is not None
    finish(dispatch, shared, first, [generated(first.items[0])])
    second = dispatch.next_lane(0.0)
    assert second is not None
    assert [(of.row, of.known_absent) for of in second.items] == [(1, False)]


def over(of: Item) -> Done:
    """What a lane says of a request that may not be paid for, and of which there is no record."""
    return skipped(of, "sandbox", "too dear", "BudgetExceeded")


def test_over_the_budget_only_what_is_recorded_goes_on():
    """With nothing left to spend, a request that may be recorded goes on unpaid; one that is surely absent does not."""
    dispatch, shared = dispatch_of(3, budget=Budget(images=0))
    for row in range(3):
        dispatch.came(item(row, known_absent=row == 2))
    recorded, not_recorded = next_lanes(dispatch)
    assert [of.may_pay for lane in (recorded, not_recorded) for of in lane.items] == [False, False]
    finish(dispatch, shared, recorded, [Done(generated(recorded.items[0]).row)])
    finish(dispatch, shared, not_recorded, [over(not_recorded.items[0])])
    assert dispatch.next_lane(0.0) is None
    assert sorted((done.row.row, done.row.error_type) for done in dispatch.rows) == [
        (0, None),
        (1, "BudgetExceeded"),
        (2, "BudgetExceeded"),
    ]


def test_a_duplicate_of_what_could_not_be_delivered_has_a_key_of_its_own():
    """Where the first was not sent as its key is taken, the next one may be, and has the budget for it."""
    dispatch, shared = dispatch_of(2, budget=Budget(images=1))
    for row in range(2):
        dispatch.came(item(row, "a tree"))
    for done in (partial(failed, error_type="KeyTakenError"), generated):
        (lane,) = next_lanes(dispatch)
        finish(dispatch, shared, lane, [done(lane.items[0])])
    assert [(done.row.row, done.row.status) for done in dispatch.rows] == [(0, "failed"), (1, "generated")]


@pytest.mark.parametrize("recorded", [True, False])
def test_duplicates_over_the_budget_are_looked_up_once(recorded: bool):
    """They go on, or are skipped, with the first of them; none is in two lanes."""
    dispatch, shared = dispatch_of(4, 4, 3, budget=Budget(images=0), delivers=True)
    for row, prompt in enumerate(["oak", "elm", "elm", "elm"]):
        dispatch.came(item(row, prompt))
    dispatch.source_ended()
    carried = []
    while not dispatch.finished:
        for lane in next_lanes(dispatch):
            carried += [of.row for of in lane.items]
            there = [Done(generated(of).row) if recorded or of.row == 0 else over(of) for of in lane.items]
            finish(dispatch, shared, lane, there)
    assert sorted(carried) == ([0, 1, 2, 3] if recorded else [0, 1])
    assert sorted((done.row.row, done.row.status) for done in dispatch.rows) == [
        (0, "generated"),
        *((row, "generated" if recorded else "skipped") for row in (1, 2, 3)),
    ]


def test_a_stop_skips_what_is_over_the_budget_with_its_duplicates():
    """Each has one row."""
    dispatch, shared = dispatch_of(3, 4, 3, budget=Budget(images=0))
    for row in range(3):
        dispatch.came(item(row, "elm"))
    assert dispatch.next_lane(0.0) is None  # it is filled half a second longer
    shared.stop.set("not sent, because the account is empty")
    assert dispatch.next_lane(0.0) is None
    assert sorted(done.row.row for done in dispatch.rows) == [0, 1, 2]
    dispatch.source_ended()
    assert dispatch.finished


def test_what_is_under_way_may_turn_out_to_be_free():
    """A request over the budget waits while another one's images are only reserved."""
    dispatch, shared = dispatch_of(2, budget=Budget(images=1))
    for row in range(2):
        dispatch.came(item(row))
    first = dispatch.next_lane(0.0)
    assert first is not None
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, first, [failed(first.items[0], "ModerationError")])
    second = dispatch.next_lane(0.0)
    assert second is not None
    assert [of.row for of in second.items] == [1]


@pytest.mark.parametrize("local", [True, False])
def test_the_first_of_a_kind_goes_alone_and_tells_what_the_next_cost(local: bool):
    """Before it is back nothing is sent beside it; then as many as fit, each of which waits for what is under way."""
    dispatch, shared = dispatch_of(8, 8, 1, local=local, budget=Budget(tokens=100))
    all_come(dispatch, 8)
    first = dispatch.next_lane(0.0)
    assert first is not None
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, first, [generated(first.items[0], usage=Usage(total_tokens=30))])
    lanes = [dispatch.next_lane(0.0) for _ in range(3)]
    assert [lane and lane.items[0].row for lane in lanes] == [1, 2, None]
    assert lanes[0] is not None
    finish(dispatch, shared, lanes[0], [generated(lanes[0].items[0], usage=Usage(total_tokens=10))])
    assert dispatch.next_lane(0.0) is not None
    assert shared.limits.spending.spent.tokens == 40


def test_what_is_paid_for_tells_what_its_kind_costs():
    """Rows of earlier batches are a measure: nothing has to go alone."""
    dispatch, _ = dispatch_of(3, budget=Budget(tokens=100))
    update = {"status": "cached", "images": (IMAGE,), "usage": Usage(total_tokens=40)}
    dispatch.came(Done(row_of(item(0), "sandbox").model_copy(update=update)))
    for row in (1, 2):
        dispatch.came(item(row))
    assert [dispatch.next_lane(0.0) is not None for _ in range(2)] == [True, True]


def test_a_dear_request_that_does_not_fit_stops_no_cheap_one():
    """It waits for its turn while others are under way; then it is skipped, and the next ones have theirs."""
    prices = {"gpt-image-1": Price(per_image=0.1), "dall-e-2": Price(per_image=0.02)}
    dispatch, shared = dispatch_of(3, budget=Budget(usd=0.14, prices=prices))
    cheap = [Item(row, ImageRequest(prompt="elm", variant=str(row)), known_absent=True) for row in (0, 2)]
    for of in (cheap[0], replace(item(1), request=item(1).request.model_copy(update={"n": 2})), cheap[1]):
        dispatch.came(replace(of, known_absent=True))
    first = dispatch.next_lane(0.0)
    assert first is not None
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, first, [generated(first.items[0])])
    second = dispatch.next_lane(0.0)
    assert second is not None
    assert [of.row for of in second.items] == [2]
    assert [(done.row.row, done.row.error_type) for done in dispatch.rows][1:] == [(1, "BudgetExceeded")]


def test_what_others_made_too_dear_has_another_turn():
    """A lane that may not send any more says so; its request waits for what is under way, and goes on or is skipped."""
    dispatch, shared = dispatch_of(3, budget=Budget(tokens=100))
    shared.limits.spending.learn(item(0).request, 1, Usage(total_tokens=30))
    all_come(dispatch, 3, known_absent=True)
    lanes = [lane for _ in range(3) if (lane := dispatch.next_lane(0.0)) is not None]
    finish(dispatch, shared, lanes[0], [generated(lanes[0].items[0], usage=Usage(total_tokens=60))])
    assert shared.limits.spending.passed()
    finish(dispatch, shared, lanes[1], [skipped(lanes[1].items[0], "sandbox", "too dear", "BudgetExceeded")])
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, lanes[2], [failed(lanes[2].items[0], "ModerationError")])
    assert dispatch.next_lane(0.0) is None
    assert dispatch.finished
    assert dispatch.rows[-1].row.row == 1
    assert dispatch.rows[-1].row.error.startswith("60 more would pass the limit of 100 tokens")


def test_a_share_is_what_is_reserved_for_its_lane():
    """A lane elsewhere stops by itself where its requests are dearer; what it did not send has another turn."""
    dispatch, shared = dispatch_of(6, 2, 2, local=False, budget=Budget(tokens=100))
    all_come(dispatch, 6, known_absent=True)
    first = dispatch.next_lane(0.0)
    assert first is not None
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, first, [generated(first.items[0], usage=Usage(total_tokens=20))])
    one, other = dispatch.next_lane(0.0), dispatch.next_lane(0.0)
    assert one is not None
    assert other is not None
    assert [len(lane.items) for lane in (first, one, other)] == [1, 2, 2]
    share = pickle.loads(pickle.dumps(one.share))
    assert share.passed() is None
    share.settle(one.items[0].request, 1, Usage(total_tokens=25))
    assert share.passed() == "25 of 40 tokens are spent"
    dear = generated(one.items[0], usage=Usage(total_tokens=25))
    finish(dispatch, shared, one, [dear, skipped(one.items[1], "sandbox", "too dear", "BudgetExceeded")])
    assert dispatch.next_lane(0.0) is None
    finish(dispatch, shared, other, [generated(of, usage=Usage(total_tokens=20)) for of in other.items])
    assert dispatch.next_lane(0.0) is None
    assert [(done.row.row, done.row.status) for done in dispatch.rows][-2:] == [
        (2, "skipped"),
        (5, "skipped"),
    ]
    assert shared.limits.spending.notes() == ()


@pytest.mark.parametrize("local", [True, False])
def test_a_task_run_that_breaks_down_is_one_failure(local: bool):
    """All its requests fail, which is no run of failures that the batch should be given up for."""
    dispatch, shared = dispatch_of(5, 8, 5, local=local)
    all_come(dispatch, 5)
    for _ in range(1 if local else 2):
        for lane in next_lanes(dispatch):
            dispatch.lost(lane, "its process died")
    assert len(dispatch.lost_for_good) == (0 if local else 5)
    find(dispatch, paid=True)
    assert [done.row.error_type for done in dispatch.rows] == ["LaneLostError"] * 5
    assert all(bool(done.row.maybe_paid) != local for done in dispatch.rows)  # here, none was begun
    assert shared.stop.reason is None
    assert dispatch.finished


def test_what_a_lane_elsewhere_lost_goes_on_in_another_one():
    """Its requests come first, know which task run had them, and nothing stays reserved for the lane that died."""
    dispatch, shared = dispatch_of(6, 4, 2, local=False, budget=Budget(images=6))
    all_come(dispatch, 6)
    lanes = next_lanes(dispatch)
    dispatch.lost(lanes[0], "its process died", "a-task-run")
    assert shared.limits.spending.reserved == 2
    again = next_lanes(dispatch)
    assert [(of.row, of.lost_in) for of in again[0].items] == [(0, ("a-task-run",)), (1, ("a-task-run",))]
    for lane in (lanes[1], again[0]):
        finish(dispatch, shared, lane, [generated(of) for of in lane.items])
    for lane in next_lanes(dispatch):
        finish(dispatch, shared, lane, [generated(of) for of in lane.items])
    assert [done.row.status for done in dispatch.rows] == ["generated"] * 6
    assert dispatch.finished


def test_what_was_paid_for_in_lost_lanes_counts_against_the_budget():
    """Its reservation was given back when its lanes died; the ledger then shows that it was sent."""
    dispatch, shared = dispatch_of(2, 2, 2, local=False, budget=Budget(images=2))
    all_come(dispatch, 2)
    for task_run in ("one", "another"):
        for lane in next_lanes(dispatch):
            dispatch.lost(lane, "its process died", task_run)
    assert shared.limits.spending.reserved == 0
    find(dispatch, paid=True)
    assert dispatch.finished
    assert shared.limits.spending.reserve(item(9).request) is not None


@pytest.mark.parametrize("in_the_lane", [True, False])
def test_what_was_lost_is_not_called_unsent_by_a_stop(in_the_lane: bool):
    """The ledger is asked, whether the batch stops before the request is in another lane, or while it is there."""
    dispatch, shared = dispatch_of(2, 1, 1, local=False)
    all_come(dispatch, 2)
    dispatch.lost(next_lanes(dispatch)[0], "its process died", "a-task-run")
    if in_the_lane:
        lane = next_lanes(dispatch)[0]
        dispatch.returned(lane, [skipped(lane.items[0], "sandbox", "empty", None)], 1.0)
    shared.stop.set("not sent, because the account is empty")
    assert dispatch.next_lane(0.0) is None
    assert [given_up.item.row for given_up in dispatch.lost_for_good] == [0]
    assert not dispatch.finished
    find(dispatch, paid=True)
    rows = sorted((done.row.row, bool(done.row.maybe_paid)) for done in dispatch.rows)
    assert rows == [(0, True), (1, False)]
    assert dispatch.finished


def test_lanes_elsewhere_use_all_that_may_be_in_flight():
    """Also where that is no multiple of the lanes."""
    dispatch, _ = dispatch_of(100, 7, local=False)
    for row in range(100):
        dispatch.came(item(row))
    assert [lane.width for lane in next_lanes(dispatch)] == [4, 3]


def test_a_lane_that_nobody_took_was_not_sent():
    """Its requests, and their duplicates, go on as if it had never been; nothing stays reserved for them."""
    dispatch, shared = dispatch_of(3, budget=Budget(images=5))
    for row in range(3):
        dispatch.came(item(row, f"tree {row % 2}"))
    dispatch.source_ended()
    lane = dispatch.next_lane(0.0)
    assert lane is not None
    dispatch.withdraw(lane)
    assert not shared.begun(lane.items[0])
    shared.stop.set("not sent, because the batch was interrupted")
    assert dispatch.next_lane(0.0) is None
    assert sorted((done.row.row, done.row.status) for done in dispatch.rows) == [
        (row, "skipped") for row in range(3)
    ]
    assert dispatch.finished
    assert shared.limits.spending.reserved == 0


@pytest.mark.parametrize("local", [True, False])
def test_what_a_lane_gives_back_goes_on_with_its_duplicates(local: bool):
    """It comes first again, and has its part of the budget once."""
    dispatch, shared = dispatch_of(4, 1, 3, local=local, budget=Budget(images=3))
    for row, prompt in enumerate(["oak", "elm", "fir", "elm"]):
        dispatch.came(item(row, prompt))
    dispatch.source_ended()
    (lane,) = next_lanes(dispatch)
    finish(dispatch, shared, lane, [generated(lane.items[0]), None, None])
    assert shared.limits.spending.reserved == 0
    (again,) = next_lanes(dispatch)
    assert [of.row for of in again.items] == [1, 2]
    finish(dispatch, shared, again, [generated(of) for of in again.items])
    assert [done.row.row for done in dispatch.rows] == [0, 1, 3, 2]
    assert dispatch.finished
    assert (shared.limits.spending.spent.images, shared.limits.spending.reserved) == (3, 0)


def test_who_leaves_tells_what_is_known():
    """What ended before the batch was left keeps its outcome; what was begun may be paid; the rest was not sent."""
    dispatch, shared = dispatch_of(3, 4, 3)
    for row in range(3):
        dispatch.came(item(row))
    lane = dispatch.next_lane(0.0)
    assert lane is not None
    ended, begun, _ = lane.items
    for of in (ended, begun):
        shared.begun(of)
    shared.ended(ended, generated(ended))
    shared.stop.cancel("not sent, because of Ctrl-C", "KeyboardInterrupt")
    dispatch.leave()
    assert [(done.row.status, bool(done.row.maybe_paid)) for done in dispatch.rows] == [
        ("generated", False),
        ("failed", True),
        ("skipped", False),
    ]
    dispatch.returned(lane, [None] * 3, 1.0)  # too late
    assert len(dispatch.rows) == 3


@pytest.mark.parametrize("local", [True, False])
def test_what_the_budget_denied_is_never_said_to_be_paid(local: bool):
    """Its lane only looks it up, and so it was not sent, whether nobody waits for that lane or it breaks down."""
    dispatch, shared = dispatch_of(2, 2, 1, local=local, budget=Budget(images=0))
    all_come(dispatch, 2)
    broken, left = next_lanes(dispatch)
    for lane in (broken, left):
        shared.begun(lane.items[0])
    if local:
        dispatch.lost(broken, "its process died")
    shared.stop.cancel("not sent, because of Ctrl-C", "KeyboardInterrupt")
    dispatch.leave()
    assert [(done.row.maybe_paid, done.images_paid) for done in dispatch.rows] == [((), 0)] * 2
    assert all(done.row.error and done.row.error.startswith("not sent") for done in dispatch.rows)


def test_what_the_budget_denied_may_be_paid_by_a_task_run_that_broke_down_before():
    """Nobody knows yet whether that one sent it."""
    dispatch, shared = dispatch_of(2, 1, 1, local=False, budget=Budget(images=1))
    all_come(dispatch, 2)
    dispatch.lost(next_lanes(dispatch)[0], "its process died", "a-task-run")
    shared.limits.spending.count(item(9).request, 1, Usage())
    assert [of.may_pay for lane in next_lanes(dispatch) for of in lane.items] == [False]
    shared.stop.cancel("not sent, because of Ctrl-C", "KeyboardInterrupt")
    dispatch.leave()
    assert [(done.row.row, bool(done.row.maybe_paid)) for done in dispatch.rows] == [(0, True), (1, False)]


def test_a_task_run_that_breaks_down_has_sent_what_it_had_begun():
    """What it had not begun was not sent, is not counted, and does not begin any more; the rest may be paid for."""
    dispatch, shared = dispatch_of(3, 4, 3, budget=Budget(images=3))
    all_come(dispatch, 3)
    (lane,) = next_lanes(dispatch)
    ended, begun, not_begun = lane.items
    for of in (ended, begun):
        assert shared.begun(of)
    shared.limits.spending.settle(ended.request, 1, Usage())
    shared.ended(ended, generated(ended))
    dispatch.lost(lane, "no thread could be started")
    assert [(done.row.status, bool(done.row.maybe_paid), done.images_paid) for done in dispatch.rows] == [
        ("generated", False, 1),
        ("failed", True, 1),
        ("failed", False, 0),
    ]
    assert (dispatch.rows[-1].row.error or "").startswith("not sent, as its task run broke down: ")
    assert not shared.begun(not_begun)
    assert shared.limits.spending.reserved == 1  # of the one that its worker still has


def test_failures_in_a_row_stop_the_rest_and_are_counted_as_they_end():
    """The third failure of one kind in a row is the reason to stop; successes in between begin the count anew."""
    dispatch, shared = dispatch_of(7, 1)
    for row in range(7):
        dispatch.came(item(row))
    kinds = ["ServerError", "ServerError", None, "ServerError", "ServerError", "ServerError"]
    for kind in kinds:
        assert shared.stop.reason is None
        lane = dispatch.next_lane(0.0)
        assert lane is not None
        of = lane.items[0]
        finish(dispatch, shared, lane, [failed(of, kind) if kind else generated(of)])
    assert dispatch.next_lane(0.0) is None
    assert shared.stop.reason is not None
    assert shared.stop.reason.startswith("not sent, because 3 requests in a row failed with ServerError")
    assert (dispatch.rows[-1].row.status, dispatch.rows[-1].row.error_type) == ("skipped", "ServerError")


def test_a_slow_source_is_waited_for_half_a_second():
    """A lane that could carry more begins with what is there, and its items are not held up for long."""
    dispatch, _ = dispatch_of(None, 4, 10)
    dispatch.came(item(0))
    assert dispatch.next_lane(100.0) is None
    assert dispatch.wait(100.2) == pytest.approx(0.3)
    lane = dispatch.next_lane(100.5)
    assert lane is not None
    assert len(lane.items) == 1


def test_requests_that_wait_for_another_run_take_no_place():
    """Lanes whose workers only wait for claims of other runs make room for further lanes."""
    dispatch, shared = dispatch_of(100, 1)
    for row in range(3):
        dispatch.came(item(row))
    assert dispatch.next_lane(0.0) is not None
    assert dispatch.next_lane(0.0) is None
    shared.rest(1)
    assert dispatch.next_lane(0.0) is not None


def test_what_counts_no_tokens_is_not_held_up_by_its_share():
    """Where answers tell no tokens a lane elsewhere has no part of the limit, which would be nothing; it may send."""
    dispatch, shared = dispatch_of(3, 2, 2, local=False, budget=Budget(tokens=100))
    for row in range(3):
        dispatch.came(item(row))
    first = dispatch.next_lane(0.0)
    assert first is not None
    finish(dispatch, shared, first, [generated(first.items[0])])
    second = dispatch.next_lane(0.0)
    assert second is not None
    assert second.share is not None
    assert (len(second.items), second.share.passed()) == (2, None)


class Batch(RuleBasedStateMachine):
    """A batch in which anything happens in any order."""

    @initialize(
        total=st.integers(1, 25),
        in_flight=st.integers(1, 6),
        shard_size=st.none() | st.integers(1, 6),
        local=st.booleans(),
        images=st.none() | st.integers(0, 12),
        tokens=st.none() | st.integers(0, 30),
        delivers=st.booleans(),
        bounded=st.booleans(),
        leaves_at=st.sampled_from([2, 6, None, None]),
        leaves_at_last=st.booleans(),
    )
    def begin(
        self,
        total: int,
        in_flight: int,
        shard_size: int | None,
        local: bool,
        images: int | None,
        tokens: int | None,
        delivers: bool,
        bounded: bool,
        leaves_at: int | None,
        leaves_at_last: bool,
    ) -> None:
        self.dispatch, self.shared = dispatch_of(
            total if bounded else None,
            in_flight,
            shard_size,
            local=local,
            budget=Budget(images=images, tokens=tokens),
            delivers=delivers,
        )
        self.budget = images
        self.limit = tokens
        self.tokens = 0
        self.dearest: Counter[str] = Counter()  # tokens, by size
        self.expected = self.dearest.copy()  # the same when something was last reserved
        self.surprise = 0  # by how much what came back since then was dearer
        self.in_flight = in_flight
        self.to_come = total
        self.came = 0
        self.lanes: list[Lane] = []
        self.paid: Counter[str] = Counter()
        self.rows: list[Done] = []
        self.leaves_at = leaves_at
        self.leaves_at_last = leaves_at_last
        self.left: list[Lane] = []  # that nobody waits for any longer
        self.now = 0.0

    @precondition(lambda self: self.to_come)
    @rule(some=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=8))
    def come(self, some: list[tuple[int, bool]]) -> None:
        for same, absent in some[: self.to_come]:
            size = ("1024x1024", "1536x1024")[same % 2]
            self.dispatch.came(item(self.came, f"tree {same}", known_absent=absent, size=size))
            self.came += 1
            self.to_come -= 1
        if not self.to_come:
            self.dispatch.source_ended()

    @rule(seconds=st.floats(0, 1))
    def submit(self, seconds: float) -> None:
        self.now += seconds
        reserved = self.shared.limits.spending.reserved
        self.lanes += next_lanes(self.dispatch, self.now, self.came)
        if self.shared.limits.spending.reserved > reserved:
            self.expected, self.surprise = self.dearest.copy(), 0
        find(self.dispatch, paid=False)

    @precondition(lambda self: self.lanes)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lane = self.lanes.pop(data.draw(st.integers(0, len(self.lanes) - 1)))
        kinds = st.sampled_from(
            ["paid", "paid", "paid", "cached", "ModerationError", "ServerError", "402", "lost", "again"]
        )
        done: list[Done | None] = []
        for of in lane.items:
            kind = data.draw(kinds if of.may_pay else st.sampled_from(["over", "over", "again"]))
            if self.paid[of.request.request_hash]:
                kind = "cached"
            done.append(self.outcome(of, kind, data.draw(st.integers(1, 9))))
        finish(self.dispatch, self.shared, lane, done)

    def outcome(self, of: Item, kind: str, tokens: int = 5) -> Done | None:
        match kind:
            case "paid":
                size = of.request.size
                self.paid[of.request.request_hash] += 1
                self.tokens += tokens
                self.surprise += max(0, tokens - self.expected[size])
                self.dearest[size] = max(self.dearest[size], tokens)
                return generated(of, usage=Usage(total_tokens=tokens))
            case "cached":
                found = generated(of).row.model_copy(update={"status": "cached", "api_calls": 0})
                return Done(found)
            case "over":
                return over(of)
            case "402":
                return failed(of, "InsufficientBalanceError")
            case "lost":
                return failed(of, "UnknownOutcomeError", paid=1)
            case "again":
                return None
            case _:
                return failed(of, kind)

    @precondition(lambda self: self.lanes)
    @rule(data=st.data())
    def break_down(self, data: st.DataObject) -> None:
        lane = self.lanes.pop(data.draw(st.integers(0, len(self.lanes) - 1)))
        self.dispatch.lost(lane, "its process died")

    @precondition(lambda self: self.leaves_at is not None and self.came >= self.leaves_at)
    @rule()
    def leave(self) -> None:
        """Nobody waits any longer: what is known of each request that is in a lane is told, and once."""
        self.leaves_at, self.leaves_at_last = None, False
        expected = {}
        for lane in self.lanes:
            for of in lane.items:
                known = "elsewhere" if lane.elsewhere else ("begun", "ended", "not begun")[of.row % 3]
                if known in ("ended", "begun"):
                    self.shared.begun(of)
                if known == "ended":
                    ended = Done(generated(of).row.model_copy(update={"status": "cached", "api_calls": 0}))
                    self.shared.ended(of, ended)
                outcomes = {"ended": ("cached", False), "not begun": ("skipped", False)}
                unsent = not of.may_pay and not of.lost_in
                expected[of.row] = outcomes.get(known, ("skipped", False) if unsent else ("failed", True))
        self.shared.stop.cancel("not sent, because of Ctrl-C", "KeyboardInterrupt")
        self.dispatch.leave()
        find(self.dispatch, paid=False)
        self.left, self.lanes = self.lanes, []
        told = {done.row.row: (done.row.status, bool(done.row.maybe_paid)) for done in self.dispatch.rows}
        assert {row: told.get(row) for row in expected} == expected
        assert self.dispatch.open_lanes == self.dispatch.at_hand == 0

    @precondition(lambda self: self.left)
    @rule(lost=st.booleans())
    def come_back_too_late(self, lost: bool) -> None:
        """What a lane tells that nobody waits for changes nothing."""
        before = len(self.dispatch.rows), self.dispatch.at_hand
        for lane in self.left:
            if lost:
                self.dispatch.lost(lane, "its process died")
            else:
                self.dispatch.returned(lane, [None] * len(lane.items), 1.0)
        assert (len(self.dispatch.rows), self.dispatch.at_hand) == before

    @invariant()
    def no_step_hangs(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, STEP)

    @invariant()
    def each_request_has_one_row_at_most(self) -> None:
        if not hasattr(self, "dispatch"):
            return
        self.rows += self.dispatch.rows
        self.dispatch.rows.clear()
        rows = [done.row.row for done in self.rows]
        assert len(rows) == len(set(rows))

    @invariant()
    def no_more_is_reserved_or_paid_than_the_budget_allows(self) -> None:
        if not hasattr(self, "dispatch"):
            return
        spending = self.shared.limits.spending
        assert self.budget is None or spending.spent.images + max(0, spending.reserved) <= self.budget

    @invariant()
    def no_limit_is_passed_by_more_than_a_surprise(self) -> None:
        """What came back since something was last reserved was dearer than the dearest of its kind before."""
        if hasattr(self, "dispatch") and self.limit is not None:
            assert self.tokens <= self.limit + self.surprise

    @invariant()
    def the_first_of_a_kind_is_alone_in_that(self) -> None:
        if hasattr(self, "dispatch") and self.limit is not None:
            under_way = [of for lane in self.lanes for of in lane.items if of.may_pay]
            assert sum(not self.dearest[of.request.size] for of in under_way) <= 1

    @invariant()
    def no_more_is_open_than_may_be_in_flight(self) -> None:
        if hasattr(self, "dispatch") and not self.dispatch.sizing.local:
            assert sum(lane.width for lane in self.lanes) <= self.in_flight

    def teardown(self) -> None:
        if not hasattr(self, "dispatch"):
            return
        self.dispatch.source_ended()
        if self.leaves_at_last:
            if self.came % 2:
                self.submit(1.0)
            self.leave()
        for _ in range(200):
            self.no_step_hangs()
            self.submit(1.0)
            for lane in self.lanes:
                outcomes = [self.outcome(of, "paid" if of.may_pay else "over") for of in lane.items]
                finish(self.dispatch, self.shared, lane, outcomes)
            self.lanes = []
            if self.dispatch.finished:
                break
        self.rows += self.dispatch.rows
        assert self.dispatch.finished
        self.no_limit_is_passed_by_more_than_a_surprise()
        assert sorted(done.row.row for done in self.rows) == list(range(self.came))
        by_row = {done.row.row: done for done in self.rows}
        assert not any(done.images_paid for done in by_row.values() if done.row.status == "skipped")
        if not self.left:  # else what was under way may still be reserved
            assert self.shared.limits.spending.reserved == 0


TestBatch = Batch.TestCase
# a search for the shortest example takes a minute: whoever wants it adds Phase.shrink
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
TestBatch.settings = settings(max_examples=150, stateful_step_count=50, deadline=None, phases=PHASES)
