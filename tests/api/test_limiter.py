"""One request that was too many slows the others down, until there is room again; a rate spaces them evenly."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.limiter import Pace, Rejection, Turn, Window
from prefect_ttapi.api.outcomes import Failure, judge
from prefect_ttapi.api.retries import Attempts, Guard, RetryPolicy
from prefect_ttapi.errors import Outcome, RateLimitError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.stopping import Stop, StopSending
from tests.support.clocks import StoppedClock
from tests.support.hostile import HostileServer, answer, answered, png

CAT = ImageRequest(prompt="a cat", model="gpt-image-1")
GOOD = answer(200, answered(png()))
SLOW_DOWN = answer(429, {"message": "slow down"}, {"Retry-After": "3"})
TOO_MANY = Failure(judge(429), "slow down", 429)


def started(window: Window, count: int) -> list[int]:
    return [window.start() for _ in range(count)]


def test_a_burst_of_rejections_halves_the_window_once() -> None:
    """Of 32 in flight, 27 are rejected: 16 may follow. Only one that started after that lowers it further."""
    window = Window()
    burst = started(window, 32)
    told = []
    for place in burst[5:]:
        told.append(window.reject(place))
        window.end()
    assert (told.count(Rejection.SLOWED), told.count(Rejection.IN_COMPANY), window.limit) == (1, 26, 16)
    assert window.wait(now=0, queued=27) == 0
    later = started(window, 11)
    assert window.wait(now=0, queued=16) is None
    assert window.reject(later[0]) is Rejection.SLOWED
    assert window.limit == 8


def test_the_window_grows_by_one_for_each_window_of_answers() -> None:
    """From 2 to 3 after two answers, to 4 after three more; it is gone when fewer are asked for than it allows."""
    window = Window()
    for place in started(window, 4)[:1]:
        window.reject(place)
    window.in_flight = 0
    limits = []
    for wanted in [9] * 9 + [4] * 9:
        window.wait(0, queued=wanted)
        window.answer(window.start())
        window.end()
        limits.append(window.limit)
    assert limits == [2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, None, None, None, None, None]


def test_answers_from_before_the_limit_fell_do_not_raise_it() -> None:
    """What was in flight already shows nothing of the lower speed."""
    window = Window()
    burst = started(window, 4)
    window.reject(burst[0])
    window.wait(0, queued=4)
    for place in burst[1:]:
        window.answer(place)
    assert window.limit == 2


@given(st.integers(1, 12), st.integers(1, 40), st.lists(st.integers(0, 2**16), min_size=1, max_size=300))
def test_whatever_the_order_of_events_the_window_keeps_its_word(
    room: int, wanted: int, choices: list[int]
) -> None:
    """A server with so much room, ends in any order: nothing starts above the limit, which is never less than 1,
    and the limit falls at most once between a request's start and its end."""
    window = Window()
    flying: list[int] = []
    for choice in choices:
        if len(flying) < wanted and window.wait(0, wanted - len(flying)) == 0:
            assert window.limit is None or len(flying) < window.limit
            flying.append(window.start())
        place, falls = flying.pop(choice % len(flying)), window.slowed
        if len(flying) >= room:
            rejection = window.reject(place)
            assert (rejection is Rejection.IN_COMPANY) == (place < falls)
            assert window.slowed == max(falls, place + 1)
        elif choice % 3:
            flying.append(place)
            continue
        else:
            window.answer(place)
        window.end()
        assert window.in_flight == len(flying)
        assert window.limit is None or window.limit >= 1


@contextmanager
def turn_of(pace: Pace, stop: Stop | None = None) -> Iterator[Turn]:
    """A request's turn, whose place is free at the end."""
    turn = Turn(pace, stop or Stop())
    try:
        yield turn
    finally:
        turn.give_back()


def send(pace: Pace, guard: Guard, policy: RetryPolicy, *answers: Callable[[], Failure | None]) -> Attempts:
    """Send until an answer is none of a failure; the last one is given from then on."""
    with Attempts("x", policy, pace, guard) as attempts:
        attempts.begin()
        while (failure := answers[min(attempts.count, len(answers) - 1)]()) is not None:
            attempts.failed(failure)
        attempts.answered()
    return attempts


@pytest.fixture
def limited(stopped: StoppedClock) -> Pace:
    """A pace that lets one request through at a time."""
    pace = Pace(stopped)
    with turn_of(pace) as turn:
        turn.take()
        assert turn.rejected() is Rejection.ALONE
    return pace


