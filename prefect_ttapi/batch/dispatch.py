"""Which requests go into the next lane, and what the row of each request is (sans-IO, for one thread).

A lane is a task run. `width` of its requests are under way side by side, and it returns the rows of all of them. Lanes
get shorter towards the end of a batch, so that none is left behind: guided self-scheduling, by Polychronopoulos and
Kuck, "Guided Self-Scheduling: A Practical Scheduling Scheme for Parallel Supercomputers", 1987.

Requests come from a source, wait for room in a lane, and leave as exactly one row each. A request that stands in the
batch more than once is sent once: the later ones wait until the first is back, and then have its images, or fail with
it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from prefect_ttapi.batch.items import Done, Item, lost, never_sent, perhaps_under_way, row_of, skipped
from prefect_ttapi.batch.lanes import SECONDS, Lane, Shared, workers
from prefect_ttapi.errors import KeyTakenError, ModelNotPermittedError
from prefect_ttapi.results import Usage

#: Up to so many requests, each has a task run of its own: a Prefect server takes about 20 a second.
SMALL: Final = 300

#: Seconds that a lane takes at least, however near the end is: a task run costs the server some 50 ms.
_LEAST_SECONDS: Final = 1.0

#: A batch of quick requests is about so many task runs, if their lanes take up to twice `SECONDS` for that.
_TASK_RUNS: Final = 500

#: Requests of a lane, whatever the pace.
_LONGEST: Final = 512

#: A lane elsewhere has requests for so many times `SECONDS`, or so many rounds: it gives back what is too much.
_PLENTY: Final = 3
_ROUNDS: Final = 8

#: Lanes in other processes, where nobody can tell how many task runs the engine has room for: any has room for two,
#: and while one of them ends the other goes on.
_ELSEWHERE: Final = 2

#: Up to so many requests per minute one lane elsewhere sends them all: two would not use their shares while they end.
_ONE_LANE: Final = 600

#: Task runs in which a request may be lost before it is given up.
_LOSSES: Final = 2

#: How many lanes may be open beyond those that are needed, where requests wait for other runs' claims.
_WAITING: Final = 64

#: How much of the newest lane's pace goes into what is expected of the next one.
_NEWEST: Final = 0.3


@dataclass(frozen=True)
class Sizing:
    """The lanes of one batch.

    Attributes:
        local: lanes run in threads of this process, where they share places in flight, budget, rate and stop; else
            each has its share of them.
        width: requests of a lane that are under way side by side.
        enough: with so many requests being worked on, beside those that wait for other runs' claims, no place is idle.
        most: lanes that are open at once, at most.
        fixed: requests of a lane, where the user says so.
        total: requests of the batch, where that is known.
        pace: seconds that a lane takes, divided by its requests; None while nothing is measured.
    """

    local: bool
    width: int
    enough: int
    most: int
    fixed: int | None = None
    total: int | None = None
    pace: float | None = None

    @classmethod
    def of(
        cls,
        total: int | None,
        max_in_flight: int,
        shard_size: int | None,
        *,
        local: bool,
        slots: int | None = None,
        rate_limit: float | None = None,
    ) -> Self:
        """Return the lanes of a batch with `total` requests, if that is known.

        Args:
            slots: how many task runs the engine has room for at least, where that is known.
            rate_limit: requests per minute.

        >>> threads = Sizing.of(200, 8, None, local=True)
        >>> threads.width, threads.size(200)
        (1, 1)
        >>> processes = Sizing.of(200, 8, None, local=False)
        >>> processes.width, processes.most, processes.size(200)
        (4, 2, 32)
        """
        if local:
            # more than there are places, so that none waits for a task run to begin; one at a time keeps the order
            ahead = 0 if max_in_flight == 1 else max(2, max_in_flight // 4)
            width = min(shard_size or 1, max_in_flight)
            enough = workers(max_in_flight) + ahead
            return cls(True, width, enough, math.ceil(enough / width) + _WAITING, shard_size, total)
        lanes = (
            1 if rate_limit is not None and rate_limit <= _ONE_LANE else min(_ELSEWHERE, slots or _ELSEWHERE)
        )
        width = min(math.ceil(max_in_flight / lanes), shard_size or max_in_flight)
        return cls(False, width, max_in_flight, math.ceil(max_in_flight / width), shard_size, total)

    def size(self, rest: int | None, under_way: float = 0.0) -> int:
        """Return how many requests the next lane gets.

        Args:
            rest: requests that are in no lane yet, where that is known.
            under_way: requests that open lanes elsewhere still have to do.

        >>> half_a_second = Sizing(True, width=1, enough=14, most=78, total=10_000, pace=0.5)
        >>> [half_a_second.size(rest) for rest in (10_000, 200, 40)]
        [30, 20, 20]
        >>> Sizing(True, width=1, enough=14, most=78, total=200, pace=0.001).size(200)
        1
        """
        if self.fixed is not None:
            return self.fixed
        if not self.local:
            return self._size_elsewhere(rest, under_way)
        if self.width == 1 and self.total is not None and self.total <= SMALL:
            return 1
        if self.pace is None:
            return self.width
        pace = max(self.pace, 1e-6)
        wanted = SECONDS / pace
        if rest is not None:
            lanes = math.ceil(self.enough / self.width)
            wanted = min(wanted, max(_LEAST_SECONDS / pace, rest / (2 * lanes)))
        few = (self.total or 0) / _TASK_RUNS
        if few * pace <= 2 * SECONDS:
            wanted = max(wanted, few)
        # whole rounds: at the end of a lane no place in it is idle
        rounds = max(1, int(min(wanted, _LONGEST) / self.width))
        return rounds * self.width

    def _size_elsewhere(self, rest: int | None, under_way: float) -> int:
        """Return the lane's part of all that is left, as far as it can get in its time, in whole rounds."""
        wanted = float(_ROUNDS * self.width)
        if self.pace is not None:
            wanted = max(wanted, _PLENTY * SECONDS / max(self.pace, 1e-6))
        if rest is not None:
            wanted = min(wanted, (rest + under_way) / self.most)
        # at the end of a lane no place in it is idle
        return max(1, math.ceil(min(wanted, _LONGEST) / self.width)) * self.width

    def measured(self, requests: int, seconds: float) -> float:
        """Return the pace, now that a lane with so many requests took so many seconds."""
        newest = seconds / max(1, requests)
        return newest if self.pace is None else _NEWEST * newest + (1 - _NEWEST) * self.pace


