"""Sending again: how long is waited, what is logged, what the last error says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.api.outcomes import (
    BREAKS,
    SIGNS,
    UNKNOWN,
    UNREACHED,
    UNUSABLE,
    Again,
    Verdict,
    judge,
)
from prefect_ttapi.api.retries import Guard, RetryPolicy, Step
from prefect_ttapi.errors import (
    AuthenticationError,
    Outcome,
    QueueFullError,
    RateLimitError,
    ServerError,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.stopping import StopSending
from tests.api.conftest import KEY
from tests.support.clocks import StoppedClock
from tests.support.hostile import (
    HostileServer,
    Wire,
    answer,
    answered,
    close,
    cut,
    head,
    png,
    raw,
    reset,
    stall,
    then_close,
)

MakeClient = Callable[..., TTAPIClient]

CAT = ImageRequest(prompt="a cat")
GOOD = answer(200, answered(png()))
BUSY = answer(503, {"status": "FAILED", "message": "busy"})
SLOW_DOWN = answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "3"})


def test_failures_that_cost_nothing_are_outlasted(
    server: HostileServer, client: TTAPIClient, stopped: StoppedClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer tells how often was sent and why; the log has a line for each attempt with its reason."""
    server.play(SLOW_DOWN, answer(499, {"message": "full"}), BUSY, GOOD)
    with caplog.at_level(logging.INFO, "prefect_ttapi"):
        result = client.generate(CAT)
    assert result.attempts == len(server.requests) == 4
    assert result.earlier_outcomes == (Outcome.REJECTED, Outcome.REJECTED, Outcome.SERVER_FAULT)
    assert stopped.sleeps == [3 + 1, 2, 4]
    assert result.seconds == 10
    name = CAT.request_hash[:12]
    assert [message for message in caplog.messages if message.startswith(name)] == [
        f"{name}: attempt 1 failed (HTTP 429; outcome: rejected before work): slow down; sent again in 4.0 s",
        f"{name}: attempt 2 failed (HTTP 499; outcome: rejected before work): full; sent again in 2.0 s",
        f"{name}: attempt 3 failed (HTTP 503; outcome: server fault): busy; sent again in 4.0 s",
        f"{name}: attempt 4 was answered after 10.0 s",
    ]
    assert len({request.body for request in server.requests}) == 1


def test_the_last_error_carries_the_facts(server: HostileServer, client: TTAPIClient) -> None:
    """Attempts, time, the vendor's words, its id, and why it was not sent again."""
    server.play(answer(503, {"error": {"message": "busy"}}, {"x-request-id": "r-1"}))
    with pytest.raises(ServerError) as caught:
        client.generate(CAT)
    error = caught.value
    assert (error.message, error.status_code, error.request_id) == ("busy", 503, "r-1")
    assert (error.attempts, error.elapsed, error.outcome) == (3, 3.0, Outcome.SERVER_FAULT)
    assert str(error) == (
        "busy (HTTP 503, 3 attempts in 3.0 s, outcome: server fault, not sent again: "
        "500, 502 and 503 are sent three times in all, request id r-1)"
    )


def test_a_wait_over_the_ceiling_is_raised_at_once(
    server: HostileServer, client: TTAPIClient, stopped: StoppedClock
) -> None:
    """Whoever would have to wait too long hears it at once."""
    server.play(answer(429, {"message": "tomorrow"}, {"Retry-After": "3600"}), GOOD)
    with pytest.raises(RateLimitError, match=r"asks to wait 3600 s.*retry_after_ceiling \(120 s\)") as caught:
        client.generate(CAT)
    assert (caught.value.retry_after, caught.value.attempts, stopped.sleeps) == (3600, 1, [])
    assert len(server.requests) == 1


def test_the_total_timeout_ends_the_attempts(
    server: HostileServer, make_client: MakeClient, stopped: StoppedClock
) -> None:
    """With 10 seconds for all attempts, waits of 4 and 5 fit, another of 7 does not."""
    stopped.sleeps.clear()
    server.play(SLOW_DOWN)
    with pytest.raises(RateLimitError, match="total_timeout") as caught:
        make_client(total_timeout=10).generate(CAT)
    assert (stopped.sleeps, caught.value.elapsed) == ([4, 5], 9)


def test_the_doubt_of_an_earlier_attempt_stays(server: HostileServer, make_client: MakeClient) -> None:
    """A request whose first send may be paid is not "refused, not paid" because its second was refused."""
    server.play(BUSY, answer(401, {"message": "key revoked"}))
    with pytest.raises(AuthenticationError) as caught:
        make_client().generate(CAT)
    assert (caught.value.outcome, caught.value.attempts) == (Outcome.SERVER_FAULT, 2)
    server.play(close(), answer(499))
    with pytest.raises(QueueFullError) as full:
        make_client(retry_unknown_outcome=True).generate(CAT)
    assert (full.value.outcome, full.value.attempts) == (Outcome.UNKNOWN, 4)


