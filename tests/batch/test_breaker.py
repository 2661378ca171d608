"""When a batch is given up."""

from __future__ import annotations

import pytest

from prefect_ttapi.batch.lanes import Shared
from prefect_ttapi.batch.options import Breaker
from prefect_ttapi.generation.limits import Limits
from tests.support.rows import generated

ENDS = {
    "ten of a kind": (["ServerError"] * 10, [9]),
    "and each one after": (["ServerError"] * 12, [9, 10, 11]),
    "a success in between": (["ServerError"] * 9 + [None] + ["ServerError"] * 9, []),
    "two kinds in turns": (["ServerError", "RateLimitError"] * 20, []),
    "another kind counts from one": (["ServerError"] * 9 + ["RateLimitError"] * 10, [18]),
    "refused prompts only": (["ModerationError"] * 49, []),
    "refused prompts and one that passes": (["ModerationError"] * 49 + [None] + ["ModerationError"] * 49, []),
    "a model that is not permitted": (["ModelNotPermittedError"] * 60, []),
    "refused prompts amid an outage": (["ServerError", "ModerationError"] * 10, [18]),
    "success only": ([None] * 50, []),
}


@pytest.mark.parametrize("name", ENDS)
def test_ten_failures_of_one_kind_in_a_row_trip_it(name: str) -> None:
    """A success ends the row, another kind begins a new one, a refused prompt is neither."""
    ends, trips = ENDS[name]
    breaker = Breaker()
    reasons = [breaker.note(end) for end in ends]
    assert [number for number, reason in enumerate(reasons) if reason] == trips
    assert all(
        reason == f"{number - trips[0] + 10} requests in a row failed with {ends[trips[0]]}"
        for number, reason in enumerate(reasons)
        if reason
    )


def test_fifty_refused_prompts_and_none_that_passes_trip_it() -> None:
    """Other failures in between are none that passes."""
    ends = ["ModerationError"] * 30 + ["ServerError"] + ["ModerationError"] * 21
    breaker = Breaker()
    reasons = [breaker.note(end) for end in ends]
    assert [reason for reason in reasons if reason] == [
        f"{number} prompts in a row were refused, and none passed" for number in (50, 51)
    ]
    breaker.note(None)
    assert breaker.note("ModerationError") is None


def test_rows_whose_keys_are_taken_stop_nothing() -> None:
    """Nothing was sent for them, and others have their keys; what is paid for and can't be delivered counts."""
    shared = Shared(Limits(), Breaker(limit=3))
    row = generated(status="failed", error_type="KeyTakenError")
    for _ in range(4):
        shared.judge(row.model_copy(update={"images": ()}))
    assert shared.stop.reason is None
    for _ in range(3):
        shared.judge(row)
    assert "3 requests in a row failed with KeyTakenError" in (shared.stop.reason or "")


def test_without_a_limit_it_never_trips() -> None:
    """None is no breaker."""
    breaker = Breaker(None, None)
    assert {breaker.note(kind) for kind in ("ServerError", "ModerationError") * 100} == {None}