class SeenStop(Stop):
    """Tells when somebody who waits has looked at it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def check(self) -> None:
        self.seen.set()
        super().check()


def test_who_waits_longest_goes_first(limited: Pace) -> None:
    """Whatever the order in which they ask for a place, requests get it by age; so one sent before is sent first."""
    order: list[int] = []
    queued = [SeenStop() for _ in range(6)]

    def run(number: int) -> None:
        turns[number].take()
        order.append(number)
        turns[number].give_back()

    with turn_of(limited) as holder, ExitStack() as at_the_end, ThreadPoolExecutor(6) as threads:
        holder.take()
        turns = [at_the_end.enter_context(turn_of(limited, stop)) for stop in queued]
        for number in (3, 1, 5, 0, 4, 2):
            threads.submit(run, number)
        assert all(stop.seen.wait(10) for stop in queued)
        assert order == []
        holder.give_back()
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_wait_that_is_asked_of_one_is_kept_by_all(limited: Pace, stopped: StoppedClock) -> None:
    """Nothing starts before it is over, nor does a shorter one that is asked later cut it short."""
    for seconds in (5.0, 2.0):
        with turn_of(limited) as turn:
            turn.hold(seconds)
    stopped.sleeps.clear()
    with turn_of(limited) as turn:
        turn.take()
    assert stopped.sleeps == [5]


def test_the_company_of_a_rejected_request_has_its_attempts_left(stopped: StoppedClock) -> None:
    """With two attempts, one rejected together with another request is sent three times: the first didn't count."""
    pace = Pace(stopped)
    with turn_of(pace) as first:
        first.take()

        def in_company() -> Failure:
            assert first.rejected() is Rejection.SLOWED
            first.give_back()
            return TOO_MANY

        with pytest.raises(RateLimitError, match="max_attempts") as caught:
            send(pace, Guard(), RetryPolicy(max_attempts=2), in_company, lambda: TOO_MANY)
    assert caught.value.attempts == 3


@pytest.mark.parametrize("stops", ["guard", "stop", "while it is sent"])
def test_who_is_no_longer_wanted_is_not_sent(limited: Pace, stops: str) -> None:
    """Before anything was sent, the caller gets its own exception; after that the error of the last attempt."""

    class OnlyOnce(Guard):
        def admit(self, attempt: int) -> None:
            if attempt == 2 and stops == "guard":
                raise StopSending("the batch was cancelled")

    guard = OnlyOnce()
    sent: list[int] = []

    def fail() -> Failure:
        sent.append(1)
        if stops == "stop":
            guard.stop.set("the batch was cancelled")
        return TOO_MANY

    def fail_to_write() -> Failure:
        raise StopSending("the batch was cancelled")

    with pytest.raises(RateLimitError) as caught:
        send(limited, guard, RetryPolicy(), fail, fail_to_write)
    assert "not sent again: the batch was cancelled" in str(caught.value)
    assert (sent, caught.value.attempts, caught.value.outcome) == ([1], 1, Outcome.REJECTED)

    with pytest.raises(StopSending):
        send(limited, Guard(), RetryPolicy(), fail_to_write)
    limited.window.hold(limited.clock.monotonic() + 60)
    guard.stop.set("the batch was cancelled")
    with turn_of(limited, guard.stop) as turn, pytest.raises(StopSending):
        turn.take()
    # nobody's place was lost
    assert send(limited, Guard(), RetryPolicy(), lambda: None).count == 1


@pytest.mark.parametrize("behaviour", [SLOW_DOWN, answer(503, b"", {"Retry-After": "3"})])
def test_the_next_request_of_the_client_waits_too(
    server: HostileServer,
    make_client: Callable[..., TTAPIClient],
    stopped: StoppedClock,
    behaviour: Callable[..., object],
) -> None:
    """Also after a request that was given up: Retry-After is about the account, not about one image."""
    server.play(behaviour, GOOD)
    client = make_client(max_attempts=1)
    with pytest.raises(Exception, match="not sent again: max_attempts"):
        client.generate(CAT)
    stopped.sleeps.clear()
    client.generate(CAT)
    assert stopped.sleeps == [3]


def test_a_stream_is_in_flight_until_its_end(
    server: HostileServer, make_client: Callable[..., TTAPIClient]
) -> None:
    """Its place is taken when it begins, and free when it is closed."""
    client = make_client()
    server.play(GOOD)
    stream = client.stream(CAT)
    assert client._pace.window.in_flight == 0
    next(stream)
    assert client._pace.window.in_flight == 1
    stream.close()
    assert client._pace.window.in_flight == 0


@pytest.fixture
def crowded() -> Iterator[Sandbox]:
    with Sandbox(tiny=True, latency=0.05, room=5) as sandbox:
        yield sandbox


def test_a_crowd_finds_the_pace_that_the_server_allows(
    crowded: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """32 threads and a server with room for 5: no request fails, each is paid once, and few calls are in vain. The log
    tells of the slower pace in a few lines, not one per request."""
    requests = [ImageRequest(prompt=f"cat {number}", model="gpt-image-1") for number in range(60)]
    with (
        caplog.at_level(logging.INFO, "prefect_ttapi.api.limiter"),
        TTAPIClient("k", crowded.base_url) as client,
        ThreadPoolExecutor(32) as threads,
    ):
        answers = list(threads.map(client.generate, requests))
        assert sum(answer.attempts for answer in answers) == crowded.calls
        assert crowded.paid == 60
        assert crowded.calls < 120
        told = [record.message for record in caplog.records if record.name.endswith("limiter")]
        assert 1 <= len(told) <= 10
        assert told[0].startswith("the API takes no more for now: at most ")
