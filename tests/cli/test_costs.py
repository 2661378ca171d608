"""What was paid for, by the ledger's records: nothing twice."""

from __future__ import annotations

import json

import pytest

from prefect_ttapi.cli.main import main
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore
from tests.cli.test_batches import batch
from tests.support.damaged_stores import kept, paid, unknown
from tests.support.generations import fresh_image, generation_of
from tests.support.ledgers import acquire, recorded


def costs(store: ImageStore, *words: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert main(["costs", store.url, "--json", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_answer_counts_once(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Two batches show the same images as cached; they were paid for once, and saved three times."""
    made = paid(store, "a meadow", "another meadow")
    batch(store, "first", Row.of(0, made), Row.of(1, made, "cached"))
    batch(store, "second", Row.of(0, made, "cached"), Row.of(1, made, "cached"))
    (told,) = costs(store, "--price", "dall-e-2=0.02", capsys=capsys)
    assert told == {
        "model": "dall-e-2",
        "images": 2,
        "calls": made.api_calls,
        "tokens": 0,
        "usd": 0.04,
        "saved": 6,
        "maybe_paid": 0,
        "in_vain": 0,
    }


def test_what_may_be_paid_and_what_was_paid_in_vain(
    store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests without an answer, and answers that nobody can read, are told where nothing else tells of them."""
    unknown(store, "a storm")
    kept(store, "a fog")
    sums = costs(store, "--by", "batch", capsys=capsys)
    assert {(each["batch"], each["maybe_paid"], each["in_vain"]) for each in sums} == {
        ("run of a storm", 1, 0),
        ("run of a fog", 0, 1),
    }


def test_since_a_month_by_day(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """What was paid before does not count; each day has its sum, and so has the whole."""
    day = paid(store, "a meadow").created_at
    assert costs(store, "--since", f"{day.year + 1}-01", capsys=capsys) == []
    assert [
        each["day"] for each in costs(store, "--since", f"{day:%Y-%m}", "--by", "day", capsys=capsys)
    ] == [f"{day:%Y-%m-%d}"]
    assert main(["costs", store.url, "--by", "day"]) == 0
    heads, *_, total = capsys.readouterr().out.splitlines()
    assert heads.split() == ["day", "images", "calls", "tokens", "saved", "maybe", "paid", "in", "vain"]
    assert total.split()[:2] == ["total", "1"]


def test_the_sandbox_costs_nothing(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Its answers are counted apart, when they are asked for."""
    request = ImageRequest(prompt="a meadow")
    with acquire(Ledger(store, "sandbox", "run-1"), request.request_hash) as claim:
        claim.before_sending()
        image = store.put_image(fresh_image(b"pixels"), {})
        recorded(claim, generation_of(request, image).model_copy(update={"api_origin": "sandbox"}))
    assert costs(store, capsys=capsys) == []
    assert [each["images"] for each in costs(store, "--sandbox", capsys=capsys)] == [1]
    assert main(["costs", store.url]) == 0
    assert "Left out: 1 record of the sandbox, which --sandbox counts." in capsys.readouterr().out


def test_a_record_that_makes_no_sense_is_told(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """The sums are of the others, and the status says that something is missing."""
    paid(store, "a meadow")
    store.write(f"ledger/api.ttapi.io/{64 * '0'}.json", b"{", "application/json")
    assert main(["costs", store.url]) == 1
    told = capsys.readouterr()
    assert "dall-e-2" in told.out
    assert "1 record can't be read" in told.err


def test_since_is_a_date(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    paid(store, "a meadow")
    assert main(["costs", store.url, "--since", "yesterday"]) == 2
    assert "2026-11" in capsys.readouterr().err
