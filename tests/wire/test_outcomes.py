"""The rules by which requests are sent again, without any network."""

from __future__ import annotations

import ast
import random
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefect_ttapi.errors import Outcome
from prefect_ttapi.wire import events, outcomes, retries, sse
from prefect_ttapi.wire.clock import Clock
from prefect_ttapi.wire.outcomes import (
    ABSURD_SECONDS,
    BREAKS,
    MODERATED,
    NEVER_DELIVERED,
    STATUSES,
    UNKNOWN,
    UNUSABLE,
    Again,
    Break,
    RetryPolicy,
    Step,
    Verdict,
    judge_status,
    read_retry_after,
)

NOW = 1_700_000_000.0
VERDICTS = sorted(
    {*STATUSES.values(), *BREAKS.values(), UNUSABLE, MODERATED, judge_status(400), judge_status(599)},
    key=repr,
)


def step(*past: Verdict, retry_after: float | None = None, elapsed: float = 0.0, **policy: object) -> Step:
    return RetryPolicy(**policy).next_step(
        past, retry_after=retry_after, elapsed=elapsed, jitter=lambda most: most
    )


@pytest.mark.parametrize(
    ("status", "error", "again"),
    [
        (400, "InvalidRequestError", Again.NEVER),
        (401, "AuthenticationError", Again.NEVER),
        (402, "InsufficientBalanceError", Again.NEVER),
        (403, "AuthenticationError", Again.NEVER),
        (404, "InvalidRequestError", Again.NEVER),
        (405, "InvalidRequestError", Again.NEVER),
        (408, "InvalidRequestError", Again.NEVER),
        (413, "InvalidRequestError", Again.NEVER),
        (422, "InvalidRequestError", Again.NEVER),
        (429, "RateLimitError", Again.FREELY),
        (499, "QueueFullError", Again.FREELY),
        (500, "ServerError", Again.TWICE),
        (501, "UnknownOutcomeError", Again.NEVER),
        (502, "ServerError", Again.TWICE),
        (503, "ServerError", Again.TWICE),
        (504, "UnknownOutcomeError", Again.OPTED_IN),
        (505, "UnknownOutcomeError", Again.NEVER),
        *[(status, "UnknownOutcomeError", Again.OPTED_IN) for status in range(520, 525)],
        (525, "UnknownOutcomeError", Again.NEVER),
        (101, "InvalidResponseError", Again.NEVER),
        (302, "InvalidResponseError", Again.NEVER),
        (304, "InvalidResponseError", Again.NEVER),
        (600, "InvalidResponseError", Again.NEVER),
    ],
)
def test_each_status_has_its_error_and_its_rule(status: int, error: str, again: Again) -> None:
    """The table of statuses is the vendor's, and what is in no table is never sent again."""
    verdict = judge_status(status)
    assert (verdict.error.__name__, verdict.again) == (error, again)


@pytest.mark.parametrize(
    ("broke", "outcome"),
    [
        (Break.CONNECTING, Outcome.NEVER_DELIVERED),
        (Break.SENDING, Outcome.NEVER_DELIVERED),
        (Break.SILENT, Outcome.UNKNOWN),
        (Break.LOST, Outcome.UNKNOWN),
        (Break.CUT, Outcome.UNKNOWN),
    ],
)
def test_only_what_was_not_written_in_full_was_never_delivered(broke: Break, outcome: Outcome) -> None:
    """A connection that breaks after the request was written leaves its outcome unknown."""
    assert BREAKS[broke].error.outcome is outcome


