"""The page about errors says what the code does: `python -m tests.api.test_errors_page` prints its tables anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import prefect_ttapi
from prefect_ttapi import errors
from prefect_ttapi.api.outcomes import BREAKS, OTHER, SIGNS, USELESS, Again
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


def faults() -> Iterator[str]:
    yield "| taken for | error | paid | sent again | what to do |"
    yield "|---|---|---|---|---|"
    for fault in dict.fromkeys((*(sign.fault for sign in SIGNS), OTHER, USELESS)):
        error, again = fault.verdict.error, fault.verdict.again
        paid = PAID[error.outcome]
        yield f"| {fault.name} | `{error.__name__}` | {paid} | {SENT_AGAIN[again]} | {fault.what_to_do} |"


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
        yield f"| {sign.fault.name} | {codes} | {words} | {statuses}{page} | {sign.source} |"


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
