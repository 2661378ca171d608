"""What a request asks before it is sent: places in flight, the rate, the budget, the stop."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_ttapi.errors import BudgetExceeded, InvalidRequestError, NotStoredError, UnknownOutcomeError
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.generation.limits import Limits, RateLimit
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import GeneratedImages, Usage
from prefect_ttapi.stopping import Stop, StopSending

REQUEST = ImageRequest(prompt="a tree", model="gpt-image-1", n=2)


def test_sends_are_evenly_spaced() -> None:
    """The first at once, each further one after its share of the minute; idle time is not saved up for a burst."""
    rate, now, times = RateLimit(30), 0.0, []
    for idle in (0, 0, 0.5, 9, 0):
        now = max(rate.next_start(now + idle), now + idle)
        times.append(now)
    assert times == [0, 2, 4, 13, 15]


def test_the_first_may_have_to_wait_too() -> None:
    """Where somebody else may just have sent, the first caller waits for its share of the minute."""
    rate = RateLimit(30, at_once=False)
    assert [rate.next_start(100.0), rate.next_start(100.0)] == [102.0, 104.0]


def test_threads_share_the_rate() -> None:
    """Forty callers at 60 a minute: each has a turn of its own, the last one after 39 seconds."""
    rate = RateLimit(60)
    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(lambda _: rate.next_start(0.0), range(40))) == list(map(float, range(40)))


@pytest.mark.parametrize("per_minute", [0, -1, float("inf"), float("nan")])
def test_a_rate_is_a_number_above_zero(per_minute: float) -> None:
    """Anything else is refused at once."""
    with pytest.raises(ValueError, match="a rate is a number of requests per minute above 0"):
        RateLimit(per_minute)


@pytest.mark.parametrize("why", ["stop", "budget"])
def test_nobody_waits_an_hour_for_a_turn_that_is_not_wanted_any_more(why: str) -> None:
    """A stop, and a budget that others have spent meanwhile, end the wait for a turn."""
    spending = Spending(Budget(tokens=10))
    limits = Limits(Stop(), rate=RateLimit(1 / 60), spending=spending)
    limits.admit(1)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(limits.admit, 1)
        time.sleep(0.1)
        assert not waits.done()
        if why == "stop":
            limits.stop.set("enough")
        else:
            spending.settle(REQUEST, 2, Usage(total_tokens=10))
        expected = StopSending if why == "stop" else BudgetExceeded
        assert isinstance(waits.exception(timeout=30), expected)


def test_a_repeated_send_over_the_budget_is_no_error_of_its_own() -> None:
    """What was sent before may be paid for: the second send is only not made."""
    spending = Spending(Budget(tokens=10))
    limits = Limits(spending=spending)
    spending.settle(REQUEST, 2, Usage(total_tokens=10))
    with pytest.raises(StopSending, match="10 of 10 tokens are spent"):
        limits.admit(2)


def test_a_place_is_free_once_the_answer_is_there() -> None:
    """What is left to do with an answer holds up nobody, and its cost is counted at once."""
    spending = Spending(Budget(images=4))
    assert spending.reserve(REQUEST) is None
    limits = Limits(in_flight=1, spending=spending)
    with limits.place(REQUEST) as place:
        assert limits.in_flight == 1
        place.answered(GeneratedImages(images=(), usage=Usage(total_tokens=7)))
        assert (limits.in_flight, spending.reserved) == (0, 0)
        with limits.place(REQUEST.model_copy(update={"n": 1})):
            assert limits.in_flight == 1
    assert limits.in_flight == 0


def test_never_more_places_than_in_flight() -> None:
    """Sixteen threads on three places: no fourth one is ever taken."""
    limits, most, lock = Limits(in_flight=3), [0], threading.Lock()

    def use(_: int) -> None:
        with limits.place(REQUEST):
            with lock:
                most[0] = max(most[0], limits.in_flight)
            time.sleep(0.002)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(use, range(100)))
    assert most == [3]


def test_who_waits_for_a_place_hears_of_a_stop() -> None:
    """With all places taken for minutes, a stop still ends the wait, and nothing is sent."""
    limits = Limits(in_flight=1)
    with limits.place(REQUEST), ThreadPoolExecutor(1) as threads:
        waits = threads.submit(limits.take)
        limits.stop.set("enough")
        assert isinstance(waits.exception(timeout=30), StopSending)


@pytest.mark.parametrize(
    ("error", "images"),
    [
        (InvalidRequestError("no"), 0),
        (StopSending("enough"), 0),
        (BudgetExceeded("too much"), 0),
        (UnknownOutcomeError("lost"), 2),
        (UnknownOutcomeError("of an earlier call", attempts=0), 0),
        (NotStoredError("paid"), 2),
        (ValueError("not foreseen"), 2),
    ],
)
def test_an_error_costs_what_it_may_have_cost(error: Exception, images: int) -> None:
    """A reservation becomes nothing where nothing was paid, and all of it where nobody knows."""
    spending = Spending(Budget(images=4))
    assert spending.reserve(REQUEST) is None
    limits = Limits(spending=spending)
    with pytest.raises(type(error)), limits.place(REQUEST):
        raise error
    assert (spending.spent.images, spending.reserved) == (images, 0)


def test_who_waits_for_somebody_elses_record_keeps_its_reservation() -> None:
    """The place is given back, the images stay reserved: the request comes back."""
    spending = Spending(Budget(images=2))
    assert spending.reserve(REQUEST) is None
    limits = Limits(in_flight=1, spending=spending)
    with limits.place(REQUEST) as place:
        place.wait()
    assert (limits.in_flight, spending.reserved) == (0, 2)
