"""Totals: the sum of their parts, and honest about what was paid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.totals import Totals
from tests.lineage.samples import failed, generated

ROWS = st.lists(
    st.one_of(
        st.builds(generated, count=st.integers(1, 3), seconds=st.integers(0, 99)),
        st.builds(generated, status=st.just("cached"), api_calls=st.just(0), seconds=st.just(0)),
        st.builds(failed, error_type=st.sampled_from(["ModerationError", "ServerError"])),
        st.builds(failed, maybe_paid=st.just(["sent twice"]), api_calls=st.just(2)),
        st.just(Row(row=0, status="skipped", error_type="BudgetExceeded")),
        st.just(Row(row=0, status="failed", given={"prompt": ""}, error_type="ValidationError")),
    ),
    max_size=12,
)


@given(ROWS, st.integers(0, 12))
def test_sum_of_parts(rows: list[Row], cut: int) -> None:
    """However a batch is cut into shards, the shards' totals add up to the batch's."""
    whole = Totals.of(rows)
    assert Totals.of(rows[:cut]) + Totals.of(rows[cut:]) == whole
    assert Totals.of(rows[cut:]) + Totals.of(rows[:cut]) == whole
    assert whole + Totals() == whole
    assert whole.rows == len(rows) == whole.generated + whole.cached + whole.failed + whole.skipped
    assert whole.images == sum(whole.images_by_model.values()) == sum(len(row.images) for row in rows)
    assert sum(whole.errors.values()) == whole.failed + whole.skipped
    assert Totals.model_validate_json(whole.model_dump_json()) == whole


def test_a_cached_row_adds_no_tokens() -> None:
    """Tokens are those this batch paid for: a cached row shows its images and costs nothing."""
    totals = Totals.of([generated(0, count=2), generated(1, status="cached", api_calls=0, seconds=0)])
    assert (totals.images, totals.images_cached, totals.delivered) == (3, 1, 3)
    assert (totals.input_tokens, totals.output_tokens, totals.total_tokens) == (9, 4160, 4169)
    assert (totals.api_calls, totals.seconds, totals.size_bytes) == (1, 21.5, 1_000 + 1_001 + 1_010)
    assert totals.images_by_model == {"gpt-image-2": 3}


@pytest.mark.parametrize(("api_calls", "tokens"), [(1, 4169), (0, 0)])
def test_a_failed_delivery(api_calls: int, tokens: int) -> None:
    """A failed delivery counts its tokens only if it was this batch that paid for the images."""
    row = generated(status="failed", error_type="StoreError", delivered=(), api_calls=api_calls)
    totals = Totals.of([row])
    assert (totals.failed, totals.images, totals.total_tokens) == (1, 1, tokens)


def test_rows_that_may_have_been_paid_are_counted() -> None:
    """One row with two notes is one row to look at."""
    assert Totals.of([failed(maybe_paid=["a", "b"]), failed()]).maybe_paid == 1
