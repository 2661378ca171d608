"""Claims whose holder is gone, silent, slow or late."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime

import pytest

from prefect_ttapi.errors import StoreError, UnknownOutcomeError
from prefect_ttapi.ledger.claims import Claim, ClaimLostError
from prefect_ttapi.ledger.ledger import Waiting
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import request_of
from tests.support.ledgers import HASH, Clock, acquire, answer, claim_of, document, ledger_of, pay, recorded
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

#: Two machines' clocks: the holder's is right, 5 minutes fast, 5 minutes slow.
clocks_apart = pytest.mark.parametrize("apart", [0, 300, -300])


@clocks_apart
def test_a_silent_holder_is_taken_over_after_a_ttl(
    clock: Clock, folder_store: ImageStore, caplog, apart: float
) -> None:
    """A claim unchanged for its TTL on the waiter's own clock is taken over, not before, and noted."""
    store = folder_store
    with clock.ahead(apart):
        silent = claim_of(ledger_of(store, "run-a", ttl=60))
    waiter = ledger_of(store, "run-b", ttl=60)
    waiting = waiter.try_acquire(HASH)
    assert isinstance(waiting, Waiting)
    clock.now += 59.9
    waiting = waiter.try_acquire(HASH, waiting=waiting)
    assert isinstance(waiting, Waiting)
    clock.now += 0.2
    claim = waiter.try_acquire(HASH, waiting=waiting)
    assert isinstance(claim, Claim)
    assert [note.run_id for note in claim.maybe_paid] == ["run-a"]
    assert "its holder died or was cut off, perhaps after sending" in caplog.text
    with clock.ahead(apart), pytest.raises(ClaimLostError):
        silent.before_sending()


@clocks_apart
def test_a_renewed_claim_is_never_taken_over(clock: Clock, folder_store: ImageStore, apart: float) -> None:
    """However slow the holder is, 15 minutes here, while it renews its claim others wait."""
    store = folder_store
    with clock.ahead(apart):
        slow = claim_of(ledger_of(store, ttl=60))
    waiter = ledger_of(store, "run-b", ttl=60)
    waiting = waiter.try_acquire(HASH)
    for _ in range(20):
        clock.now += 45
        with clock.ahead(apart):
            slow.renew()
        waiting = waiter.try_acquire(HASH, waiting=waiting)
        assert isinstance(waiting, Waiting)
    with clock.ahead(apart):
        slow.before_sending()
        record = recorded(slow, answer(store))
    assert record == waiter.try_acquire(HASH, waiting=waiting)


def test_looks_at_a_claim_grow_rarer(folder_store: ImageStore) -> None:
    """Whoever waits looks again after 50 ms, then less and less often, in the end every 2 s."""
    claim = claim_of(ledger_of(folder_store))
    waiter, pauses = ledger_of(folder_store, "run-b"), []
    waiting = waiter.try_acquire(HASH)
    for _ in range(12):
        pauses.append(waiting.pause)
        waiting = waiter.try_acquire(HASH, waiting=waiting)
    assert (pauses[0], pauses[-1]) == (0.05, 2.0)
    assert pauses == sorted(pauses)
    assert len(set(pauses)) > 5
    claim.release()


def test_nothing_is_sent_on_a_lease_that_can_not_be_proven(clock: Clock, folder_store: ImageStore) -> None:
    """Before sending, a lease older than half a TTL is renewed first; one that was lost or late sends nothing."""
    store = folder_store
    ledger = ledger_of(store, ttl=60)
    claim = claim_of(ledger)
    sequence = document(store)["sequence"]
    clock.now += 29
    claim.before_sending()
    assert document(store)["sequence"] == sequence
    clock.now += 2
    claim.before_sending()
    assert document(store)["sequence"] == sequence + 1
    clock.now += 3600  # nobody took it: it can be renewed
    claim.before_sending()
    store.objects._path(ledger.documents.key(HASH)).unlink()
    clock.now += 31
    with pytest.raises(ClaimLostError, match="nothing was sent"):
        claim.before_sending()


def test_a_renewal_that_takes_too_long_sends_nothing(clock: Clock, folder_store: ImageStore) -> None:
    """If proving the lease itself takes 0.9 of a TTL, the proof is worth nothing."""
    claim = claim_of(ledger_of(Slow(folder_store, clock), ttl=60))
    clock.now += 31
    with pytest.raises(StoreError, match="too long to renew"):
        claim.before_sending()


