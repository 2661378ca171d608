"""The retry policy, and the sends of one request until it is answered or may not be sent again (sans-IO)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from prefect_ttapi.api.limiter import Clock, Pace, Rejection, Turn
from prefect_ttapi.api.outcomes import Again, Failure, Verdict
from prefect_ttapi.errors import Outcome, TTAPIError
from prefect_ttapi.results import RawAnswer
from prefect_ttapi.stopping import Stop, StopSending

log: Final = logging.getLogger(__name__)

#: Seconds: before send k + 1 the wait is random between 0 and the first of these times 2**(k - 1), at most the second.
_BACKOFF: Final = 1.0
_LONGEST_BACKOFF: Final = 30.0

#: From the least to the most likely to have been paid.
_BY_DOUBT: Final = (
    Outcome.NEVER_DELIVERED,
    Outcome.REJECTED,
    Outcome.REFUSED,
    Outcome.SERVER_FAULT,
    Outcome.UNUSABLE,
    Outcome.UNKNOWN,
)


class Guard:
    """What one request asks right before bytes go to the API; this one lets everything pass until it is stopped.

    Args:
        stop: looked at before each send, and at least every half second while the request waits to be sent.

    Attributes:
        in_hand: the answer that came, for whoever is interrupted while its images are fetched.
    """

    in_hand: RawAnswer | None = None

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

    def before_fetching(self, answer: RawAnswer) -> None:
        """Have an answer `in_hand` whose images are still to be fetched, should nobody live to have them.

        Raises nothing: the images are paid for.
        """
        self.in_hand = answer


@dataclass(frozen=True)
class Step:
    """What to do after a failed attempt: send again after `wait` seconds, or stop, and `why`.

    Attributes:
        pause: seconds for which other requests should not be sent either, where the API said something about them all.
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

    Raises:
        ValueError: an argument makes no sense.
    """

    max_attempts: int = 4
    retry_unknown_outcome: bool = False
    retry_after_ceiling: float = 120.0
    total_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError("max_attempts must be at least 1")
        for name in ("retry_after_ceiling", "total_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of seconds, 0 or more")

    def next_step(
        self,
        past: Sequence[Verdict],
        clock: Clock,
        *,
        retry_after: float | None,
        elapsed: float,
        rejection: Rejection | None = None,
    ) -> Step:
        """Return what to do after the attempts in `past`, of which the last has just failed.

        Args:
            past: those that count; without the last one where that was rejected together with others.
            clock: draws the jitter.
            retry_after: seconds that the API asked to wait.
            elapsed: seconds since the first attempt began.
            rejection: what the last attempt says of the pace, where it was one too many.
        """
        bearable = retry_after is None or retry_after <= self.retry_after_ceiling
        asked = retry_after or 0.0 if bearable else 0.0
        exhausted = self._exhausted(past, counts=rejection is not Rejection.IN_COMPANY)
        if exhausted:
            return Step(None, exhausted, asked)
        if not bearable:
            ceiling = f"retry_after_ceiling ({self.retry_after_ceiling:g} s)"
            return Step(None, f"the API asks to wait {retry_after:.0f} s, which is more than {ceiling}")
        slower_anyway = rejection in (Rejection.SLOWED, Rejection.IN_COMPANY)
        # the wait that was asked for is the same for every caller: jitter spreads them here, too
        wait = (
            asked
            if slower_anyway
            else asked + clock.jitter(min(_LONGEST_BACKOFF, _BACKOFF * 2.0 ** min(len(past) - 1, 60)))
        )
        late = self.too_late(elapsed + wait)
        return Step(None, late, asked) if late else Step(wait, pause=wait)

    def too_late(self, elapsed: float) -> str | None:
        """Return why nothing is sent `elapsed` seconds after the first attempt began, or None where it may be."""
        if self.total_timeout is None or elapsed < self.total_timeout:
            return None
        return f"total_timeout ({self.total_timeout:g} s) would be over"

    def _exhausted(self, past: Sequence[Verdict], counts: bool) -> str | None:
        """Return why there is no further attempt, where there have been enough."""
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


class Attempts:
    """The sends of one request, as often as `policy` allows and at the client's pace; a context for all of them.

    Being one too many counts as an attempt only for the request because of which the pace slows down: the others of
    the same burst never had a chance. So for each rejection that doesn't count there is one that did. A `StopSending`
    after a failure leaves the context as the error of that failure.

    Args:
        name: what the log calls the request.
        pace: gives a place to each send, kept until the answer is there, at most until the end of the context.
        guard: asked right before each send.

    Attributes:
        earlier: what became of the sends that failed.
        count: how often the request was sent or tried to be sent.
    """

    def __init__(self, name: str, policy: RetryPolicy, pace: Pace, guard: Guard) -> None:
        self.earlier: tuple[Outcome, ...] = ()
        self.count = 0
        self._name = name
        self._policy = policy
        self._clock = pace.clock
        self._turn = Turn(pace, guard.stop)
        self._guard = guard
        self._counted: list[Verdict] = []
        self._started = self._clock.monotonic()
        self._failure: Failure | None = None  # the last one, while another send may follow
        self._in_hand: RawAnswer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._turn.give_back()
        if isinstance(error, StopSending) and self._failure is not None:
            raise self.error(self._failure, str(error)) from None

    @property
    def elapsed(self) -> float:
        """Seconds since the first send was admitted, which may have taken long."""
        return self._clock.monotonic() - self._started

    def begin(self) -> None:
        """Wait until the request may be sent, again or for the first time.

        Raises:
            StopSending: the guard was stopped, or said so.
        """
        self._turn.take()
        late = self._policy.too_late(self.elapsed) if self.count else None
        if late:
            raise StopSending(late)
        self._guard.stop.check()  # first: what a guard admits it takes for sent
        self._guard.admit(self.count + 1)
        if not self.count:
            self._started = self._clock.monotonic()

    def answered(self) -> None:
        """Note that the request was answered: it is not sent again."""
        self.count += 1
        self._failure = None
        self._turn.answered()
        log.info("%s: attempt %d was answered after %.1f s", self._name, self.count, self.elapsed)

    def failed(self, failure: Failure) -> None:
        """Wait until the request may be sent again.

        Raises:
            StopSending: as `begin`.
            TTAPIError: it is not sent again. The class is the last attempt's; the outcome is the most doubtful of all
                attempts', since any of them may have been paid.
        """
        verdict, elapsed = failure.verdict, self.elapsed
        self.count += 1
        self.earlier += (verdict.error.outcome,)
        self._failure, self._in_hand = failure, failure.answer or self._in_hand
        rejection = self._turn.rejected() if verdict.error.outcome is Outcome.REJECTED else None
        counts = rejection is not Rejection.IN_COMPANY
        self._counted += [verdict] if counts else []
        step = self._policy.next_step(
            self._counted, self._clock, retry_after=failure.retry_after, elapsed=elapsed, rejection=rejection
        )
        log.log(
            logging.WARNING if counts else logging.DEBUG,
            "%s: attempt %d failed (%s; outcome: %s): %s; %s",
            self._name,
            self.count,
            f"HTTP {failure.status_code}" if failure.status_code else "no answer",
            verdict.error.outcome,
            failure.message,
            step,
        )
        final = verdict.again is Again.NEVER
        everybody = rejection is not None or (failure.retry_after is not None and not final)
        if everybody:
            self._turn.hold(step.pause)
        if step.wait is None:
            raise self.error(failure, None if final else step.why)
        self._turn.give_back()
        if not everybody:
            self._clock.sleep(step.wait, self._guard.stop)
        self.begin()

    def error(self, failure: Failure, not_resent: str | None = None) -> TTAPIError:
        """Return the error that the request ends in."""
        cls = failure.verdict.error
        return cls(
            failure.message,
            status_code=failure.status_code,
            request_id=failure.request_id,
            outcome=max((*self.earlier, cls.outcome), key=_BY_DOUBT.index),
            attempts=self.count,
            elapsed=self.elapsed,
            retry_after=failure.retry_after,
            not_resent=not_resent,
            answer=failure.answer or self._in_hand,
            taken_for=failure.verdict.taken_for,
        )
