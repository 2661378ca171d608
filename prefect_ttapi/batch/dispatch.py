"""Decide which requests go into the next lane, and make the row of each request (sans-IO, for one thread).

A lane is a task run. `width` of its requests are under way side by side, and it returns the rows of all of them.
Requests come from a source, wait for room in a lane, and leave as exactly one row each. A request that stands in the
batch more than once is sent once: the later ones wait until the first is back, and then have its images, or fail with
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from prefect_ttapi.batch.items import Done, Item, lost, never_sent, row_of, skipped, unsure
from prefect_ttapi.batch.lanes import Lane, Shared
from prefect_ttapi.batch.options import BatchOptions, Sizing
from prefect_ttapi.errors import BudgetExceeded, KeyTakenError, ModelNotPermittedError
from prefect_ttapi.results import Usage

#: Task runs in which a request may be lost before it is given up.
_LOSSES: Final = 2

#: Seconds for which a lane waits for a slow source to fill it.
_FILLING: Final = 0.5


#: What is known of a request that nobody waits for any longer.
_UNDER_WAY: Final = "it was under way when the batch ended: if it is answered yet, the ledger will know"


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
    """Return the usage of an answer; None where there is no answer."""
    return done.row.usage or (Usage() if done.row.images else None)


class Dispatch:
    """Hands requests to lanes and collects their rows.

    Args:
        sizing: how the batch is cut into lanes.
        shared: the budget, the breaker and the stop of the batch.
        api_origin: who answers, for the rows.
        options: of the batch.

    Attributes:
        stop: why nothing more is sent, once there is a reason.
        rows: what became of requests, in the order in which that was known; to be taken by the caller.
        lost_for_good: requests whose task runs broke down, to be given to `found` with what the ledger says.
    """

    def __init__(self, sizing: Sizing, shared: Shared, api_origin: str, options: BatchOptions) -> None:
        self.sizing = sizing
        self.rows: deque[Done] = deque()
        self.lost_for_good: deque[Lost] = deque()
        self._shared = shared
        self.stop = shared.stop
        self._spending = shared.limits.spending
        self._api_origin = api_origin
        self._rate = options.rate_limit
        # a duplicate has copies of its own, so that it goes through a lane, too
        self._delivers = options.deliver_to is not None
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
    def finished(self) -> bool:
        """Whether each request that came has its row, and no more will come."""
        at_hand = self._ready or self._came or self._filling or self.lost_for_good
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

    def next_lane(self, now: float) -> Lane | None:
        """Return the lane to be submitted now, or None where there is no room or nothing to do for now."""
        if self.stop.reason:
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
        """Take back a lane that no task runner took."""
        del self._lanes[lane]
        self._shared.close(lane)  # if it was taken all the same, it sends nothing
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
            self.sizing = self.sizing.measured(ended, seconds)
        for item, done in zip(lane.items, results, strict=True):
            if lane.elsewhere or done is None:
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
        known = {} if lane.elsewhere else self._shared.close(lane)
        judged = False
        for item in lane.items:
            done = known.get(item.row)
            if done is None:
                begun = lane.elsewhere or item.row in known
                done = (lost if begun else never_sent)(item, self._api_origin, why)
                if not judged:  # a task run that breaks down is one failure
                    self._shared.judge(done.row)
                    judged = True
                if lane.elsewhere:
                    self._lost_elsewhere(replace(item, lost_in=(*item.lost_in, task_run_id)), why)
                    continue
                if item.may_pay and not begun:
                    self._spending.settle(item.request, 0, None)
            self._end(item, done)
        self._sort()

    def _lost_elsewhere(self, item: Item, why: str) -> None:
        self._settle(item, None)
        if len(item.lost_in) < _LOSSES and not self.stop.reason:
            self._try_again(item)
        else:
            self._give_up(item, never_sent(item, self._api_origin, why), why)

    def _give_up(self, item: Item, unsent: Done, why: str) -> None:
        """Leave an item to the ledger, which knows its outcome; `unsent` is its row if it was never sent."""
        self._open.pop(item.row, None)
        self.lost_for_good.append(Lost(item, unsent, why))

    def found(self, item: Item, done: Done) -> None:
        """Take the outcome of an item that was given up."""
        self._spending.count(item.request, done.images_paid, _usage(done))
        self._tell(item, done)

    def _sort(self) -> None:
        self._ready = deque(sorted(self._ready, key=lambda item: item.row))

    def leave(self) -> None:
        """Make the rows of requests that nobody waits for any longer, by what is known of them."""
        known = self._shared.known()  # looked at once: what ends meanwhile has told its outcome
        for item in list(self._open.values()):
            done = known.get(item.row)
            begun = item.row in known or not self.sizing.local
            if done is None and begun and not item.surely_unsent:
                done = unsure(item, self._api_origin, _UNDER_WAY, self.stop.error_type)
            self._end(item, done or skipped(item, self._api_origin, self.stop.reason, self.stop.error_type))
        self._lanes = {}
        self._skip_the_rest()
        self._shared.left.set("the batch was left")

    def _lane(self, items: tuple[Item, ...]) -> Lane:
        sizing = self.sizing
        if sizing.local:
            return Lane(items, sizing.width, expected=len(items) * (sizing.pace or 0.0))
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
                self._skip(item, why, ModelNotPermittedError.__name__)
            elif (denial := self._spending.reserve(request)) is None:
                self._followers[request.request_hash] = []
                return item
            elif not denial.final:  # what is under way may turn out to be free, or cheap
                self._ready.appendleft(item)
                return None
            elif item.known_absent:
                self._skip(item, denial.why, BudgetExceeded.__name__)
            else:  # it may be paid for already, and its lane sends nothing
                self._followers[request.request_hash] = []
                return replace(item, denied=denial.why)
        return None

    def _skip_the_rest(self) -> None:
        """Make rows of all requests that are in no lane: nothing more is sent."""
        waiting = [*self._filling, *self._ready, *self._came]
        for item in self._filling:
            self._settle(item, None)
            waiting.extend(self._followers.pop(item.request.request_hash))
        for emptied in (self._filling, self._ready, self._came):
            emptied.clear()
        for item in waiting:
            self._skip(item, self.stop.reason, self.stop.error_type)

    def _skip(self, item: Item, why: str | None, error_type: str | None) -> None:
        """Make the row of an item that is in no lane: not sent, unless a task run that had it broke down."""
        unsent = skipped(item, self._api_origin, why, error_type)
        if item.lost_in:
            self._give_up(item, unsent, "")
        else:
            self.rows.append(unsent)

    def _settle(self, item: Item, done: Done | None) -> None:
        """Count what an item of a lane elsewhere cost, and judge its failure; lanes here have done so themselves."""
        if done is not None:
            self._shared.judge(done.row)
        if item.may_pay:
            paid, usage = (done.images_paid, _usage(done)) if done else (0, None)
            self._spending.settle(item.request, paid, usage)

    def _is_left_over(self, item: Item, done: Done) -> bool:
        """Return whether an item was only not sent as others were dearer than expected: it has another turn."""
        return done.row.error_type == BudgetExceeded.__name__ and item.may_pay and self.stop.reason is None

    def _learn(self, done: Done) -> None:
        """Take the cost of a cached row as a measure for images of its kind."""
        row = done.row
        if row.status == "cached" and row.request is not None:
            self._spending.learn(row.request, len(row.images), row.usage)

    def _try_again(self, item: Item) -> None:
        del self._open[item.row]
        self._ready.extend([item, *self._followers.pop(item.request.request_hash)])

    def _end(self, item: Item, done: Done) -> None:
        del self._open[item.row]
        self._tell(item, done)

    def _tell(self, item: Item, done: Done) -> None:
        self._learn(done)
        self.rows.append(done)
        for follower in self._followers.pop(item.request.request_hash, ()):
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
