"""The rules by which requests are sent again, without any network."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from prefect_ttapi.api import answers, json_stream, limiter, outcomes, payload, retries
from prefect_ttapi.api.outcomes import (
    ABSURD_SECONDS,
    BREAKS,
    SIGNS,
    Again,
    Break,
    ErrorBody,
    Sign,
    Verdict,
    judge,
    read_retry_after,
)
from prefect_ttapi.api.payload import read_error
from prefect_ttapi.errors import Outcome

NOW = 1_700_000_000.0


BY_STATUS = {
    "InvalidRequestError": (400, 404, 405, 406, 409, 410, 413, 415, 418, 422),
    "AuthenticationError": (401, 403),
    "InsufficientBalanceError": (402,),
    "ModerationError": (451,),
    "RateLimitError": (429,),
    "QueueFullError": (499,),
    "ServerError": (500, 502, 503),
    "APIConnectionError": (425, 521, 523, 525, 526, 530),
    "UnknownOutcomeError": (408, 501, 504, 505, 507, 520, 522, 524, 527, 599),
    "InvalidResponseError": (101, 200, 204, 302, 304, 600),
}
AGAIN = {
    "RateLimitError": Again.FREELY,
    "QueueFullError": Again.FREELY,
    "APIConnectionError": Again.FREELY,
    "ServerError": Again.TWICE,
}
LATE = (408, 504, 520, 522, 524)


@pytest.mark.parametrize("kind", BY_STATUS)
def test_each_status_has_its_error_and_its_rule(kind: str) -> None:
    """Where nothing else is said the status tells, and what is in no table is never sent again."""
    for status in BY_STATUS[kind]:
        verdict = judge(status)
        again = Again.OPTED_IN if status in LATE else AGAIN.get(kind, Again.NEVER)
        assert (verdict.error.__name__, verdict.again) == (kind, again), status


def test_what_is_not_in_the_table_says_what_it_was_taken_for() -> None:
    """And why; what is in the table is certain."""
    assert judge(418).taken_for == "a refusal of this request: 4xx that is not in the table"
    assert judge(507).taken_for == "an unknown outcome: 5xx that is not in the table"
    assert judge(302).taken_for == "an answer of no use: 3xx that is not in the table"
    assert judge(200).taken_for == "an answer of no use: an error that is not in the table"
    assert {judge(status).taken_for for sign in SIGNS for status in sign.statuses if not sign.page} == {None}
    said = judge(400, ErrorBody("We are sorry: please recharge.")).taken_for
    assert said == "a lack of credit, as it says 'please recharge'"


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


CREDIT, ACCOUNT, PROMPT = "InsufficientBalanceError", "AuthenticationError", "ModerationError"
MODEL, REQUEST, PACE = "ModelNotPermittedError", "InvalidRequestError", "RateLimitError"
SERVER, UNKNOWN, USELESS = "ServerError", "UnknownOutcomeError", "InvalidResponseError"


def said(message: str, code: str | int | None = None, kind: str | None = None, **more: object) -> bytes:
    """An error in OpenAI's envelope."""
    return json.dumps({"error": {"message": message, "type": kind, "code": code, **more}}).encode()


def failed(message: str, **more: object) -> bytes:
    """An error in the vendor's envelope."""
    return json.dumps({"status": "FAILED", "message": message, "data": None, **more}).encode()


VERIFIED = "Your organization must be verified to use the model `gpt-image-1`. Please go to our settings."
NESTED = json.dumps(
    {"error": {"code": "Forbidden", "message": "Your resource has been temporarily blocked."}}
)

