"""So many requests a minute."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_ttapi.batch.rate import RateLimit
from tests.support.clocks import StoppedClock


def test_starts_are_evenly_spaced() -> None:
    """The first at once, each further one after its share of the minute; idle time is not saved up for a burst."""
    time = StoppedClock()
    rate = RateLimit(30, monotonic=time.monotonic, sleep=time.sleep)
    times = []
    for idle in (0, 0, 0.5, 9, 0):
        time.sleep(idle)
        rate.wait()
        times.append(round(time.monotonic(), 6))
    assert times == [0, 2, 4, 13, 15]


def test_the_first_may_have_to_wait_too() -> None:
    """Where somebody else may just have sent, the first caller waits for its share of the minute."""
    time = StoppedClock()
    before = time.monotonic()
    RateLimit(30, at_once=False, monotonic=time.monotonic, sleep=time.sleep).wait()
    assert time.monotonic() - before == pytest.approx(2)


def test_threads_share_the_rate() -> None:
    """Forty callers at 60 a minute: the last one is let through after 39 seconds."""
    time = StoppedClock()
    rate = RateLimit(60, monotonic=time.monotonic, sleep=time.sleep)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: rate.wait(), range(40)))
    assert time.monotonic() >= 39


def test_who_stops_does_not_wait() -> None:
    """A wait of an hour ends when the batch is stopped."""
    rate = RateLimit(1 / 60)
    rate.wait()
    stop = threading.Event()
    waiting = threading.Event()

    def stopped() -> bool:
        waiting.set()
        return stop.is_set()

    thread = threading.Thread(target=rate.wait, args=(stopped,))
    thread.start()
    assert waiting.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("per_minute", [0, -1, float("inf"), float("nan")])
def test_a_rate_is_a_number_above_zero(per_minute: float) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="above 0"):
        RateLimit(per_minute)