@pytest.mark.parametrize(
    ("verdict", "sends", "opted_in"),
    [
        (NEVER_DELIVERED, 4, 4),
        (judge_status(429), 4, 4),
        (judge_status(499), 4, 4),
        (judge_status(503), 3, 3),
        (UNKNOWN, 1, 4),
        (judge_status(501), 1, 1),
        (UNUSABLE, 1, 1),
        (judge_status(400), 1, 1),
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
    fault, full = judge_status(502), judge_status(499)
    assert step(fault, full, fault, max_attempts=9).wait is not None
    assert step(fault, full, fault, judge_status(500), max_attempts=9).wait is None


def test_the_wait_doubles_up_to_its_ceiling_and_is_jittered_from_zero() -> None:
    """Full jitter: between nothing and 1, 2, 4, ... seconds, never more than 30."""
    full = judge_status(429)
    waits = [step(*[full] * sends, max_attempts=100).wait for sends in range(1, 9)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert step(*[full] * 99, max_attempts=100).wait == 30
    chance = random.Random(7)  # noqa: S311
    draws = [
        RetryPolicy()
        .next_step([full, full], retry_after=None, elapsed=0, jitter=lambda m: chance.uniform(0, m))
        .wait
        for _ in range(500)
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
    full = judge_status(429)
    assert step(full, retry_after=120.0).wait == 121
    decided = step(full, retry_after=121.0)
    assert decided.wait is None
    assert decided.why == "the API asks to wait 121 s, which is more than retry_after_ceiling (120 s)"
    assert step(full, retry_after=121.0, retry_after_ceiling=500).wait == 122
    assert step(UNKNOWN, retry_after=1.0).wait is None


def test_no_send_begins_after_the_total_timeout() -> None:
    """The budget covers the wait, too: waiting in order to give up would be in vain."""
    full = judge_status(429)
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
        {"backoff": float("nan")},
    ],
)
def test_a_policy_without_sense_is_refused(policy: dict[str, float]) -> None:
    """Numbers that would make every comparison false, or no send at all, are errors."""
    with pytest.raises(ValueError, match=next(iter(policy))):
        RetryPolicy(**policy)


RETRY_AFTER = {
    # seconds
    "0": 0.0, "1": 1.0, "120": 120.0, "007": 7.0, " 5 ": 5.0, "1.5": 1.5, "0.25": 0.25, ".5": 0.5, "3.": 3.0,
    "604800": ABSURD_SECONDS,
    # dates: RFC 9110's three forms, and one with an offset
    formatdate(NOW + 30, usegmt=True): 30.0,
    "Tuesday, 14-Nov-23 22:13:50 GMT": 30.0,
    "Tue Nov 14 22:13:50 2023": 30.0,
    "Tue, 14 Nov 2023 23:13:50 +0100": 30.0,
    # ignored: negative, absurd, unparsable
    "-1": None, "-0.5": None, "+5": None, formatdate(NOW - 5, usegmt=True): None,
    "604801": None, "99999999999999999999": None, "9" * 400: None, "1e3": None, "inf": None, "nan": None,
    "1_000": None, "0x10": None, "٣": None, "5 s": None, "5, 10": None, "1,5": None, ".": None, "": None,
    "soon": None, "2023-11-14T22:13:50Z": None, "Fri, 31 Dec 99999 23:59:59 GMT": None,
    "Tue, 14 Nov 2023 22:13:50 +9999999": None, "Tue, 99 Nov 2023 22:13:50 GMT": None, "\0": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), RETRY_AFTER.items(), ids=lambda value: str(value)[:30])
def test_every_form_of_retry_after(text: str, seconds: float | None) -> None:
    """Seconds, fractions and dates are read; what is negative, absurd or unreadable is ignored."""
    assert read_retry_after({"retry-after": text}, NOW) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "0.5"}, 0.0005),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after-ms": "-1", "retry-after": "9"}, 9.0),
        ({"retry-after-ms": "604800001"}, None),
        # the server's clock is five minutes ahead of ours
        (
            {"retry-after": formatdate(NOW + 330, usegmt=True), "date": formatdate(NOW + 300, usegmt=True)},
            30.0,
        ),
        ({"retry-after": formatdate(NOW + 30, usegmt=True), "date": "garbage"}, 30.0),
    ],
)
def test_headers_that_belong_together(headers: dict[str, str], seconds: float | None) -> None:
    """Milliseconds go before seconds, and a date is compared with the answer's own."""
    assert read_retry_after(headers, NOW) == seconds


@example("5\x1f", "\x1c5")
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_header_breaks_the_reader(retry_after: str, date: str) -> None:
    """Whatever a server sends is a sensible wait, or none."""
    wait = read_retry_after({"retry-after": retry_after, "retry-after-ms": date, "date": date}, NOW)
    assert wait is None or 0 <= wait <= ABSURD_SECONDS


@pytest.mark.parametrize("module", [outcomes, retries, sse, events], ids=lambda module: module.__name__)
def test_the_rules_know_no_network(module: object) -> None:
    """The sans-IO modules import neither httpx nor Prefect, nor anything of ours that does."""
    forbidden = {"httpx", "httpcore", "prefect", "fsspec", "prefect_ttapi.wire.transport"}
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert not imported & forbidden
