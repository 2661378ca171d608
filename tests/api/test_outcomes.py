"""The rules by which requests are sent again, without any network."""

from __future__ import annotations

import ast
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefect_ttapi.api import json_stream, limiter, outcomes, payload, retries, sse
from prefect_ttapi.api.outcomes import (
    ABSURD_SECONDS,
    BREAKS,
    Again,
    Break,
    ErrorBody,
    is_moderation,
    judge,
    read_retry_after,
)
from prefect_ttapi.errors import Outcome

NOW = 1_700_000_000.0


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
    verdict = judge(status)
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


REFUSED_PROMPTS = [
    ErrorBody(
        "Your request was rejected by the safety system.", "image_generation_user_error", "moderation_blocked"
    ),
    ErrorBody("rejected", "invalid_request_error", "content_policy_violation"),
    ErrorBody("filtered", None, "content_filter", "prompt"),
    ErrorBody("no", None, "Content_Policy_Violation"),
    ErrorBody("no", "sensitive_words_detected", None),
    ErrorBody("Your request was rejected as a result of our safety system. Your prompt may contain text ..."),
    ErrorBody("If you believe this is an error, contact us. safety_violations=[sexual]."),
    ErrorBody("Your request was blocked by our moderation system."),
    ErrorBody(
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
    ),
    ErrorBody("This request has been blocked by our content policy"),
    ErrorBody('upstream error: {"error": {"code": "moderation_blocked"}}'),
    ErrorBody("user sensitive words detected"),
    ErrorBody("Your request was rejected by content moderation."),
]
OTHER_ERRORS = [
    ErrorBody("Unknown parameter: 'moderation'.", "invalid_request_error", "unknown_parameter", "moderation"),
    ErrorBody(
        "Invalid value: 'x'. Supported values are: 'low' and 'auto'.", None, "invalid_value", "moderation"
    ),
    ErrorBody("Invalid size.", "image_generation_user_error", "invalid_size", "size"),
    ErrorBody("billing hard limit has been reached", None, "billing_hard_limit_reached"),
    ErrorBody("no message"),
]


@pytest.mark.parametrize("error", REFUSED_PROMPTS, ids=lambda error: error.message[:30])
def test_refused_prompts_are_told(error: ErrorBody) -> None:
    """What OpenAI, Azure and relays send for a refused prompt is told by code, type or words."""
    assert is_moderation(error)


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=lambda error: error.message[:30])
def test_other_errors_are_not_refused_prompts(error: ErrorBody) -> None:
    """Other errors are not taken for it, also those about the field named moderation."""
    assert not is_moderation(error)


@pytest.mark.parametrize(
    "module",
    [outcomes, retries, limiter, payload, json_stream, sse],
    ids=lambda module: module.__name__,
)
def test_the_rules_know_no_network(module: object) -> None:
    """The sans-IO modules import neither httpx nor Prefect, nor anything of ours that does."""
    forbidden = {"httpx", "httpcore", "prefect", "botocore", "prefect_ttapi.api.transport"}
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert not imported & forbidden
