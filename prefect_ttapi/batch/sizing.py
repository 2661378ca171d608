"""How a batch is cut into lanes: how many are open, how wide each is, how many requests the next one gets (sans-IO).

A lane is a task run. `width` of its requests are under way side by side, and it returns the rows of all of them. Lanes
get shorter towards the end of a batch, so that none is left behind: guided self-scheduling, by Polychronopoulos and
Kuck, "Guided Self-Scheduling: A Practical Scheduling Scheme for Parallel Supercomputers", 1987.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

#: Up to so many requests, each has a task run of its own: a Prefect server takes about 20 a second.
SMALL: Final = 300

#: Seconds that a lane takes, at the pace measured so far: many enough for the server, few enough to be heard of soon.
SECONDS: Final = 15.0

#: Seconds that a lane takes at least, however near the end is: a task run costs the server some 50 ms.
_LEAST_SECONDS: Final = 1.0

#: A batch of quick requests is about so many task runs, if their lanes take up to twice `SECONDS` for that.
_TASK_RUNS: Final = 500

#: Requests of a lane, whatever the pace.
_LONGEST: Final = 512

#: Lanes in other processes, where nobody can tell how many task runs the engine has room for: any has room for two,
#: and while one of them ends the other goes on.
_ELSEWHERE: Final = 2

#: How many lanes may be open beyond those that are needed, where requests wait for other runs' claims.
_WAITING: Final = 64

#: How much of the newest lane's pace goes into what is expected of the next one.
_NEWEST: Final = 0.3


def workers(in_flight: int) -> int:
    """Return how many requests to work on, so that `in_flight` are with the API while others' images are stored.

    One at a time stays in order.

    >>> workers(1), workers(8), workers(32)
    (1, 12, 48)
    """
    return in_flight + in_flight // 2


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
    def of(cls, total: int | None, max_in_flight: int, shard_size: int | None, *, local: bool) -> Self:
        """Return the lanes of a batch with `total` requests, if that is known.

        >>> threads = Sizing.of(200, 8, None, local=True)
        >>> threads.width, threads.size(200)
        (1, 1)
        >>> processes = Sizing.of(200, 8, None, local=False)
        >>> processes.width, processes.most, processes.size(200)
        (4, 2, 4)
        """
        if local:
            # more than there are places, so that none waits for a task run to begin; one at a time keeps the order
            ahead = 0 if max_in_flight == 1 else max(2, max_in_flight // 4)
            width = min(shard_size or 1, max_in_flight)
            enough = workers(max_in_flight) + ahead
            return cls(True, width, enough, math.ceil(enough / width) + _WAITING, shard_size, total)
        width = math.ceil(max_in_flight / _ELSEWHERE)
        if shard_size is not None:
            width = min(width, shard_size)
        # lanes of equal width that together never have more than max_in_flight
        width = max(share for share in range(1, width + 1) if max_in_flight % share == 0)
        return cls(False, width, max_in_flight, max_in_flight // width, shard_size, total)

    def size(self, rest: int | None) -> int:
        """Return how many requests the next lane gets.

        Args:
            rest: requests that are in no lane yet, where that is known.

        >>> half_a_second = Sizing(True, width=1, enough=14, most=78, total=10_000, pace=0.5)
        >>> [half_a_second.size(rest) for rest in (10_000, 200, 40)]
        [30, 20, 20]
        >>> Sizing(True, width=1, enough=14, most=78, total=200, pace=0.001).size(200)
        1
        """
        if self.fixed is not None:
            return self.fixed
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

    def measured(self, requests: int, seconds: float) -> float:
        """Return the pace, now that a lane with so many requests took so many seconds."""
        newest = seconds / max(1, requests)
        return newest if self.pace is None else _NEWEST * newest + (1 - _NEWEST) * self.pace
