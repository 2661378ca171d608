"""Sending a request until it is answered, or may not be sent again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from prefect_ttapi.errors import Outcome, TTAPIError
from prefect_ttapi.wire.outcomes import Again, RetryPolicy, Verdict

log: Final = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: From the least to the most likely to have been paid.
_BY_DOUBT: Final = (
    Outcome.NEVER_DELIVERED,
    Outcome.REJECTED,
    Outcome.REFUSED,
    Outcome.SERVER_FAULT,
    Outcome.UNUSABLE,
    Outcome.UNKNOWN,
)


@dataclass(frozen=True)
class Clock:
    """Time and chance. Tests bring their own.

    Attributes:
        monotonic: seconds that only grow.
        now: Unix seconds.
        sleep: waits that many seconds; what it raises ends the request.
        jitter: a random number from 0 to its argument.
    """

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[float], float] = lambda most: random.uniform(0, most)  # noqa: S311 - no secret


@dataclass(frozen=True)
class Failure:
    """An attempt that gave no answer; `message` is fit to be shown."""

    verdict: Verdict
    message: str
    status_code: int | None = None
    request_id: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True)
class Answered(Generic[Answer]):
    """An answer, and what became of the attempts before it."""

    answer: Answer
    earlier: tuple[Outcome, ...]
    started: float

    @property
    def attempts(self) -> int:
        return len(self.earlier) + 1


def attempt(
    send: Callable[[int], Answer | Failure],
    *,
    name: str,
    policy: RetryPolicy,
    clock: Clock,
    before_send: Callable[[int], None] | None,
) -> Answered[Answer]:
    """The answer that `send` gives, calling it as often as `policy` allows.

    Args:
        send: called with 1, 2, ...
        name: what the log calls the request.
        before_send: called with 1, 2, ... right before each send; what it raises ends the request.

    Raises:
        TTAPIError: no attempt was answered. Its class is the last attempt's; its outcome is the most
            doubtful of all attempts', since any of them may have been paid.
    """
    started = clock.monotonic()
    past: list[Verdict] = []
    while True:
        number = len(past) + 1
        if before_send is not None:
            before_send(number)
        answer = send(number)
        elapsed = clock.monotonic() - started
        outcomes = tuple(verdict.error.outcome for verdict in past)
        if not isinstance(answer, Failure):
            log.info("%s: attempt %d was answered after %.1f s", name, number, elapsed)
            return Answered(answer, outcomes, started)
        past.append(answer.verdict)
        step = policy.next_step(past, retry_after=answer.retry_after, elapsed=elapsed, jitter=clock.jitter)
        log.warning(
            "%s: attempt %d failed (%s; outcome: %s): %s; %s",
            name,
            number,
            f"HTTP {answer.status_code}" if answer.status_code else "no answer",
            answer.verdict.error.outcome,
            answer.message,
            step,
        )
        if step.wait is None:
            why = None if answer.verdict.again is Again.NEVER else step.why
            raise failed(answer, outcomes, elapsed, not_resent=why)
        clock.sleep(step.wait)


def failed(
    failure: Failure, earlier: tuple[Outcome, ...], elapsed: float, not_resent: str | None = None
) -> TTAPIError:
    """The error that a request's last failure ends in."""
    cls = failure.verdict.error
    return cls(
        failure.message,
        status_code=failure.status_code,
        request_id=failure.request_id,
        outcome=max((*earlier, cls.outcome), key=_BY_DOUBT.index),
        attempts=len(earlier) + 1,
        elapsed=elapsed,
        retry_after=failure.retry_after,
        not_resent=not_resent,
    )
