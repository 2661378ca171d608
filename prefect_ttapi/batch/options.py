"""The options of a batch, as `generate_batch` and the command line share them, its lanes and its breaker.

Lanes get shorter towards the end of a batch, so that none is left behind: guided self-scheduling, by Polychronopoulos
and Kuck, "Guided Self-Scheduling: A Practical Scheduling Scheme for Parallel Supercomputers", 1987.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final, Self

from prefect_ttapi.errors import IllegalBatchError, ModelNotPermittedError, ModerationError
from prefect_ttapi.generation.budget import Budget
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.files import Provenance
from prefect_ttapi.generation.runs import GRACE, RunContext
from prefect_ttapi.images.renditions import Rendition, Version, versions_of
from prefect_ttapi.lineage.shown import Shown
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.store import ImageStore

#: Seconds that a lane takes: many enough for the server, few enough to be heard of soon.
SECONDS: Final = 15.0

#: Up to so many requests, each has a task run of its own: a Prefect server takes about 20 a second.
SMALL: Final = 300

#: Seconds that a lane takes at least, however near the end is: a task run costs the server some 50 ms.
_LEAST_SECONDS: Final = 1.0

#: So many requests may make a lane of that time: where these were quick, as they were paid for already, the next ones
#: may be slow.
_QUICK: Final = 32

#: Requests of a lane at most, where nobody knows how many are left.
_PART: Final = 128

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

#: How many lanes may be open beyond those that are needed, where requests wait for other runs' claims.
_WAITING: Final = 64

#: How much of the newest lane's pace goes into what is expected of the next one.
_NEWEST: Final = 0.3


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch is generated and delivered; `generate_batch` explains each option.

    >>> BatchOptions(max_in_flight=0, rate_limit=-1.0).check()
    Traceback (most recent call last):
        ...
    prefect_ttapi.errors.IllegalBatchError: nothing was sent: 2 problem(s) in the batch
      max_in_flight must be a whole number of at least 1, not 0
      rate_limit must be a number of requests per minute above 0, not -1.0
    """

    deliver_to: ImageStore | None = None
    key: str = DEFAULT_KEY
    max_in_flight: int = 8
    shard_size: int | None = None
    budget: Budget | None = None
    name: str = "batch"
    refresh_cache: bool | None = None
    cache_expiration: timedelta | None = None
    breaker: int | None = 10
    max_refused: int | None = 50
    rate_limit: float | None = None
    grace: float = GRACE
    thumbnails: bool = True
    renditions: Sequence[Rendition | Mapping[str, Any]] = ()
    keep_original: bool = True
    overwrite: bool = False
    provenance: Provenance | Mapping[str, Any] | None = None
    record_prompts: bool = True

    @cached_property
    def versions(self) -> tuple[Version, ...]:
        """The versions that are delivered of each image. ValueError: the renditions are illegal."""
        return versions_of(self.renditions, keep_original=self.keep_original)

    @cached_property
    def marking(self) -> Provenance | None:
        """The marks and signatures of delivered files. ValueError: they are illegal."""
        return None if self.provenance is None else Provenance.model_validate(self.provenance)

    @property
    def shown(self) -> Shown:
        """The rule for showing prompts."""
        return Shown(self.record_prompts)

    def delivery(
        self, date: datetime, run_id: str | None = None, source: ImageStore | None = None
    ) -> Delivery | None:
        """Return where and how images are delivered; None where they are not."""
        if self.deliver_to is None:
            return None
        return Delivery(
            self.deliver_to,
            self.key,
            batch=self.name,
            date=date,
            source=source,
            versions=self.versions,
            overwrite=self.overwrite,
            run_id=run_id,
            provenance=self.marking,
        )

    def check(self) -> None:
        """Raise IllegalBatchError where an option makes no sense, with a line for each."""
        problems = [
            f"{option} must be a whole number of at least 1, not {value!r}"
            for option in ("max_in_flight", "shard_size", "breaker", "max_refused")
            if type(value := getattr(self, option)) is not int or value < 1
            if value is not None or option == "max_in_flight"
        ]
        if self.rate_limit is not None and not 0 < self.rate_limit < math.inf:
            problems.append(
                f"rate_limit must be a number of requests per minute above 0, not {self.rate_limit}"
            )
        for argument, kind in ((self.deliver_to, ImageStore), (self.budget, Budget)):
            if argument is not None and not isinstance(argument, kind):
                problems.append(f"{kind.__name__} is needed, not {type(argument).__name__}")
        for option, made in (("renditions", "versions"), ("provenance", "marking")):
            try:
                getattr(self, made)
            except ValueError as error:
                problems.append(f"{option}: {error}")
        if problems:
            raise IllegalBatchError(problems)


