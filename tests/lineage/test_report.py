"""Totals: the sum of their parts, and honest about what was paid."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.markdown import figures
from prefect_ttapi.lineage.report import BatchReport, Totals, bucket
from prefect_ttapi.results import DeliveredImage
from tests.support.rows import failed, generated, stored, totals_of

ROWS = st.lists(
    st.one_of(
        st.builds(
            generated,
            count=st.integers(1, 3),
            seconds=st.integers(0, 99),
            created_at=st.datetimes(timezones=st.just(UTC), min_value=datetime(2026, 1, 1)),
        ),
        st.builds(generated, status=st.just("cached"), api_calls=st.just(0), seconds=st.just(0)),
        st.builds(failed, error_type=st.sampled_from(["ModerationError", "ServerError"])),
        st.builds(failed, maybe_paid=st.just(["sent twice"]), api_calls=st.just(2)),
        st.just(Row(row=0, status="skipped", error_type="BudgetExceeded")),
        st.just(Row(row=0, status="failed", given={"prompt": ""}, error_type="ValidationError")),
    ),
    max_size=12,
)


@given(ROWS, st.randoms())
def test_sum_of_rows(rows: list[Row], chance: random.Random) -> None:
    """In whatever order the rows of a batch come, its totals are the same, and count each of them."""
    whole = totals_of(rows)
    assert totals_of(chance.sample(rows, len(rows))) == whole
    assert whole.rows == len(rows) == whole.generated + whole.cached + whole.failed + whole.skipped
    assert whole.images == sum(whole.images_by_model.values()) == sum(len(row.images) for row in rows)
    assert sum(whole.errors.values()) == whole.failed + whole.skipped
    assert Totals.model_validate_json(whole.model_dump_json()) == whole
    assert whole.answered == sum(sum(counts.values()) for counts in whole.latencies.values())


def test_a_cached_row_adds_no_tokens() -> None:
    """Tokens are those this batch paid for: a cached row shows its images and costs nothing."""
    totals = totals_of([generated(0, count=2), generated(1, status="cached", api_calls=0, seconds=0)])
    assert (totals.images, totals.images_cached, totals.delivered) == (3, 1, 3)
    assert (totals.input_tokens, totals.output_tokens, totals.total_tokens) == (9, 4160, 4169)
    assert (totals.api_calls, totals.seconds, totals.size_bytes) == (1, 21.5, 1_000 + 1_001 + 1_010)
    assert totals.images_by_model == {"gpt-image-2": 3}
    assert (totals.answered, totals.tokens_saved) == (1, 4169)


def test_credentials_are_told_where_some_images_have_them() -> None:
    """An image in which nobody looked is neither with nor without; a batch without any has no word of it."""
    signed, plain, old = (
        stored(n, marks=marks) for n, marks in enumerate([("credentials", "xmp"), (), None])
    )
    copies = [
        DeliveredImage(uri=f"file:///{n}.png", sha256="ab", source_uri="file:///i", marks=marks)
        for n, marks in enumerate([("xmp",), (), None])
    ]
    totals = totals_of([generated(images=(signed, plain, plain, old), delivered=tuple(copies))])
    assert (totals.with_credentials, totals.without_credentials, totals.unmarked) == (1, 2, 1)
    told = {"name": "b", "flow_run_id": "", "manifest_uri": "", "gallery_uri": None, "seconds": 1.0}
    assert "4 images (1 with credentials, 2 without), " in BatchReport(totals=totals, **told).summary
    others = totals_of([generated(images=(plain, old))])
    assert "2 images, " in BatchReport(totals=others, **told).summary
    assert figures(totals)["with credentials"] == "1"
    assert "with credentials" not in figures(others)


@pytest.mark.parametrize(("api_calls", "tokens"), [(1, 4169), (0, 0)])
def test_a_failed_delivery(api_calls: int, tokens: int) -> None:
    """A failed delivery counts its tokens only if it was this batch that paid for the images."""
    row = generated(status="failed", error_type="StoreError", delivered=(), api_calls=api_calls)
    totals = totals_of([row])
    assert (totals.failed, totals.images, totals.total_tokens) == (1, 1, tokens)
    assert (totals.images_cached, totals.tokens_saved) == ((0, 0) if tokens else (1, 4169))


def test_rows_that_may_have_been_paid_are_counted() -> None:
    """One row with two notes is one row to look at."""
    assert totals_of([failed(maybe_paid=["a", "b"]), failed()]).maybe_paid == 1
    assert totals_of([generated(maybe_paid=["an earlier send"])]).maybe_paid == 0


@given(st.lists(st.floats(0.01, 3_000), min_size=1, max_size=60))
def test_percentiles_are_close(seconds: list[float]) -> None:
    """Of any latencies, p50, p90 and p99 are within 4 % of what sorting them all would say."""
    totals = totals_of(generated(n, seconds=each) for n, each in enumerate(seconds))
    told = totals.latency("gpt-image-2")
    for share in (50, 90, 99):
        exact = sorted(seconds)[-(-len(seconds) * share // 100) - 1]
        assert told[f"p{share}"] == pytest.approx(exact, rel=0.04)


def test_latency_is_that_of_answers_paid_here() -> None:
    """What was there before, refused or never sent says nothing of how long answers take."""
    free = [generated(0, status="cached", api_calls=0, seconds=0), failed(1, seconds=9.0)]
    totals = totals_of([*free, generated(2, seconds=30.0)])
    assert totals.latencies.keys() == {"gpt-image-2"}
    assert totals.latency("gpt-image-2")["p50"] == pytest.approx(30, rel=0.03)
    assert totals.latency("dall-e-2") == {}


def test_concurrency_counts_answers_side_by_side() -> None:
    """Six answers of 10 s, three at a time, are a concurrency of 3, wherever cached rows came in between."""
    end = datetime(2026, 5, 20, 12, 0, tzinfo=UTC)
    rows = [
        generated(n, seconds=10, created_at=end + timedelta(seconds=10 * wave))
        for wave in (1, 2)
        for n in range(3)
    ]
    cached = generated(9, status="cached", api_calls=0, seconds=0, created_at=end - timedelta(days=9))
    assert totals_of([cached, *rows]).concurrency == pytest.approx(3)
    assert totals_of([cached]).concurrency is None


def test_money_is_told_where_there_is_a_price() -> None:
    """What was paid for here and what was there before are told apart; without any price there is no money."""
    rows = [generated(0, count=2), generated(1, status="cached", api_calls=0), failed(2)]
    priced = Totals()
    for row in rows:
        priced = priced.add(row, 0.5 * len(row.images))
    assert (priced.usd, priced.usd_saved) == (1.0, 0.5)
    assert (totals_of(rows).usd, totals_of(rows).usd_saved) == (None, None)


def test_totals_stay_small() -> None:
    """For 100,000 rows of five models with latencies from 1 to 300 s the totals are less than 8 kB of JSON."""
    totals = Totals(
        rows=100_000,
        latencies={f"gpt-image-{n}": {bucket(s): 100_000 for s in range(1, 300)} for n in range(5)},
        images_by_model={f"gpt-image-{n}": 100_000 for n in range(5)},
    )
    assert len(totals.model_dump_json()) < 8_000
