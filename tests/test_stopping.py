"""The stop token and the pauses."""

from __future__ import annotations

import threading
import time

import pytest

from prefect_ttapi.stopping import Stop, StopSending


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


def test_whoever_waits_is_woken_by_another_thread() -> None:
    stop = Stop()
    threading.Timer(0.05, stop.set, ["enough"]).start()
    started = time.monotonic()
    assert stop.wait(30.0)
    assert time.monotonic() - started < 20.0
