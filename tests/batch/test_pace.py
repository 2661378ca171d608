"""How much of what may be in flight is in use, where requests take very different times: a batch on a fake clock."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest

from prefect_ttapi.batch.dispatch import Dispatch
from prefect_ttapi.batch.items import Done, Item, row_of
from prefect_ttapi.batch.lanes import Lane, Shared, is_over
from prefect_ttapi.batch.options import BatchOptions, Breaker, Sizing
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.requests import ImageRequest

# one worker makes the requests once
pytestmark = pytest.mark.xdist_group("pace")

#: Seconds of a request of which its lane finds that it is paid for; all that take longer are sent.
HIT = 0.005

#: Items that are read ahead.
AHEAD = 16


@cache
def item(row: int) -> Item:
    return Item(row, ImageRequest.model_construct(prompt=f"tree {row}"), known_absent=True)


@cache
def done(row: int, *, sent: bool) -> Done:
    facts = {"status": "generated", "api_calls": 1} if sent else {"status": "cached"}
    return Done(row_of(item(row), "sandbox", **facts))


@dataclass(eq=False)
class Working:
    """A lane at work, one request after the other."""

    lane: Lane
    began: float
    results: list[Done | None] = field(default_factory=list)

    @property
    def row(self) -> int:
        """The request that is under way, or next."""
        return self.lane.items[len(self.results)].row


class Batch:
    """A batch of requests that take so many seconds each, in threads of one process.

    Args:
        seconds: of each request.
        in_flight: how many may be under way.
        known: whether the batch knows how many there are.
    """

    def __init__(self, seconds: Sequence[float], in_flight: int, *, known: bool = True) -> None:
        options = BatchOptions(max_in_flight=in_flight)
        sizing = Sizing.of(options, len(seconds) if known else None, local=True)
        self._dispatch = Dispatch(sizing, Shared(Limits(), Breaker(None)), "sandbox", options)
        self._seconds = seconds
        self._to_come = deque(range(len(seconds)))
        self._in_flight = in_flight
        self._waiting: deque[Working] = deque()  # for a place
        self._ends: list[tuple[float, int, Working]] = []
        self._now = 0.0
        self.task_runs = 0
        self._open()
        while self._ends:
            self._now, row, lane = heapq.heappop(self._ends)
            self._end(lane, row)
            self._open()
        assert self._dispatch.finished
        assert sorted(one.row.row for one in self._dispatch.rows) == list(range(len(seconds)))
        self.in_use = sum(seconds) / in_flight / self._now

    def _open(self) -> None:
        """Begin lanes as the loop of a batch does, and give places to those that wait for one."""
        while True:
            if (lane := self._dispatch.next_lane(self._now)) is not None:
                self.task_runs += 1
                self._waiting.append(Working(lane, self._now))
            elif self._to_come and self._dispatch.at_hand < AHEAD:
                self._dispatch.came(item(self._to_come.popleft()))
                if not self._to_come:
                    self._dispatch.source_ended()
            else:
                break
        while self._waiting and len(self._ends) < self._in_flight:
            working = self._waiting.popleft()
            heapq.heappush(self._ends, (self._now + self._seconds[working.row], working.row, working))

    def _end(self, working: Working, row: int) -> None:
        """End a lane's request, and the lane after its last one, or when it has lasted for too long."""
        working.results.append(done(row, sent=self._seconds[row] > HIT))
        lane, results, seconds = working.lane, working.results, self._now - working.began
        if len(results) < len(lane.items) and not is_over(lane, seconds, longest=0.0):
            self._waiting.append(working)
            return
        self._dispatch.returned(lane, results + [None] * (len(lane.items) - len(results)), seconds)


#: Seconds of each request, in order.
BATCHES = {
    "first the hits": [HIT] * 800 + [10.0] * 1_200,
    "first the others": [10.0] * 1_200 + [HIT] * 800,
    "hits in the middle": [10.0] * 400 + [HIT] * 1_200 + [10.0] * 400,
    "by turns": ([HIT] * 200 + [10.0] * 200) * 4,
    "few others at the end": [HIT] * 3_000 + [10.0] * 500,
    "one in three a hit": [HIT, 10.0, 10.0] * 600,
    "first the quick ones": [1.0] * 1_000 + [20.0] * 1_000,
    "one in ten takes ten times as long": [6.0] * 3 + ([60.0] + [6.0] * 9) * 150,
}


@pytest.mark.parametrize(("name", "in_flight"), [*((name, 32) for name in BATCHES), ("by turns", 8)])
def test_nine_tenths_of_the_places_are_in_use(name: str, in_flight: int):
    """Requests that are quick, as they are paid for, make no long lanes of those that are sent, so that others idle."""
    assert Batch(BATCHES[name], in_flight).in_use >= 0.9


@pytest.mark.parametrize("name", ["first the hits", "by turns", "first the quick ones"])
def test_a_batch_of_unknown_length_has_no_stragglers(name: str):
    """Nobody knows when to make its lanes shorter; one that lasts too long gives back what it has not begun."""
    assert Batch(BATCHES[name], 32, known=False).in_use >= 0.9


#: Seconds of each of many requests, in order, and whether the batch knows how many there are.
QUICK = {
    "paid for": ([HIT] * 10_000, True),
    "paid for, but the first": ([10.0] * 1_000 + [HIT] * 9_000, True),
    "paid for, of unknown number": ([HIT] * 10_000, False),
}


@pytest.mark.parametrize(("seconds", "known"), QUICK.values(), ids=QUICK)
def test_quick_requests_are_some_hundred_task_runs(seconds: list[float], known: bool):
    """A server of 20 task runs a second is never the bound; where the first requests were slow, that is forgotten."""
    slow = sum(each > HIT for each in seconds)
    assert Batch(seconds, 32, known=known).task_runs <= 600 + slow
