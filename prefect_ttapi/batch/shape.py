"""How a batch is cut into task runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

from prefect_ttapi.batch.session import workers

#: A batch makes at most about this many task runs by itself: a Prefect server takes about 20 a second.
TASK_RUNS: Final = 300

#: Where nobody knows how many requests there will be, shards double in size after so many; up to the second figure.
_DOUBLE_AFTER: Final = 50
_LARGEST: Final = 512


#: How many more shards may be open where items wait for somebody else's claims; each is a thread.
_WAITING: Final = 64


@dataclass(frozen=True)
class Shape:
    """Of one batch.

    Attributes:
        local: shards run in threads of this process and share its workers; else each has a share of them.
        slots: how many shards are open at once at most.
        in_flight: requests that are under way at once in a shard with workers of its own.
        enough: with so many items open, beside those that wait for somebody else's claim, no worker is idle.
        fixed_size: requests per shard, where it is known.
    """

    local: bool
    slots: int
    in_flight: int
    enough: int
    fixed_size: int | None

    @classmethod
    def of(cls, total: int | None, max_in_flight: int, shard_size: int | None, *, local: bool) -> Self:
        """Of a batch with `total` requests, if that is known.

        >>> Shape.of(200, 8, None, local=True).size(0), Shape.of(10_000, 8, None, local=True).size(0)
        (1, 34)
        >>> unknown = Shape.of(None, 8, None, local=True)
        >>> [unknown.size(shards) for shards in (0, 49, 50, 500)]
        [1, 1, 2, 512]
        """
        size = shard_size or (total and math.ceil(total / TASK_RUNS)) or (None if total is None else 1)
        # several shards in other processes, so that the end of one is no pause
        most = min(size or max_in_flight, math.ceil(max_in_flight / 4))
        in_flight = max(share for share in range(1, most + 1) if max_in_flight % share == 0)
        # more than the workers can take, so that none waits for a task run to begin; one at a time keeps the order
        ahead = 0 if max_in_flight == 1 else max(2, max_in_flight // 4)
        enough = workers(max_in_flight) + ahead
        return cls(
            local=local,
            slots=enough + _WAITING if local else max_in_flight // in_flight,
            in_flight=in_flight,
            enough=enough,
            fixed_size=size,
        )

    def size(self, submitted: int) -> int:
        """Requests in the next shard, after so many."""
        least = 1 if self.local else self.in_flight
        return self.fixed_size or max(least, min(2 ** (submitted // _DOUBLE_AFTER), _LARGEST))