#: Seconds for which a lane waits for a slow source to fill it.
_FILLING: Final = 0.5


@dataclass(frozen=True)
class Lost:
    """A request whose task runs broke down.

    Attributes:
        item: the request.
        unsent: its row, where it was never sent.
        why: they broke down; empty where that was told before.
    """

    item: Item
    unsent: Done
    why: str


def _usage(done: Done) -> Usage | None:
    """Return what an answer says it cost; None where there is no answer."""
    return done.row.usage or (Usage() if done.row.images else None)


class Dispatch:
    """Hands requests to lanes and collects their rows.

    Args:
        sizing: how the batch is cut into lanes.
        shared: the budget, the breaker and the stop of the batch.
        api_origin: who answers, for the rows.
        delivers: whether a duplicate has copies of its own, so that it goes through a lane too.
        rate_limit: requests per minute of the whole batch.

    Attributes:
        rows: what became of requests, in the order in which that was known; to be taken by the caller.
        to_look_up: requests that are over the budget, of which it is not known whether they cost anything.
        lost_for_good: requests whose task runs broke down, to be given to `found` with what the ledger says.
    """

    def __init__(
        self,
        sizing: Sizing,
        shared: Shared,
        api_origin: str,
        *,
        delivers: bool = False,
        rate_limit: float | None = None,
    ) -> None:
        self.sizing = sizing
        self.rows: deque[Done] = deque()
        self.to_look_up: deque[Item] = deque()
        self.lost_for_good: deque[Lost] = deque()
        self._shared = shared
        self._stop = shared.stop
        self._spending = shared.limits.spending
        self._api_origin = api_origin
        self._delivers = delivers
        self._rate = rate_limit
        self._source_ended = False
        self._ready: deque[Item] = deque()  # looked at before what comes from the source
        self._came: deque[Item] = deque()
        self._filling: list[Item] = []  # taken for the next lane, and in none yet
        self._filled_at = 0.0  # when that lane begins, though its items are few
        self._followers: dict[str, list[Item]] = {}  # by the hash under way that they wait for
        self._open: dict[int, Item] = {}  # in a lane, and not back yet
        self._lanes: dict[Lane, float] = {}  # and when each began
        self._begun = 0  # lanes
        self._seen = 0  # from the source

    @property
    def open_lanes(self) -> int:
        """How many lanes have not returned."""
        return len(self._lanes)

    @property
    def open_elsewhere(self) -> bool:
        """Whether lanes in other processes have not returned."""
        return bool(self._lanes) and not self.sizing.local

    @property
    def in_flight(self) -> int:
        """How many requests are under way; an estimate where lanes run in other processes."""
        if self.sizing.local:
            return self._shared.limits.in_flight
        return min(len(self._open), self._widths)

    @property
    def at_hand(self) -> int:
        """How many requests wait to be looked at."""
        return len(self._came) + len(self._ready)

    @property
    def cancelled(self) -> bool:
        """Whether whoever asked for the batch waits no longer."""
        return self._stop.cancelled

    @property
    def finished(self) -> bool:
        """Whether each request that came has its row, and no more will come."""
        at_hand = self._ready or self._came or self._filling or self.to_look_up or self.lost_for_good
        return self._source_ended and not at_hand and not self._lanes

    def came(self, found: Item | Done) -> None:
        """Take a request from the source, or the row of one that needs no lane."""
        self._seen += 1
        if isinstance(found, Done):
            self._learn(found)
            self.rows.append(found)
        else:
            self._came.append(found)

    def source_ended(self) -> None:
        """Note that the source gives no more."""
        self._source_ended = True

    def looked_up(self, item: Item, *, recorded: bool) -> None:
        """Go on with a request over the budget: one that is recorded already costs nothing."""
        if recorded:
            self._filling.append(replace(item, may_pay=False))
            self._filled_at = 0.0
        else:
            denial = self._spending.denial(item.request)
            why = denial.why if denial else "the budget is used up"
            for denied in (item, *self._followers.pop(item.request.request_hash, ())):
                self._skip(denied, skipped(denied, self._api_origin, why, "BudgetExceeded"))

    def next_lane(self, now: float) -> Lane | None:
        """Return the lane to be submitted now, or None where there is no room or nothing to do for now."""
        if self._stop.reason:
            self._skip_the_rest()
            return None
        if not self._has_room():
            return None
        size = self.sizing.size(self._rest(), self._under_way(now))
        while len(self._filling) < size and (item := self._next_item()):
            if not self._filling:
                self._filled_at = now + _FILLING
            self._filling.append(item)
        more_may_come = not (len(self._filling) >= size or self._ready or self._came or self._source_ended)
        if not self._filling or (more_may_come and now < self._filled_at):
            return None
        lane = self._lane(tuple(self._filling))
        self._filling = []
        self._open.update((item.row, item) for item in lane.items)
        self._lanes[lane] = now
        self._begun += 1
        return lane

    def withdraw(self, lane: Lane) -> None:
        """Take a lane back that no task runner took."""
        del self._lanes[lane]
        for item in lane.items:
            del self._open[item.row]
        self._filling = [*lane.items, *self._filling]

    def wait(self, now: float) -> float | None:
        """Return the seconds after which a lane may begin though its items are few; None: only events matter."""
        return max(0.0, self._filled_at - now) if self._filling and self._has_room() else None

    def returned(self, lane: Lane, results: Sequence[Done | None], seconds: float) -> None:
        """Take the rows of a lane that has ended.

        Args:
            results: in the order of its items; None for one that is to be tried again.
            seconds: that the lane took.
        """
        if lane not in self._lanes:
            return  # the batch was left before
        del self._lanes[lane]
        self._shared.returned(lane)
        if ended := sum(result is not None for result in results):
            self.sizing = replace(self.sizing, pace=self.sizing.measured(ended, seconds))
        for item, done in zip(lane.items, results, strict=True):
            if lane.elsewhere:
                self._settle(item, done)
            if done is None or self._is_left_over(item, done):
                self._try_again(item)
            elif done.row.status == "skipped" and item.lost_in:
                self._give_up(item, done, "")
            else:
                self._end(item, done)
        self._sort()

    def lost(self, lane: Lane, why: str, task_run_id: str = "") -> None:
        """Take back the items of a lane whose task run broke down.

        Those of a lane elsewhere go on in another one, which finds in the ledger what became of them; after that is
        lost, too, they are given up.
        """
        if lane not in self._lanes:
            return  # the batch was left before
        del self._lanes[lane]
        known = self._shared.known()
        self._shared.returned(lane)
        judged = False
        for item in lane.items:
            done = known.get(item.row)
            if done is None:
                done = lost(item, self._api_origin, why)
                if not judged:  # a task run that breaks down is one failure
                    self._shared.judge(done.row)
                    judged = True
                if lane.elsewhere:
                    self._lost_elsewhere(replace(item, lost_in=(*item.lost_in, task_run_id)), why)
                    continue
                if item.may_pay and item.row not in known:
                    self._spending.settle(item.request, done.images_paid, None)
            self._end(item, done)
        self._sort()

    def _lost_elsewhere(self, item: Item, why: str) -> None:
        if item.may_pay:
            self._spending.settle(item.request, 0, None)
        if len(item.lost_in) < _LOSSES and not self._stop.reason:
            self._try_again(item)
        else:
            self._give_up(item, never_sent(item, self._api_origin, why), why)

    def _give_up(self, item: Item, unsent: Done, why: str) -> None:
        """Leave it to the ledger what became of an item; `unsent` is its row where it was never sent."""
        self._open.pop(item.row, None)
        self.lost_for_good.append(Lost(item, unsent, why))

    def found(self, item: Item, done: Done) -> None:
        """Take what became of an item that was given up."""
        self._learn(done)
        self._spending.count(item.request, done.images_paid, _usage(done))
        self.rows.append(done)
        for follower in self._followers.pop(item.request.request_hash, ()):
            self._follow(follower, done)

    def _sort(self) -> None:
        self._ready = deque(sorted(self._ready, key=lambda item: item.row))

    def leave(self) -> None:
        """Tell what is known of the requests that nobody waits for any longer."""
        known = self._shared.known()  # looked at once: what ends meanwhile has told its outcome
        elsewhere = {item.row for lane in self._lanes if lane.elsewhere for item in lane.items}
        stop = self._stop
        for item in list(self._open.values()):
            done = known.get(item.row)
            if done is None and (item.row in known or item.row in elsewhere):
                done = perhaps_under_way(item, self._api_origin, stop.error_type)
            self._end(item, done or skipped(item, self._api_origin, stop.reason, stop.error_type))
        self._lanes = {}
        self._skip_the_rest()

    def _lane(self, items: tuple[Item, ...]) -> Lane:
        sizing = self.sizing
        if sizing.local:
            return Lane(items, sizing.width)
        share = self._spending.share(item.request for item in items if item.may_pay)
        width = min(sizing.width, sizing.enough - self._widths)  # together never more than max_in_flight
        rate = self._rate and self._rate / sizing.most
        return Lane(items, width, share, rate, rate_unused=sizing.most == 1 and not self._begun)

    @property
    def _widths(self) -> int:
        return sum(lane.width for lane in self._lanes)

    def _under_way(self, now: float) -> float:
        """Return how many requests lanes elsewhere still have to do, at the pace measured so far."""
        pace = self.sizing.pace
        if self.sizing.local or pace is None:
            return sum(len(lane.items) for lane in self._lanes)
        return sum(max(0.0, len(lane.items) - (now - began) / pace) for lane, began in self._lanes.items())

    def _has_room(self) -> bool:
        sizing = self.sizing
        if len(self._lanes) >= sizing.most:
            return False
        at_work = sum(min(sizing.width, len(lane.items)) for lane in self._lanes) - self._shared.idle
        return not sizing.local or at_work < sizing.enough

    def _rest(self) -> int | None:
        total = self.sizing.total
        return None if total is None else total - self._seen + self.at_hand + len(self._filling)

    def _next_item(self) -> Item | None:
        """Return the next item to be sent, or None where there is none for now; what isn't sent becomes a row."""
        while self._ready or self._came:
            item = self._ready.popleft() if self._ready else self._came.popleft()
            request = item.request
            if (followers := self._followers.get(request.request_hash)) is not None:
                followers.append(item)
            elif item.known_absent and (why := self._shared.limits.barred.get(request.model)):
                self._skip(item, skipped(item, self._api_origin, why, ModelNotPermittedError.__name__))
            elif (denial := self._spending.reserve(request)) is None:
                self._followers[request.request_hash] = []
                return item
            elif not denial.final:  # what is under way may turn out to be free, or cheap
                self._ready.appendleft(item)
                return None
            elif item.known_absent:
                self.looked_up(item, recorded=False)
            else:
                self._followers[request.request_hash] = []
                self.to_look_up.append(item)
                return None
        return None

    def _skip_the_rest(self) -> None:
        """Make rows of all requests that are in no lane: nothing more is sent."""
        waiting = [*self._filling, *self._ready, *self._came, *self.to_look_up]
        for item in self._filling:
            if item.may_pay:
                self._spending.settle(item.request, 0, None)
        for item in (*self._filling, *self.to_look_up):
            waiting.extend(self._followers.pop(item.request.request_hash))
        self._filling = []
        self._ready.clear()
        self._came.clear()
        self.to_look_up.clear()
        stop = self._stop
        for item in waiting:
            self._skip(item, skipped(item, self._api_origin, stop.reason, stop.error_type))

    def _skip(self, item: Item, unsent: Done) -> None:
        """Make the row of an item that is in no lane: not sent, unless a task run that had it broke down."""
        if item.lost_in:
            self._give_up(item, unsent, "")
        else:
            self.rows.append(unsent)

    def _settle(self, item: Item, done: Done | None) -> None:
        """Count what an item of a lane elsewhere cost, and judge its failure; lanes here have done so themselves."""
        if done is not None:
            self._shared.judge(done.row)
        if item.may_pay and done is None:
            self._spending.settle(item.request, 0, None)
        elif item.may_pay and done is not None:
            self._spending.settle(item.request, done.images_paid, _usage(done))

    def _is_left_over(self, item: Item, done: Done) -> bool:
        """Return whether an item was only not sent as others were dearer than expected: it has another turn."""
        return done.row.error_type == "BudgetExceeded" and item.may_pay and self._stop.reason is None

    def _learn(self, done: Done) -> None:
        """Take what is paid for already as a measure of what such images cost."""
        row = done.row
        if row.status == "cached" and row.request is not None:
            self._spending.learn(row.request, len(row.images), row.usage)

    def _try_again(self, item: Item) -> None:
        del self._open[item.row]
        self._ready.extend([item, *self._followers.pop(item.request.request_hash)])

    def _end(self, item: Item, done: Done) -> None:
        del self._open[item.row]
        self._learn(done)
        self.rows.append(done)
        for follower in self._followers.pop(item.request.request_hash):
            self._follow(follower, done)

    def _follow(self, follower: Item, leader: Done) -> None:
        """Give a duplicate its leader's images, and copies of its own; where the leader has none it has none either."""
        row = row_of(follower, self._api_origin)
        if leader.row.error_type == KeyTakenError.__name__ and not leader.row.images:
            self._ready.append(follower)  # which has a key of its own
        elif not leader.row.images:
            outcome = leader.row.model_dump(include={"status", "error", "error_type"})
            self.rows.append(Done(row.model_copy(update=outcome)))
        elif self._delivers:
            self._ready.append(replace(follower, known_absent=False))
        else:
            self.rows.append(Done(leader.row.again(row.row, values=row.values)))