class Slow:
    """A store whose writes take a minute of `clock`."""

    def __init__(self, store: ImageStore, clock: Clock) -> None:
        self._store, self._clock = store, clock

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def compare_and_swap(self, key: str, data: bytes, tag: str | None) -> str:
        self._clock.now += 0 if tag is None else 55
        return self._store.compare_and_swap(key, data, tag)


def test_a_late_answer_beats_a_claim(clock: Clock, folder_store: ImageStore) -> None:
    """A holder that was taken over while it waited for the API still records: an answer in hand beats a claim.

    Both return the same record, and the other payment, or what may be one, is on it.
    """
    store = folder_store
    late, quick = taken_over(store, clock)
    record = recorded(late, answer(store, b"late"))
    assert record.run_id == "run-a"
    assert [note.run_id for note in record.maybe_paid] == ["run-b"]
    second = recorded(quick, answer(store, b"quick"))
    assert (second.run_id, second.maybe_paid) == ("run-a", ())
    assert [note.run_id for note in second.also_paid] == ["run-b"]
    assert second.generation == record.generation


def test_a_late_answer_beats_a_refresh_and_names_what_it_replaces(
    clock: Clock, folder_store: ImageStore
) -> None:
    """A late finisher replaces the record that a refresh keeps: that payment is named, and the refresh's."""
    store = folder_store
    late = claim_of(ledger_of(store, "run-late"))
    late.before_sending()
    taker = ledger_of(store, "run-taker")
    waiting = taker.try_acquire(HASH)
    clock.now += 61
    recorded(taker.try_acquire(HASH, waiting=waiting), answer(store, b"first"))
    refresher = ledger_of(store, "run-refresh")
    refreshing = claim_of(refresher, not_before=datetime.now(UTC))
    record = recorded(late, answer(store, b"late"))
    assert (record.run_id, [note.run_id for note in record.also_paid]) == ("run-late", ["run-taker"])
    assert [note.run_id for note in record.maybe_paid] == ["run-refresh"]
    refreshing.release()
    assert ledger_of(store).look_up(HASH).maybe_paid == ()


def test_an_answer_is_recorded_once(folder_store: ImageStore) -> None:
    """Recording again what a refresh keeps meanwhile leaves the refresh its claim."""
    claim = claim_of(ledger_of(folder_store))
    claim.before_sending()
    paid = claim.answer(answer(folder_store))
    record = claim.record_answer(paid)
    refreshing = claim_of(ledger_of(folder_store, "run-b"), not_before=datetime.now(UTC))
    assert claim.record_answer(paid).generation == record.generation
    assert document(folder_store)["token"] == refreshing.token


def test_a_late_loser_is_told_the_standing_record(clock: Clock, folder_store: ImageStore) -> None:
    """Where the second payer recorded first, the late one gets that record, and its own payment is noted."""
    store = folder_store
    late, quick = taken_over(store, clock)
    first = recorded(quick, answer(store, b"quick"))
    assert [note.run_id for note in first.maybe_paid] == ["run-a"]
    record = recorded(late, answer(store, b"late"))
    assert record.generation == first.generation
    assert (record.maybe_paid, [note.run_id for note in record.also_paid]) == ((), ["run-a"])


def test_one_that_surely_did_not_pay_is_struck_off(clock: Clock, folder_store: ImageStore) -> None:
    """A claim that was lost to a recorded answer and then failed for free leaves no trace of a payment."""
    store = folder_store
    late, quick = taken_over(store, clock)
    recorded(late, answer(store, b"late"))
    quick.release()
    record = ledger_of(store).look_up(HASH)
    assert (record.maybe_paid, record.also_paid) == ((), ())


def test_a_late_failure_leaves_the_new_claim_alone(clock: Clock, folder_store: ImageStore) -> None:
    """A holder that was taken over and then fails changes nothing of the new holder's claim."""
    store = folder_store
    late, quick = taken_over(store, clock)
    before = document(store)
    late.mark_unknown("HTTP 504")
    assert document(store) == before
    assert [note.run_id for note in recorded(quick, answer(store)).maybe_paid] == ["run-a"]


