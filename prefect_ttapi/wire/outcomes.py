"""What became of a request, and from that whether and when it may be sent again (sans-IO).

| what happened                                        | outcome              | sent again                  |
|------------------------------------------------------|----------------------|-----------------------------|
| no connection, or the request not written in full    | never delivered      | up to `max_attempts`        |
| 429, 499                                             | rejected before work | up to `max_attempts` (*)    |
| 500, 502, 503                                        | server fault         | twice: three sends in all   |
| 504, 520-524, lost or silent after it was written    | unknown              | only where opted in         |
| any other 5xx                                        | unknown              | never                       |
| any other 4xx                                        | refused for good     | never                       |
| 1xx, 3xx; a 2xx that is no usable answer             | answered but unusable| never                       |

(*) Of a burst of requests that are rejected together, one rejection counts: see `retries`.

A request of which the last byte was not handed to the network can't have been worked on: its JSON is
incomplete.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final

from prefect_ttapi.errors import (
    APIConnectionError,
    AuthenticationError,
    InsufficientBalanceError,
    InvalidRequestError,
    InvalidResponseError,
    ModerationError,
    QueueFullError,
    RateLimitError,
    ServerError,
    TTAPIError,
    UnknownOutcomeError,
)


class Break(StrEnum):
    """Where the way to an answer broke."""

    CONNECTING = "no connection"
    SENDING = "the connection failed while the request was being written"
    SILENT = "the server fell silent after the request was sent"
    LOST = "the connection was lost after the request was sent"
    CUT = "the answer was cut short"


class Again(StrEnum):
    """Whether a request may be sent again; the value says why not."""

    FREELY = "max_attempts is reached"
    TWICE = "500, 502 and 503 are sent three times in all"
    OPTED_IN = "it may be paid, and retry_unknown_outcome is off"
    NEVER = "it would be refused, or paid, again"


@dataclass(frozen=True)
class Verdict:
    """What an attempt that failed means; its outcome is its error's."""

    error: type[TTAPIError]
    again: Again


NEVER_DELIVERED: Final = Verdict(APIConnectionError, Again.FREELY)
UNKNOWN: Final = Verdict(UnknownOutcomeError, Again.OPTED_IN)
UNUSABLE: Final = Verdict(InvalidResponseError, Again.NEVER)
MODERATED: Final = Verdict(ModerationError, Again.NEVER)
_REFUSED: Final = Verdict(InvalidRequestError, Again.NEVER)
_OTHER_FAULT: Final = Verdict(UnknownOutcomeError, Again.NEVER)

BREAKS: Final[Mapping[Break, Verdict]] = {
    Break.CONNECTING: NEVER_DELIVERED,
    Break.SENDING: NEVER_DELIVERED,
    Break.SILENT: UNKNOWN,
    Break.LOST: UNKNOWN,
    Break.CUT: UNKNOWN,
}

STATUSES: Final[Mapping[int, Verdict]] = {
    401: Verdict(AuthenticationError, Again.NEVER),
    402: Verdict(InsufficientBalanceError, Again.NEVER),
    403: Verdict(AuthenticationError, Again.NEVER),
    429: Verdict(RateLimitError, Again.FREELY),
    499: Verdict(QueueFullError, Again.FREELY),
    **dict.fromkeys((500, 502, 503), Verdict(ServerError, Again.TWICE)),
    **dict.fromkeys((504, 520, 521, 522, 523, 524), UNKNOWN),
}