#: Answers as the field gives them, in our words: status, body, whose fault.
FIELD: list[tuple[int, bytes, str]] = [
    # out of credit
    (402, b"", CREDIT),
    (429, said("You exceeded your current quota, please check your plan.", "insufficient_quota"), CREDIT),
    (429, said("You exceeded your current quota, please check your plan and billing details."), CREDIT),
    (429, said("No credits are left.", "credit_balance_exhausted", "insufficient_quota"), CREDIT),
    (400, said("Billing hard limit has been reached", "billing_hard_limit_reached"), CREDIT),
    (
        429,
        said("Your account is not active, please check your billing details.", "billing_not_active"),
        CREDIT,
    ),
    (403, said("user quota is not enough", "insufficient_user_quota", "new_api_error"), CREDIT),
    (403, said("用户额度不足, 剩余额度: ＄0.000000", None, "new_api_error"), CREDIT),
    (429, said("Monthly quota exceeded for this account."), CREDIT),
    (403, said("image pre-consumed quota failed, user quota: 0.1, need quota: 0.2"), CREDIT),
    (403, said("token quota is not enough", "pre_consume_token_quota_failed"), CREDIT),
    (401, said("该令牌额度已用尽 (request id: 2026)"), CREDIT),
    (403, said("User's credit limit is insufficient, remaining credit limit: $0.000000"), CREDIT),
    (500, said("upstream: insufficient account balance"), CREDIT),
    (200, failed("Insufficient balance, please recharge"), CREDIT),
    (403, failed("Your account does not have enough quota"), CREDIT),
    (400, failed("The account balance is insufficient"), CREDIT),
    (200, said("Your account or API key has insufficient credits.", 402), CREDIT),
    (403, said(f"bad response: {said('no', 'insufficient_quota').decode()}"), CREDIT),
    # too fast, though a quota is named
    (429, b"", PACE),
    (429, said("You exceeded your current requests per minute quota"), PACE),
    (
        429,
        said("Requests to this operation have exceeded call rate limit of your current S0 tier.", "429"),
        PACE,
    ),
    (429, said("Limit 5, requested 6 images per min. Add a payment method.", "rate_limit_exceeded"), PACE),
    (403, failed("Quota exceeded: 10 requests per minute"), PACE),
    (429, said("no", "rate_limit_exceeded", "insufficient_quota"), PACE),
    (200, failed("Too many requests, slow down"), PACE),
    (429, said("You exceeded your current quota, please check your plan. Please retry in 34.07s."), PACE),
    # the account
    (401, said("Incorrect API key provided: sk-1***9.", "invalid_api_key"), ACCOUNT),
    (400, said("API key not valid. Please pass a valid one."), ACCOUNT),
    (
        400,
        said(
            "Your resource has been temporarily blocked because we detected behavior that may violate our content "
            "policy.",
            "Forbidden",
        ),
        ACCOUNT,
    ),
    (500, json.dumps({"error": "Forbidden", "message": NESTED}).encode(), ACCOUNT),
    (
        403,
        said("The account associated with this API key has been deactivated.", "account_deactivated"),
        ACCOUNT,
    ),
    (400, said("Your account jo@example.com has been suspended"), ACCOUNT),
    (401, said("Your access was terminated due to violation of our usage policies."), ACCOUNT),
    (
        403,
        said("Country, region, or territory not supported", "unsupported_country_region_territory"),
        ACCOUNT,
    ),
    (400, said("User location is not supported for the API use."), ACCOUNT),
    (200, failed("Invalid TT-API-KEY"), ACCOUNT),
    (403, said("用户已被封禁"), ACCOUNT),
    (403, failed("no"), ACCOUNT),
    # the prompt
    (400, said("no", "moderation_blocked", "image_generation_user_error"), PROMPT),
    (400, said("rejected", "Content_Policy_Violation"), PROMPT),
    (400, said("filtered", "content_filter", None, innererror={"code": "x"}), PROMPT),
    (400, said("no", "400", None, innererror={"code": "ResponsibleAIPolicyViolation"}), PROMPT),
    (400, said("no", "contentFilter"), PROMPT),
    (
        400,
        said(
            "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
        ),
        PROMPT,
    ),
    (400, said("该请求内容包含敏感信息，已被拒绝"), PROMPT),
    (400, said("This request violates OpenAI's policies."), PROMPT),
    (
        400,
        said("Your request was rejected as a result of our safety system. Your prompt may contain text ..."),
        PROMPT,
    ),
    (400, said("If you believe this is an error, contact us. safety_violations=[sexual]."), PROMPT),
    (400, said("Your request was blocked by our moderation system."), PROMPT),
    (400, said("This request has been blocked by our content policy"), PROMPT),
    (400, said("The user input was blocked by our content policy"), PROMPT),
    (400, said('upstream error: {"error": {"code": "moderation_blocked"}}'), PROMPT),
    (400, failed("Banned words in your prompt"), PROMPT),
    (400, failed("The prompt may go against our community standards"), PROMPT),
    (400, failed("The prompt contains sensitive content"), PROMPT),
    (
        403,
        said("Your chosen model requires moderation and your input was flagged", "content_policy_violation"),
        PROMPT,
    ),
    (403, said("Your chosen model requires moderation and your input was flagged", 403), PROMPT),
    (422, said("Your request was rejected by content moderation.", "content_policy_violation"), PROMPT),
    (422, b'{"detail": [{"loc": ["body"], "msg": "flagged", "type": "content_policy_violation"}]}', PROMPT),
    (451, b"", PROMPT),
    (451, failed("Prohibited content"), PROMPT),
    (500, said("user sensitive words detected", "sensitive_words_detected"), PROMPT),
    (200, failed("user sensitive words detected"), PROMPT),
    (200, said("Your request was rejected by our safety system.", "moderation_blocked"), PROMPT),
    # the model
    (403, said(VERIFIED), MODEL),
    (403, said(VERIFIED, "model_not_permitted"), MODEL),
    (
        404,
        said("The model `gpt-image-9` does not exist or you do not have access to it.", "model_not_found"),
        MODEL,
    ),
    (403, said("Project `proj_1` does not have access to model `gpt-image-1`"), MODEL),
    (403, said("该令牌无权使用模型：gpt-image-1"), MODEL),
    (200, failed("You are not allowed to use this model"), MODEL),
    # a firewall
    (
        403,
        b"<html><title>Attention Required! | Cloudflare</title><h1>Sorry, you have been blocked</h1>",
        REQUEST,
    ),
    (403, b"error code: 1020", REQUEST),
    (406, b"<html><h1>Not Acceptable!</h1>Mod_Security: your account has been blocked", REQUEST),
    # the request, the server, nobody knows
    (400, said("Unknown parameter: 'moderation'.", "unknown_parameter", param="moderation"), REQUEST),
    (400, said("Invalid value: 'x'. Supported values are: 'low' and 'auto'.", "invalid_value"), REQUEST),
    (400, said("Your organization must be verified to stream this model."), REQUEST),
    (400, said("Invalid value: 'our content policy'."), REQUEST),
    (400, said("Invalid size.", "invalid_size", "image_generation_user_error"), REQUEST),
    (200, said("bad size", 400), REQUEST),
    (200, said("upstream broke", 500), USELESS),
    (200, failed("The task failed."), USELESS),
    (503, said("No available channel for model gpt-image-1 under group default", "model_not_found"), SERVER),
    (408, said("Request timed out waiting for upstream", "timeout"), UNKNOWN),
    (200, said("Your request timed out", 408), UNKNOWN),
    (504, failed("content policy, insufficient balance: the work may be done all the same"), UNKNOWN),
    (525, b"<html>error code: 525</html>", "APIConnectionError"),
]