def test_before_each_send_the_caller_is_asked(server: HostileServer, client: TTAPIClient) -> None:
    """A guard is asked about send 1, 2, ... and, connected, about each once more; what it raises ends the request."""

    class Listening(Guard):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[int | str] = []

        def admit(self, attempt: int) -> None:
            self.heard.append(attempt)

        def confirm(self) -> None:
            self.heard.append("connected")

    guard = Listening()
    server.play(BUSY, BUSY, GOOD)
    client.generate(CAT, guard)
    assert guard.heard == [1, "connected", 2, "connected", 3, "connected"]

    class OnlyOnce(Guard):
        def admit(self, attempt: int) -> None:
            if attempt == 2:
                raise LookupError("the lease is lost")

    server.play(BUSY, GOOD)
    with pytest.raises(LookupError, match="lease"):
        client.generate(CAT, OnlyOnce())
    assert len(server.requests) == 1


@pytest.mark.parametrize("asked", ["generate", "stream"])
def test_who_was_stopped_before_the_first_send_sends_nothing(
    server: HostileServer, client: TTAPIClient, asked: str
) -> None:
    """Whoever asks hears the reason as it was given."""
    guard = Guard()
    guard.stop.set("the account is empty")
    server.play(GOOD)
    with pytest.raises(StopSending, match="the account is empty"):
        client.generate(CAT, guard) if asked == "generate" else list(client.stream(CAT, guard))
    assert server.requests == []


def test_a_stop_ends_the_wait_before_a_repeated_send(server: HostileServer) -> None:
    """A wait of a minute ends within a second; the error is the last attempt's, and says why there was no other."""
    guard = Guard()

    def answer_and_stop(wire: Wire) -> bool:
        threading.Timer(0.1, guard.stop.set, ["interrupted"]).start()
        return answer(429, b"", {"Retry-After": "60"})(wire)

    server.play(answer_and_stop)
    with (
        TTAPIClient(KEY, server.url) as client,
        pytest.raises(RateLimitError, match="not sent again: interrupted") as caught,
    ):
        client.generate(CAT, guard)
    assert caught.value.elapsed < 5
    assert len(server.requests) == 1


def test_a_repeated_send_gets_a_new_connection(make_client: MakeClient) -> None:
    """A server that hangs up after a failure, without having said so, must not make an outcome unknown."""
    bad, fault = then_close(answer(429)), then_close(answer(502))
    with HostileServer(*[bad, fault, bad, GOOD] * 50) as server:
        client = make_client(base_url=server.url)
        for _ in range(50):
            assert client.generate(CAT).attempts == 4
        assert len(server.requests) == 200


BODY = answered(png())
UNCERTAIN = {
    "close": close(),
    "reset": reset(),
    "cut": cut(BODY, 50),
    "silent": stall(),
    "chunk": raw(head(200, {"Transfer-Encoding": "chunked"}) + b"5\r\nabc"),
    **{str(status): answer(status, b"?") for status in (408, 504, 520, 522, 524, 501, 507)},
    "failed": answer(200, {"status": "FAILED", "message": "?"}),
    "no image": answer(200, answered(b"?")),
}
SAFE = {
    "429": answer(429, b"", {"Retry-After": "1"}),
    "499": answer(499),
    "500": answer(500),
    "502": then_close(answer(502)),
    "503": answer(503, b"x" * 100_000),
    "425": answer(425),
    "530": answer(530, b"error code: 1016"),
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*SAFE] * 3 + [*UNCERTAIN]), min_size=1, max_size=8),
    st.integers(1, 8),
    st.booleans(),
)
def test_no_sequence_of_answers_has_an_uncertain_request_sent_again(
    server: HostileServer, make_client: MakeClient, names: list[str], most: int, streamed: bool
) -> None:
    """Whatever the server does: after the first answer that may be paid, it hears no more. By default."""
    server.play(*({**SAFE, **UNCERTAIN}[name] for name in names), GOOD)
    client = make_client(read_timeout=0.1, max_attempts=most)
    request = CAT if not streamed else ImageRequest(prompt="a cat", model="gpt-image-1")
    try:
        images = list(client.stream(request)) if streamed else client.generate(request).images
        assert images
    except UnknownOutcomeError as error:
        assert error.attempts == len(server.requests)  # noqa: PT017
    except TTAPIError:
        pass
    came = names[: len(server.requests)]
    assert not any(name in UNCERTAIN for name in came[: len(server.requests) - 1])
    assert sum(name in ("500", "502", "503") for name in came) <= 3
    assert len(server.requests) <= most


