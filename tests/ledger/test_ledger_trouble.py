"""A store that fails, lies or holds nonsense: the ledger fails closed, by name, in one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_ttapi.errors import StoreError, UnknownOutcomeError
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore
from tests.support.ledgers import HASH, acquire, claim_of, document, ledger_of, pay, rewrite
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 3}, "written by a newer version"),
        ({"state": "finished"}, "is no ledger record"),
        ({"request_hash": "0" * 64}, "another request or API"),
        ({"api_origin": "sandbox"}, "another request or API"),
        ({"ttl": 1e9}, "is no ledger record"),
        ({"state": "claimed"}, "a claim without a holder"),
        ({"state": "generated", "answer": None}, "names no images"),
        ({"maybe_paid": [{"token": "t"}]}, "is no ledger record"),
        ({"token": "\x1b[2J"}, "is no ledger record"),
        ({"answer": {"token": "t", "run_id": "r" * 601, "generation": {}}}, "is no ledger record"),
        ({"answer": {"token": "t", "run_id": "r", "generation": {}}}, "holds no generation"),
        ({"answer": {"token": "t", "run_id": "r", "generation": {"images": 3}}}, "holds no generation"),
    ],
)
def test_senseless_documents_fail_closed(folder_store: ImageStore, changes: dict, why: str) -> None:
    """A document that makes no sense is named by key; nothing is sent for it, and it is not overwritten."""
    pay(folder_store, ledger_of(folder_store))
    rewrite(folder_store, **changes)
    before = document(folder_store)
    for ask in (ledger_of(folder_store).look_up, ledger_of(folder_store, "run-b").try_acquire):
        with pytest.raises(StoreError, match=why) as caught:
            ask(HASH)
        assert f"{HASH}.json" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert document(folder_store) == before


@pytest.mark.parametrize(
    "image",
    [{"sha256": "../../../etc/passwd"}, {"sha256": "0" * 63}, {"media_type": "text/html"}, {"sha256": 7}],
)
def test_records_can_not_name_other_objects(folder_store: ImageStore, image: dict) -> None:
    """Whoever can write to the store can't make a record point outside its images."""
    pay(folder_store, ledger_of(folder_store))
    doc = document(folder_store)
    doc["answer"]["generation"]["images"][0] |= image
    rewrite(folder_store, answer=doc["answer"])
    with pytest.raises(StoreError, match=r"names an image that can't be|holds no generation"):
        ledger_of(folder_store).look_up(HASH)


def test_another_requests_generation_is_refused(folder_store: ImageStore) -> None:
    """A record copied under another request's hash is no hit for that request."""
    pay(folder_store, ledger_of(folder_store))
    other = ImageRequest(prompt="another")
    doc = document(folder_store) | {"request_hash": other.request_hash}
    doc["answer"]["generation"]["request_hash"] = other.request_hash
    folder_store.write(
        ledger_of(folder_store).documents.key(other.request_hash),
        json.dumps(doc).encode(),
        "application/json",
    )
    with pytest.raises(StoreError, match="the generation of another request"):
        ledger_of(folder_store).look_up(other.request_hash)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_no_bytes_crash_the_ledger(folder_store: ImageStore, data: bytes) -> None:
    """Whatever bytes are found in a record's place, the answer is an error that names it."""
    ledger = ledger_of(folder_store)
    folder_store.write(ledger.documents.key(HASH), data, "application/json")
    with pytest.raises(StoreError, match="is no ledger record"):
        acquire(ledger, HASH)


@pytest.mark.parametrize("request_hash", ["", "abc", "../" + "0" * 61, "G" * 64])
def test_only_hashes_are_looked_up(folder_store: ImageStore, request_hash: str) -> None:
    """A key is made of a request's hash and of nothing else."""
    with pytest.raises(StoreError, match="is no request hash"):
        ledger_of(folder_store).look_up(request_hash)


def test_without_a_store_nothing_is_claimed(tmp_path) -> None:
    """Where the store can't be written, there is no claim, hence nothing to send with."""
    (tmp_path / "file").write_text("")
    store = ImageStore(url=str(tmp_path / "file" / "store"))
    with pytest.raises(StoreError):
        acquire(ledger_of(store), HASH)


def test_a_store_that_fails_afterwards_hides_no_error(folder_store: ImageStore, caplog) -> None:
    """Where a claim can't be given back, the error that ended it goes on; the claim counts as a dead holder's."""
    broken = Broken(folder_store)
    with pytest.raises(ZeroDivisionError), claim_of(ledger_of(broken)) as claim:
        break_down(claim, broken)
    assert f"the claim on request {HASH[:12]} stays until it expires: the disk is full" in caplog.text
    with pytest.raises(UnknownOutcomeError):
        acquire(ledger_of(folder_store), HASH)
    assert [note.run_id for note in claim_of(ledger_of(folder_store, "run-b")).maybe_paid] == ["run-a"]


class Broken:
    """A store that takes no documents any more once it `fails`."""

    def __init__(self, store: ImageStore) -> None:
        self._store, self.fails = store, False

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def compare_and_swap(self, key: str, data: bytes, tag: str | None) -> str:
        if self.fails:
            raise StoreError("the disk is full")
        return self._store.compare_and_swap(key, data, tag)


def break_down(claim: Claim, store: Broken) -> None:
    claim.before_sending()
    store.fails = True
    raise ZeroDivisionError


def test_a_store_that_ignores_conditions_gets_no_claim(s3_server: S3Server) -> None:
    """Before the first claim of a process the store shows that it refuses what it should, or nothing is claimed."""

    def drop(_method: str, _path: str, headers: dict[str, str]) -> None:
        headers.pop("If-None-Match", None)

    with meddling_proxy(s3_server.url, drop) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        with pytest.raises(StoreError, match="two machines could pay"):
            acquire(ledger_of(store), HASH)
        assert store.read(ledger_of(store).documents.key(HASH)) is None


@pytest.mark.parametrize(
    "options", [{"ttl": 0}, {"ttl": 1e9}, {"ttl": float("nan")}, {"on_dead_claim": "retyr"}]
)
def test_illegal_options_are_refused(folder_store: ImageStore, options: dict) -> None:
    """A setting that would make claims senseless is refused at once."""
    with pytest.raises(ValueError, match="must be"):
        ledger_of(folder_store, **options)