@pytest.mark.parametrize(("status", "body", "kind"), FIELD, ids=lambda value: str(value)[:40])
def test_whose_fault_an_answer_is(status: int, body: bytes, kind: str) -> None:
    """What the vendor, OpenAI, Azure, relays and firewalls say: by code, else by words, else by the status."""
    assert judge(status, read_error(body, None)).error.__name__ == kind


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: f"{sign.verdict.name}, {sign.source}"[:50])
def test_each_row_of_the_table_is_used(sign: Sign) -> None:
    """Each row has a source, each code leads to its fault whatever the case, and some answer above needs its words."""
    assert sign.source
    for code in sign.codes.split():
        assert judge(400, ErrorBody("no", code=code.upper())) == sign.verdict
        assert judge(400, ErrorBody("no", type=code)) == sign.verdict
    if sign.words:
        heard = [read_error(body, None).message.casefold() for _, body, _ in FIELD]
        assert any(re.search(sign.words, message) for message in heard) or sign.source.startswith(
            "OpenRouter"
        )


SIGNAL_WORDS = [
    "insufficient balance", "please recharge", "exceeded your current quota", "safety system", "content policy",
    "your account has been suspended", "must be verified to use the model", "rate limit", "insufficient_quota",
    "moderation_blocked", "余额不足", '"code": "insufficient_quota"', '{"error": {"message": "out of credit"}}',
    "invalid api key",
]  # fmt: skip
PROMPTS = st.lists(
    st.sampled_from(SIGNAL_WORDS)
    | st.sampled_from(["a red car", "of", "it's", "ünder", "\n", "“so”", "<b>"]),
    min_size=1,
    max_size=6,
).map(" ".join)
DRESSINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "shouted": str.upper,
    "on one line": lambda prompt: " ".join(prompt.split()),
    "in quotation marks": "'{}'".format,
    "in backticks": "`{}`".format,
    "in curly ones": "“{}”".format,
    "as JSON": json.dumps,
    "as JSON in JSON": lambda prompt: json.dumps(json.dumps({"prompt": prompt})),
    "as HTML": html.escape,
    "as Python": repr,
    "cut short": lambda prompt: prompt[:30] + "...",
    "its end": lambda prompt: "..." + prompt[-30:],
    "twice": lambda prompt: f"'{prompt}' ({prompt})",
}
OWN = [
    "Invalid size: {}", "{} is too long", "The prompt {} can't be drawn.", "Server error while working on {}",
    "The request for {} timed out", "no message about {}",
]  # fmt: skip