def taken_over(store: ImageStore, clock: Clock) -> tuple[Claim, Claim]:
    """A claim of run-a that was sent and then silent, and the claim of run-b that took it over and was sent."""
    late = claim_of(ledger_of(store, "run-a", ttl=60))
    late.before_sending()
    waiter = ledger_of(store, "run-b", ttl=60)
    waiting = waiter.try_acquire(HASH)
    clock.now += 61
    quick = waiter.try_acquire(HASH, waiting=waiting)
    quick.before_sending()
    return late, quick


def test_a_dead_claim_may_be_left_to_a_new_run(clock: Clock, folder_store: ImageStore) -> None:
    """With on_dead_claim="unknown" the run that finds a dead claim notes it and sends nothing; a new run may."""
    store = folder_store
    options = {"ttl": 60, "on_dead_claim": "unknown"}
    dead = claim_of(ledger_of(store, "run-a", **options))
    finder = ledger_of(store, "run-b", **options)
    waiting = finder.try_acquire(HASH)
    clock.now += 61
    with pytest.raises(UnknownOutcomeError, match="its holder died"):
        finder.try_acquire(HASH, waiting=waiting)
    assert document(store)["state"] == "unknown"
    with pytest.raises(UnknownOutcomeError):
        acquire(finder, HASH)
    with pytest.raises(ClaimLostError):
        dead.before_sending()
    record = pay(store, ledger_of(store, "run-c", **options))
    assert [note.run_id for note in record.maybe_paid] == ["run-a"]


def test_a_runs_own_dead_claim_is_an_unknown_outcome(clock: Clock, folder_store: ImageStore) -> None:
    """A retry of the run whose process died in flight does not send again by itself, and leaves that on record."""
    store = folder_store
    ledger = ledger_of(store, ttl=60)
    dead = claim_of(ledger)
    waiting = ledger.try_acquire(HASH)
    clock.now += 61
    with pytest.raises(UnknownOutcomeError, match="its holder died"):
        ledger.try_acquire(HASH, waiting=waiting)
    assert document(store)["state"] == "unknown"
    del dead


def test_an_abandoned_claim_of_this_process_is_void_at_once(folder_store: ImageStore) -> None:
    """A claim of this very process that nobody holds any more blocks nobody."""
    claim = claim_of(ledger_of(folder_store))
    assert isinstance(ledger_of(folder_store, "run-b").try_acquire(HASH), Waiting)
    del claim
    assert isinstance(ledger_of(folder_store, "run-b").try_acquire(HASH), Claim)


def test_claims_are_renewed_in_the_background(folder_store: ImageStore) -> None:
    """Within its block a claim is renewed again and again, and can still be recorded."""
    with claim_of(ledger_of(folder_store, ttl=3.0)) as claim:
        first, deadline = document(folder_store)["sequence"], time.monotonic() + 60
        while document(folder_store)["sequence"] < first + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        claim.before_sending()
        record = recorded(claim, answer(folder_store))
    assert document(folder_store)["sequence"] >= first + 3
    assert record.maybe_paid == ()


def test_a_connection_that_hangs_lets_no_other_claim_run_out(s3_server: S3Server) -> None:
    """While the store leaves the renewal of one claim without an answer, others are renewed."""
    hangs, end = threading.Event(), threading.Event()

    def keep_waiting(method: str, path: str, _headers: dict[str, str]) -> None:
        if method == "PUT" and "a" * 64 in path and hangs.is_set():
            end.wait(30)

    with meddling_proxy(s3_server.url, keep_waiting) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        ledger = ledger_of(store, ttl=1.0)
        with acquire(ledger, "a" * 64), acquire(ledger, "b" * 64):
            hangs.set()
            deadline = time.monotonic() + 20
            key, sequence = ledger.documents.key("b" * 64), 1
            while sequence < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
                sequence = json.loads(store.read(key) or b"")["sequence"]
            end.set()
        assert sequence >= 3


def test_few_threads_renew_all_claims_and_end_with_the_last(folder_store: ImageStore) -> None:
    """Many claims at once share eight renewing threads; when none is left, they are gone."""

    def renewing() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "ttapi-renewals"]

    ledger = ledger_of(folder_store)
    hashes = [request_of(f"prompt {number}").request_hash for number in range(20)]
    claims = [acquire(ledger, request_hash).__enter__() for request_hash in hashes]
    threads = renewing()
    assert len(threads) == 8
    for claim in claims:
        claim.__exit__(None, None, None)
    for thread in threads:
        thread.join(10)
    assert renewing() == []