@dataclass(frozen=True)
class Plan:
    """The facts that all lanes of a batch have in common; they travel to wherever the task runner runs a lane.

    Attributes:
        batch_id: names the batch within its process.
        run: the run that pays.
        options: of the batch.
        not_before: records older than this don't count.
        folder: of the batch, in the store.
    """

    batch_id: str
    run: RunContext
    options: BatchOptions
    not_before: datetime | None = None
    folder: str = ""


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
    def of(cls, options: BatchOptions, total: int | None, *, local: bool, slots: int | None = None) -> Self:
        """Return the lanes of a batch with `total` requests, if that is known.

        Args:
            slots: how many task runs the engine has room for at least, where that is known.

        >>> threads = Sizing.of(BatchOptions(), 200, local=True)
        >>> threads.width, threads.size(200)
        (1, 1)
        >>> processes = Sizing.of(BatchOptions(), 200, local=False)
        >>> processes.width, processes.most, processes.size(200)
        (4, 2, 32)
        """
        in_flight, fixed = options.max_in_flight, options.shard_size
        if local:
            # more than there are places, so that none waits for a task run to begin; one at a time keeps the order
            ahead = 0 if in_flight == 1 else max(2, in_flight // 4)
            width = min(fixed or 1, in_flight)
            enough = workers(in_flight) + ahead
            return cls(True, width, enough, math.ceil(enough / width) + _WAITING, fixed, total)
        slow = options.rate_limit is not None and options.rate_limit <= _ONE_LANE
        lanes = 1 if slow else min(_ELSEWHERE, slots or _ELSEWHERE)
        width = min(math.ceil(in_flight / lanes), fixed or in_flight)
        return cls(False, width, in_flight, math.ceil(in_flight / width), fixed, total)

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
        # their width is 1
        if self.pace is None or (self.total is not None and self.total <= SMALL):
            return 1
        pace = max(self.pace, 1e-6)
        part = _PART if rest is None else rest / (2 * self.enough)
        wanted = min(SECONDS / pace, max(part, min(_LEAST_SECONDS / pace, _QUICK)))
        few = (self.total or 0) / _TASK_RUNS
        if few * pace <= 2 * SECONDS:
            wanted = max(wanted, few)
        return max(1, int(min(wanted, _LONGEST)))

    def _size_elsewhere(self, rest: int | None, under_way: float) -> int:
        """Return the lane's part of all that is left, as far as it can get in its time, in whole rounds."""
        wanted = float(_ROUNDS * self.width)
        if self.pace is not None:
            wanted = max(wanted, _PLENTY * SECONDS / max(self.pace, 1e-6))
        if rest is not None:
            wanted = min(wanted, (rest + under_way) / self.most)
        # at the end of a lane no place in it is idle
        return max(1, math.ceil(min(wanted, _LONGEST) / self.width)) * self.width

    def measured(self, requests: int, seconds: float) -> Self:
        """Return the lanes from now on, after one with so many requests took so many seconds."""
        newest = seconds / requests
        pace = newest if self.pace is None else _NEWEST * newest + (1 - _NEWEST) * self.pace
        return replace(self, pace=pace)


class Breaker:
    """Counts failures of one kind in a row, and refused prompts apart; safe from all threads.

    Args:
        limit: this many trip it; None: never.
        refused: this many refused prompts trip it if none passes meanwhile; None: never.

    >>> breaker = Breaker(limit=2)
    >>> breaker.note("ServerError"), breaker.note("ModerationError"), breaker.note("ServerError")
    (None, None, '2 requests in a row failed with ServerError')
    """

    def __init__(self, limit: int | None = 10, refused: int | None = 50) -> None:
        self._limit = limit
        self._most_refused = refused
        self._lock = threading.Lock()
        self._kind: str | None = None
        self._in_a_row = 0
        self._refused = 0

    def note(self, error_type: str | None) -> str | None:
        """Count a request that has ended, in order of completion; return why to give the batch up, once that is due.

        Args:
            error_type: the name of the error's class; None: the request succeeded.
        """
        if error_type == ModelNotPermittedError.__name__:
            return None  # others may work
        with self._lock:
            if error_type == ModerationError.__name__:
                self._refused += 1
                if self._most_refused is None or self._refused < self._most_refused:
                    return None
                return f"{self._refused} prompts in a row were refused, and none passed"
            self._refused = self._refused if error_type else 0
            self._in_a_row = self._in_a_row + 1 if error_type == self._kind else 1
            self._kind = error_type
            if error_type is None or self._limit is None or self._in_a_row < self._limit:
                return None
            return f"{self._in_a_row} requests in a row failed with {error_type}"