@example("invalid api key “so” invalid api key", OWN[0], "its end", 200)
@given(
    PROMPTS,
    st.sampled_from(OWN),
    st.sampled_from(sorted(DRESSINGS)),
    st.sampled_from([200, 400, 403, 422, 500]),
)
def test_no_word_of_a_prompt_that_an_error_repeats_changes_the_verdict(
    prompt: str, own: str, dressing: str, status: int
) -> None:
    """Whole, cut, quoted, escaped or shouted: it is the prompt that says so, and not the API."""

    def verdict(asked: str) -> Verdict:
        message = own.format(DRESSINGS[dressing](asked))
        return judge(status, read_error(json.dumps({"error": {"message": message}}).encode(), None), asked)

    assert verdict(prompt) == verdict("a cat")


@pytest.mark.parametrize("dressing", ["{}", "'{}'"])
def test_what_the_api_says_first_is_its_own(dressing: str) -> None:
    """Also where the prompt that it repeats after that has the same words."""
    message = f"Refused by the safety system. Prompt: {dressing.format('the safety system')}"
    assert judge(400, ErrorBody(message), "the safety system").error.__name__ == PROMPT
    message = f"Can't draw {dressing.format('the safety system')}"
    assert judge(400, ErrorBody(message), "the safety system").error.__name__ == REQUEST


@given(
    PROMPTS,
    st.sampled_from([entry for entry in FIELD if entry[0] != 504]),
    st.sampled_from(["'{}'", "“{}”", "{}"]),
)
def test_what_the_api_says_itself_counts_beside_a_repeated_prompt(
    prompt: str, entry: tuple[int, bytes, str], dressing: str
) -> None:
    """Its own words come first, its quote of the prompt after them."""
    status, body, kind = entry
    error = read_error(body, None)
    repeated = replace(error, message=f"{error.message} Prompt: {dressing.format(prompt)}")
    assume(len(prompt.split()) > 1 and prompt.casefold() not in error.message.casefold())
    assert judge(status, repeated, prompt).error.__name__ == kind


@pytest.mark.parametrize(
    "module",
    [outcomes, retries, limiter, payload, json_stream, answers],
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
