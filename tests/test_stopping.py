"""The stop token and the pauses."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from prefect_ttapi.stopping import Stop, StopSending


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_the_first_reason_stays_with_its_type() -> None:
    stop = Stop()
    stop.set("the account is empty", "InsufficientBalanceError")
    stop.cancel("interrupted", "KeyboardInterrupt")
    assert (stop.reason, stop.error_type, stop.cancelled) == (
        "the account is empty",
        "InsufficientBalanceError",
        True,
    )


def test_check_raises_with_the_reason_once_it_is_set() -> None:
    stop = Stop()
    stop.check()
    stop.set("ten requests in a row failed")
    with pytest.raises(StopSending, match="ten requests in a row failed"):
        stop.check()


def test_threads_may_begin_to_wait_while_it_is_set(often: None) -> None:
    """Whoever is known by then is woken, whatever is added meanwhile."""
    for _ in range(200):
        stop, kept = Stop(), [threading.Condition() for _ in range(200)]
        for condition in kept:
            stop.wake(condition)
        more = [threading.Condition() for _ in range(100)]
        adding = threading.Thread(target=list, args=(map(stop.wake, more),))
        adding.start()
        stop.set("enough")
        adding.join()


def test_whoever_waits_is_woken_by_another_thread() -> None:
    stop = Stop()
    threading.Timer(0.05, stop.set, ["enough"]).start()
    started = time.monotonic()
    assert stop.wait(30.0)
    assert time.monotonic() - started < 20.0
