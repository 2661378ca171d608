"""What was paid for, by the ledger's records: nothing twice."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from prefect_ttapi.cli.main import main
from prefect_ttapi.errors import Outcome
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore
from tests.cli.test_batches import batch
from tests.support.damaged_stores import claimed, image_key, kept, paid, unknown
from tests.support.generations import fresh_image, generation_of, request_of
from tests.support.ledgers import acquire, document, ledger_of, pay, recorded


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


def test_an_answer_that_was_paid_for_anew_counts_as_well(
    store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refresh, images that are lost, and a repair: the ledger forgets no payment, and names each once."""
    first = pay(store, ledger_of(store), b"one")
    pay(store, ledger_of(store, "run-b"), b"two", not_before=datetime.now(UTC))
    store.remove(
        image_key(pay(store, ledger_of(store, "run-c"), b"3", not_before=datetime.now(UTC)).generation)
    )
    last = pay(store, ledger_of(store, "run-d"), b"four")
    told = {each["batch"]: each["images"] for each in costs(store, "--by", "batch", capsys=capsys)}
    assert told == {"run-a": 1, "run-b": 1, "run-c": 1, "run-d": 1}
    store.remove(image_key(last.generation))
    main(["verify", store.url, "--quick", "--repair"])
    capsys.readouterr()
    (after,) = costs(store, "--price", "dall-e-2=1", capsys=capsys)
    assert (after["images"], after["calls"], after["usd"], after["in_vain"]) == (4, 4, 4, 0)
    assert first.generation.created_at.isoformat()[:19] in str(document(store)["replaced"])


@pytest.mark.parametrize(("most", "status"), [("1", 0), ("0.99", 1)])
def test_more_than_a_limit_is_told(
    most: str, status: int, store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was paid beyond --max-usd makes the command fail; without prices nobody could tell."""
    paid(store, "a meadow")
    assert main(["costs", store.url, "--price", "dall-e-2=1", "--max-usd", most]) == status
    assert ("1.00 USD were paid, which is more than --max-usd 0.99" in capsys.readouterr().err) is bool(
        status
    )
    assert main(["costs", store.url, "--max-usd", most]) == 2


def test_sends_before_the_answered_one_may_be_paid(
    store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server's fault that was sent again may have cost something; a busy server surely has not."""
    with claimed(store, "a meadow") as claim:
        claim.before_sending()
        made = generation_of(request_of("a meadow"), store.put_image(fresh_image(b"pixels"), {}))
        before = (Outcome.SERVER_FAULT, Outcome.REJECTED)
        recorded(claim, made.model_copy(update={"api_calls": 3, "earlier_outcomes": before}))
    (told,) = costs(store, capsys=capsys)
    assert (told["images"], told["calls"], told["maybe_paid"]) == (1, 3, 1)


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
