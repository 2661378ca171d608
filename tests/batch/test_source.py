"""What a batch is given to do, read in a thread of its own: no Prefect run is needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from prefect_ttapi.batch.items import Item
from prefect_ttapi.batch.source import Came, Ended, Source
from prefect_ttapi.requests import ImageRequest


def items(given: list[int], blocked: threading.Event | None = None) -> Iterator[Item]:
    for number in range(1_000_000):
        if blocked and number == 3:
            blocked.wait()
        given.append(number)
        yield Item(number, ImageRequest(prompt="a tree"))


def test_a_source_that_hangs_has_told_all_it_gave():
    """What came before a source hangs is at hand, though nobody asked for more than that."""
    told: queue.SimpleQueue[Came | Ended] = queue.SimpleQueue()
    blocked = threading.Event()
    Source(items([], blocked), told.put, blocked.is_set).start()
    assert [told.get(timeout=30).item.row for _ in range(3)] == [0, 1, 2]
    blocked.set()
    assert told.get(timeout=30).item.row == 3  # it was being read
    assert told.get(timeout=30) == Ended()


def test_an_endless_source_is_read_only_as_far_as_its_items_are_taken():
    """Nothing is read for which there is no room, and nothing once it is unwanted."""
    told: queue.SimpleQueue[Came | Ended] = queue.SimpleQueue()
    given: list[int] = []
    unwanted = threading.Event()
    source = Source(items(given), told.put, unwanted.is_set)
    source.start()
    for _ in range(100):
        told.get(timeout=30)
        source.taken()
    unwanted.set()
    source.taken()
    while told.get(timeout=30) != Ended():
        source.taken()
    assert 100 <= len(given) < 150


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()])
def test_what_breaks_a_source_is_told(error: BaseException):
    """A source's error is its end."""

    def broken() -> Iterator[Item]:
        yield from ()
        raise error

    told: queue.SimpleQueue[Came | Ended] = queue.SimpleQueue()
    Source(broken(), told.put, lambda: False).start()
    assert told.get(timeout=30) == Ended(error)