def judge_status(status: int) -> Verdict:
    """What a status other than 2xx means.

    >>> judge_status(499).error.__name__, judge_status(307).error.__name__
    ('QueueFullError', 'InvalidResponseError')
    """
    by_class = {4: _REFUSED, 5: _OTHER_FAULT}
    return STATUSES.get(status, by_class.get(status // 100, UNUSABLE))


@dataclass(frozen=True)
class Step:
    """What to do after a failed attempt: send again after `wait` seconds, or stop, and `why`.

    `pause`: seconds for which other requests should not be sent either, where the API said something about them all.
    """

    wait: float | None
    why: str = ""
    pause: float = 0.0

    def __str__(self) -> str:
        return f"not sent again: {self.why}" if self.wait is None else f"sent again in {self.wait:.1f} s"


@dataclass(frozen=True)
class RetryPolicy:
    """Whether and when to send again.

    Args:
        max_attempts: sends in all, at least 1.
        retry_unknown_outcome: also where the request may have been worked on, and paid.
        retry_after_ceiling: the longest wait, in seconds, that the API may ask for.
        total_timeout: seconds from the first send after which none is begun; one under way is never cut off,
            since it may be paid already. None: no limit.
        backoff: seconds; before send k + 1 the wait is random between 0 and `backoff` * 2**(k - 1).
        backoff_ceiling: the longest such wait in seconds.

    Raises:
        ValueError: an argument makes no sense.
    """

    max_attempts: int = 4
    retry_unknown_outcome: bool = False
    retry_after_ceiling: float = 120.0
    total_timeout: float | None = None
    backoff: float = 1.0
    backoff_ceiling: float = 30.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError("max_attempts must be at least 1")
        for name in ("retry_after_ceiling", "total_timeout", "backoff", "backoff_ceiling"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of seconds, 0 or more")

    def next_step(
        self,
        past: Sequence[Verdict],
        *,
        retry_after: float | None,
        elapsed: float,
        jitter: Callable[[float], float],
        counts: bool = True,
        backoff: bool = True,
    ) -> Step:
        """What to do after the attempts in `past`, of which the last has just failed.

        Args:
            past: those that count; without the last one where that does not.
            retry_after: seconds that the API asked to wait.
            elapsed: seconds since the first attempt began.
            jitter: a random number from 0 to its argument.
            counts: False: it was rejected together with others, of which one counted.
            backoff: False: requests are sent more slowly by other means.
        """
        bearable = retry_after is None or retry_after <= self.retry_after_ceiling
        asked = retry_after or 0.0 if bearable else 0.0
        exhausted = self._exhausted(past, counts)
        if exhausted:
            return Step(None, exhausted, asked)
        if not bearable:
            ceiling = f"retry_after_ceiling ({self.retry_after_ceiling:g} s)"
            return Step(None, f"the API asks to wait {retry_after:.0f} s, which is more than {ceiling}")
        # the wait that was asked for is the same for every caller: jitter spreads them here, too
        wait = asked + jitter(self._backoff(len(past))) if backoff else asked
        late = self.too_late(elapsed + wait)
        return Step(None, late, asked) if late else Step(wait, pause=wait)

    def too_late(self, elapsed: float) -> str | None:
        """Why nothing is sent `elapsed` seconds after the first attempt began; None where it may be."""
        if self.total_timeout is None or elapsed < self.total_timeout:
            return None
        return f"total_timeout ({self.total_timeout:g} s) would be over"

    def _exhausted(self, past: Sequence[Verdict], counts: bool) -> str | None:
        """Why there is no further attempt, where there have been enough."""
        if len(past) >= self.max_attempts or self.max_attempts == 1:
            return Again.FREELY
        if not counts:
            return None
        again = past[-1].again
        allowed = {
            Again.FREELY: self.max_attempts,
            Again.TWICE: 3,
            Again.OPTED_IN: self.max_attempts if self.retry_unknown_outcome else 1,
            Again.NEVER: 1,
        }[again]
        return again if sum(verdict.again is again for verdict in past) >= allowed else None

    def _backoff(self, sends: int) -> float:
        return min(self.backoff_ceiling, self.backoff * 2.0 ** min(sends - 1, 60))


#: A longer Retry-After is no request to wait but a mistake, and ignored like one that can't be read.
ABSURD_SECONDS: Final = 7 * 24 * 3600.0

_SECONDS: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20}", re.ASCII)


def read_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that `headers` (names in lower case) ask to wait; None where they don't, or make no sense.

    `retry-after-ms` goes before `retry-after`, which is in seconds or a date. A date is compared with the
    answer's own `date`, where there is one, since the clocks of two machines may differ.

    Args:
        now: Unix seconds.

    >>> read_retry_after({"retry-after": "1.5"}, now=0), read_retry_after({"retry-after": "-1"}, now=0)
    (1.5, None)
    >>> read_retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=15)
    45.0
    """
    milliseconds = _seconds(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        wait: float | None = milliseconds / 1000
    else:
        asked = headers.get("retry-after", "")
        wait = _seconds(asked)
        date = _timestamp(asked)
        if wait is None and date is not None:
            wait = date - (_timestamp(headers.get("date", "")) or now)
    return wait if wait is not None and 0 <= wait <= ABSURD_SECONDS else None


def _seconds(text: str) -> float | None:
    number = text.strip()
    return float(number) if _SECONDS.fullmatch(number) else None


def _timestamp(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # what hostile dates make the parser raise
        return None
