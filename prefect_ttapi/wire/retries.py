"""Sending a request until it is answered, or may not be sent again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from prefect_ttapi.errors import Outcome, TTAPIError
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.wire.clock import Clock
from prefect_ttapi.wire.limiter import Rejection, Turn
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


class Guard:
    """What one request asks right before bytes go to the API; this one lets everything pass until it is stopped.

    Args:
        stop: looked at before each send, and at least every half second while the request waits to be sent.
    """

    def __init__(self, stop: Stop | None = None) -> None:
        self.stop = stop or Stop()

    def admit(self, attempt: int) -> None:
        """Allow the first, second, ... send, before connecting; may wait.

        What it raises ends the request, and nothing is sent: a `StopSending` as the error of the attempt before,
        where there was one, anything else as it is.
        """

    def confirm(self) -> None:
        """Allow writing, now that the connection stands, which may have taken `connect_timeout`; must not wait.

        What it raises ends the request unwritten, as in `admit`.
        """


def attempt(
    send: Callable[[int], Answer | Failure],
    *,
    name: str,
    policy: RetryPolicy,
    clock: Clock,
    turn: Turn,
    guard: Guard,
) -> Answered[Answer]:
    """The answer that `send` gives, calling it as often as `policy` allows and at the pace of `turn`.

    Being one too many counts as an attempt only for the request because of which the pace slows down: the others of
    the same burst never had a chance. So for each rejection that doesn't count there is one that did.

    Args:
        send: called with 1, 2, ...; may raise `StopSending` as well, where nothing was written.
        name: what the log calls the request.
        turn: takes a place for each send, and keeps it for the answer.
        guard: asked right before each send.

    Raises:
        StopSending: the guard was stopped, or said so, before anything was sent.
        TTAPIError: no attempt was answered. Its class is the last attempt's; its outcome is the most
            doubtful of all attempts', since any of them may have been paid.
    """
    turn.take()
    _ask(guard, 1)
    started = clock.monotonic()  # it may have waited long for that
    answer = send(1)
    earlier: tuple[Outcome, ...] = ()
    counted: list[Verdict] = []
    while isinstance(answer, Failure):
        number = len(earlier) + 1
        elapsed = clock.monotonic() - started
        outcome = answer.verdict.error.outcome
        rejection = turn.rejected() if outcome is Outcome.REJECTED else None
        counts = rejection is not Rejection.IN_COMPANY
        counted += [answer.verdict] if counts else []
        step = policy.next_step(
            counted,
            retry_after=answer.retry_after,
            elapsed=elapsed,
            jitter=clock.jitter,
            counts=counts,
            backoff=rejection in (None, Rejection.ALONE),
        )
        log.log(
            logging.WARNING if counts else logging.DEBUG,
            "%s: attempt %d failed (%s; outcome: %s): %s; %s",
            name,
            number,
            f"HTTP {answer.status_code}" if answer.status_code else "no answer",
            outcome,
            answer.message,
            step,
        )
        asked_to_wait = answer.retry_after is not None and answer.verdict.again is not Again.NEVER
        everybody = rejection is not None or asked_to_wait
        if everybody:
            turn.hold(step.pause)
        if step.wait is None:
            why = None if answer.verdict.again is Again.NEVER else step.why
            raise failed(answer, earlier, elapsed, not_resent=why)
        try:
            if not everybody:
                turn.sleep(step.wait)
            turn.take()
            _check_time(policy, clock.monotonic() - started)
            _ask(guard, number + 1)
            following = send(number + 1)
        except StopSending as stop:
            raise failed(answer, earlier, clock.monotonic() - started, not_resent=str(stop)) from None
        earlier += (outcome,)
        answer = following
    turn.answered()
    log.info("%s: attempt %d was answered after %.1f s", name, len(earlier) + 1, clock.monotonic() - started)
    return Answered(answer, earlier, started)


def _ask(guard: Guard, number: int) -> None:
    guard.stop.check()  # first: what a guard admits it takes for sent
    guard.admit(number)


def _check_time(policy: RetryPolicy, elapsed: float) -> None:
    late = policy.too_late(elapsed)
    if late:
        raise StopSending(late)


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
