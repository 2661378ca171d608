"""What a batch is given to do, read in a thread of its own: no Prefect run is needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from prefect_ttapi.batch.items import Item
from prefect_ttapi.batch.loop import Came, Ended, Source
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.stopping import Stop

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