VERDICTS = sorted(
    {*(sign.verdict for sign in SIGNS), *BREAKS.values(), UNUSABLE, judge(599)},
    key=repr,
)


def step(*past: Verdict, retry_after: float | None = None, elapsed: float = 0.0, **policy: object) -> Step:
    return RetryPolicy(**policy).next_step(past, StoppedClock(), retry_after=retry_after, elapsed=elapsed)


@pytest.mark.parametrize(
    ("verdict", "sends", "opted_in"),
    [
        (UNREACHED, 4, 4),
        (judge(429), 4, 4),
        (judge(499), 4, 4),
        (judge(503), 3, 3),
        (UNKNOWN, 1, 4),
        (judge(501), 1, 1),
        (UNUSABLE, 1, 1),
        (judge(400), 1, 1),
    ],
)
def test_how_often_a_request_is_sent_that_always_fails_alike(
    verdict: Verdict, sends: int, opted_in: int
) -> None:
    """`max_attempts` sends, but three in all for server faults, and one for what may be paid."""

    def count(**policy: object) -> int:
        past = [verdict]
        while step(*past, **policy).wait is not None:
            past.append(verdict)
        return len(past)

    assert (count(), count(retry_unknown_outcome=True)) == (sends, opted_in)
    assert count(max_attempts=1, retry_unknown_outcome=True) == 1
    assert count(max_attempts=10) == {4: 10}.get(sends, sends)


@given(st.lists(st.sampled_from(VERDICTS), min_size=1, max_size=12), st.integers(1, 12))
def test_no_history_makes_an_unknown_outcome_be_sent_again(past: list[Verdict], most: int) -> None:
    """By default nothing is sent again after an unknown outcome, whatever happened before it."""
    decided = step(*past, max_attempts=most)
    if past[-1].again in (Again.OPTED_IN, Again.NEVER):
        assert decided.wait is None
    if len(past) >= most:
        assert decided.wait is None


def test_server_faults_count_together() -> None:
    """Three server faults end it, also where other failures stood between them."""
    fault, full = judge(502), judge(499)
    assert step(fault, full, fault, max_attempts=9).wait is not None
    assert step(fault, full, fault, judge(500), max_attempts=9).wait is None


def test_the_wait_doubles_up_to_its_ceiling_and_is_jittered_from_zero() -> None:
    """Full jitter: between nothing and 1, 2, 4, ... seconds, never more than 30."""
    full = judge(429)
    waits = [step(*[full] * sends, max_attempts=100).wait for sends in range(1, 9)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert step(*[full] * 99, max_attempts=100).wait == 30
    draws = [
        RetryPolicy().next_step([full, full], Clock(), retry_after=None, elapsed=0).wait for _ in range(500)
    ]
    assert min(draws) < 0.1
    assert max(draws) > 1.9


def test_jitter_by_default_is_between_nothing_and_all() -> None:
    """The clock that is used outside tests draws from the whole range."""
    draws = [Clock().jitter(3.0) for _ in range(500)]
    assert 0 <= min(draws) < 0.3
    assert 2.7 < max(draws) <= 3


def test_retry_after_is_a_lower_bound_up_to_the_ceiling() -> None:
    """What the API asks for is waited for; more than the ceiling ends the request and says so."""
    full = judge(429)
    assert step(full, retry_after=120.0).wait == 121
    decided = step(full, retry_after=121.0)
    assert decided.wait is None
    assert decided.why == "the API asks to wait 121 s, which is more than retry_after_ceiling (120 s)"
    assert step(full, retry_after=121.0, retry_after_ceiling=500).wait == 122
    assert step(UNKNOWN, retry_after=1.0).wait is None


def test_no_send_begins_after_the_total_timeout() -> None:
    """The budget covers the wait, too: waiting in order to give up would be in vain."""
    full = judge(429)
    assert step(full, elapsed=8.9, total_timeout=10).wait == 1
    decided = step(full, elapsed=9.0, total_timeout=10)
    assert str(decided) == "not sent again: total_timeout (10 s) would be over"
    assert step(full, elapsed=1e9).wait == 1


@pytest.mark.parametrize(
    "policy",
    [
        {"max_attempts": 0},
        {"retry_after_ceiling": -1},
        {"retry_after_ceiling": float("nan")},
        {"total_timeout": float("inf")},
        {"total_timeout": -0.1},
    ],
)
def test_a_policy_without_sense_is_refused(policy: dict[str, float]) -> None:
    """Numbers that would make every comparison false, or no send at all, are errors."""
    with pytest.raises(ValueError, match=next(iter(policy))):
        RetryPolicy(**policy)
