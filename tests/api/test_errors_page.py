"""The page about errors says what the code does: `python -m tests.api.test_errors_page` prints its tables anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import prefect_ttapi
from prefect_ttapi import errors
from prefect_ttapi.api.outcomes import (
    ACCOUNT,
    BREAKS,
    CREDIT,
    FIREWALL,
    MODEL,
    OTHER,
    PACE,
    PROMPT,
    QUEUE,
    REQUEST,
    SERVER,
    SIGNS,
    UNKNOWN,
    UNREACHED,
    UNUSABLE,
    Again,
)
from prefect_ttapi.errors import Outcome

PAGE = Path(__file__).parents[2] / "docs/errors.md"

PAID = {
    Outcome.NEVER_DELIVERED: "no",
    Outcome.REJECTED: "no",
    Outcome.REFUSED: "no",
    Outcome.SERVER_FAULT: "unlikely",
    Outcome.UNKNOWN: "perhaps",
    Outcome.UNUSABLE: "perhaps",
}
SENT_AGAIN = {
    Again.FREELY: "up to `max_attempts`",
    Again.TWICE: "twice",
    Again.OPTED_IN: "with `retry_unknown_outcome`",
    Again.NEVER: "no",
}
LATE = "See in the vendor's dashboard whether it was billed. Run it again to send, and perhaps pay, anew."
WHAT_TO_DO = {
    ACCOUNT: "The batch stops. Check the key, and the account in the vendor's dashboard.",
    PACE: "Nothing: all requests slow down. If it lasts, a lower `max_in_flight` or `rate_limit`.",
    CREDIT: "The batch stops, and `ttapi.balance.exhausted` is sent. Top up, and run it again.",
    MODEL: "The rows of that model stop. Have it enabled, or ask another one.",
    PROMPT: "Change the prompt. `max_refused` in a row, and none that passes, stop the batch.",
    FIREWALL: "A firewall before the API dislikes the prompt's words, or this machine. Change the words, or ask the "
    "vendor.",
    REQUEST: "Change the request as the message says; after 404, perhaps `base_url`.",
    QUEUE: "Nothing: all requests slow down. If it lasts, run it again later.",
    SERVER: "Run it again later.",
    UNREACHED: "Run it again later.",
    UNKNOWN: LATE,
    OTHER: LATE,
    UNUSABLE: "Read the message. Run it again to send, and perhaps pay, anew.",
}


def faults() -> Iterator[str]:
    yield "| taken for | error | paid | sent again | what to do |"
    yield "|---|---|---|---|---|"
    for verdict in dict.fromkeys((*(sign.verdict for sign in SIGNS), OTHER, UNUSABLE)):
        error, again = verdict.error, SENT_AGAIN[verdict.again]
        paid = PAID[error.outcome]
        yield f"| {verdict.name} | `{error.__name__}` | {paid} | {again} | {WHAT_TO_DO[verdict]} |"


def breaks() -> Iterator[str]:
    yield "| what broke | error | paid | sent again |"
    yield "|---|---|---|---|"
    for broke, verdict in BREAKS.items():
        paid = PAID[verdict.error.outcome]
        yield f"| {broke} | `{verdict.error.__name__}` | {paid} | {SENT_AGAIN[verdict.again]} |"


def signs() -> Iterator[str]:
    yield "| taken for | codes | words | status | source |"
    yield "|---|---|---|---|---|"
    for sign in SIGNS:
        codes = " ".join(f"`{code}`" for code in sign.codes.split())
        statuses = ", ".join(map(str, sign.statuses))
        page = ", as an HTML page" if sign.page else ""
        words = "yes" if sign.words else ""
        yield f"| {sign.verdict.name} | {codes} | {words} | {statuses}{page} | {sign.source} |"


def test_the_tables_are_those_of_the_code() -> None:
    """Each table stands on the page as the code has it."""
    text = PAGE.read_text(encoding="utf-8")
    for table in (faults, breaks, signs):
        assert "\n" + "\n".join(table()) + "\n" in text, table.__name__


def test_each_error_is_on_the_page() -> None:
    """Whatever error a user may meet is told there."""
    text = PAGE.read_text(encoding="utf-8")
    public = [name for name in prefect_ttapi.__all__ if hasattr(errors, name)]
    assert "ModelNotPermittedError" in public
    assert [name for name in public if f"`{name}`" not in text] == []


if __name__ == "__main__":
    for table in (faults, breaks, signs):
        print("\n".join(table()), end="\n\n")
