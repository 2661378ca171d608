"""Who may pay, what is remembered, and what each failure leaves behind."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_ttapi.errors import Outcome, StoreError, UnknownOutcomeError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import Generation
from prefect_ttapi.storage.claims import Claim, ClaimLostError
from prefect_ttapi.storage.ledger import Ledger, Waiting
from prefect_ttapi.storage.records import Record, State
from prefect_ttapi.storage.shelf import slug_of
from prefect_ttapi.storage.store import ImageStore
from tests.storage.samples import API, generation_of, request_of, stored

REQUEST = request_of()
HASH = REQUEST.request_hash


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ledger_of(store: ImageStore, run_id: str = "run-a", **options: object) -> Ledger:
    return Ledger(store, API, run_id, **options)


def answer(store: ImageStore, data: bytes = b"pixels", created_at: datetime | None = None) -> Generation:
    return generation_of(REQUEST, stored(store, data), created_at=created_at)


def claim_of(ledger: Ledger, **options: object) -> Claim:
    claim = ledger.acquire(HASH, **options)
    assert isinstance(claim, Claim)
    return claim


def pay(store: ImageStore, ledger: Ledger, data: bytes = b"pixels", **options: object) -> Record:
    """Claim, send, record."""
    with claim_of(ledger, **options) as claim:
        claim.before_sending()
        return claim.record(answer(store, data))


def document(store: ImageStore) -> dict:
    return json.loads(store.read(Ledger(store, API, "reader").key(HASH)))


def rewrite(store: ImageStore, **changes: object) -> None:
    store.write(
        Ledger(store, API, "x").key(HASH), json.dumps(document(store) | changes).encode(), "application/json"
    )


# What is remembered


def test_an_answer_is_remembered(store: ImageStore) -> None:
    """What one run records, every later run finds, word for word, and with images that are there."""
    ledger = ledger_of(store)
    assert ledger.look_up(HASH) is None
    with claim_of(ledger) as claim:
        claim.before_sending()
        generation = answer(store)
        record = claim.record(generation, result_key="opaque")
    assert (record.generation, record.state, record.run_id) == (generation, State.GENERATED, "run-a")
    assert (record.result_key, record.maybe_paid, record.also_paid) == ("opaque", (), ())
    for later in (ledger, ledger_of(store, "run-b")):
        assert later.look_up(HASH) == later.acquire(HASH) == later.acquire(HASH, known_absent=True) == record


def test_a_store_can_be_moved(folder_store: ImageStore, tmp_path) -> None:
    """Records name no addresses: a folder that was moved or copied elsewhere is as good as before."""
    pay(folder_store, ledger_of(folder_store))
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = ImageStore(url=str(tmp_path / "moved"))
    image = ledger_of(moved).look_up(HASH).generation.images[0]
    assert moved.read_bytes(image.uri) == b"pixels"


def test_origins_are_apart(folder_store: ImageStore) -> None:
    """A sandbox's answer is never another API's."""
    pay(folder_store, Ledger(folder_store, "sandbox", "run-a"))
    assert ledger_of(folder_store).look_up(HASH) is None
    assert Ledger(folder_store, "sandbox", "run-b").look_up(HASH) is not None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            "{}{}".format, st.sampled_from(["https://", "http://"]), st.text("abc.:/_-%A3", min_size=1)
        ),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_no_two_origins_share_a_folder(origins: list[str]) -> None:
    """An origin's folder is its own, and holds nothing that a key may not hold."""
    slugs = [slug_of(origin) for origin in [*origins, "sandbox"]]
    assert len(set(slugs)) == len(slugs)
    assert all(
        set(slug) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        for slug in slugs
    )


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_no_hit_without_intact_images(store: ImageStore, caplog, damage: str) -> None:
    """A record whose image is gone or cut short is no hit: it is paid for again, and the log says why."""
    image = pay(store, ledger_of(store)).generation.images[0]
    key = store.objects.key(image.uri)
    if damage == "cut short":
        store.write(key, b"pix", "image/png")
    else:
        remove(store, key)
    later = ledger_of(store, "run-b")
    assert later.look_up(HASH) is None
    assert f"request {HASH[:12]} was paid for, but {image.uri} is gone or cut short" in caplog.text
    record = pay(store, later)
    assert (record.run_id, record.maybe_paid) == ("run-b", ())
    assert later.look_up(HASH) == record


def remove(store: ImageStore, key: str) -> None:
    if store.url.startswith("s3://"):
        bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
        store.objects._run(store.objects._fs._call_s3("delete_object", Bucket=bucket, Key=f"{prefix}/{key}"))
    else:
        store.objects._path(key).unlink()


# Who may pay


def test_one_pays_the_others_wait(store: ImageStore, caplog) -> None:
    """Of 8 threads that ask for the same at once one pays; the others wait, say so once, and get its record."""
    caplog.set_level(logging.INFO, "prefect_ttapi")
    sends = []

    def ask(number: int) -> Record:
        found = ledger_of(store, f"run-{number}").acquire(HASH)
        if isinstance(found, Record):
            return found
        with found as claim:
            claim.before_sending()
            sends.append(number)
            time.sleep(0.3)
            return claim.record(answer(store, b"image %d" % number))

    with ThreadPoolExecutor(8) as threads:
        records = list(threads.map(ask, range(8)))
    assert len(sends) == 1
    assert all(record == records[0] for record in records)
    assert records[0].run_id == f"run-{sends[0]}"
    waits = [message for message in caplog.messages if "waiting for its record" in message]
    assert 1 <= len(waits) <= 7
    assert f"by run run-{sends[0]} on" in waits[0]


def test_giving_back_lets_another_pay(folder_store: ImageStore) -> None:
    """After a failure that surely cost nothing, anyone may send at once, the same run too."""
    with claim_of(ledger_of(folder_store)) as claim:
        claim.before_sending()
        claim.release()
    assert document(folder_store)["state"] == "released"
    with claim_of(ledger_of(folder_store)) as claim:
        pass
    record = pay(folder_store, ledger_of(folder_store, "run-b"))
    assert (record.maybe_paid, record.also_paid) == ((), ())


def send_and_fail(claim: Claim) -> None:
    claim.before_sending()
    raise ZeroDivisionError("boom\nand more")


def test_leaving_without_a_word(folder_store: ImageStore) -> None:
    """A claim left by an exception is released if nothing was sent, and an unknown outcome otherwise."""
    with pytest.raises(ZeroDivisionError), claim_of(ledger_of(folder_store)):
        raise ZeroDivisionError
    assert document(folder_store)["state"] == "released"
    with pytest.raises(ZeroDivisionError), claim_of(ledger_of(folder_store)) as claim:
        send_and_fail(claim)
    assert document(folder_store)["state"] == "unknown"
    assert document(folder_store)["maybe_paid"][0]["what"] == "unknown: ZeroDivisionError: boom and more"
    with claim_of(ledger_of(folder_store, "run-b")) as claim:
        claim.before_sending()
    assert document(folder_store)["state"] == "unknown"


def test_an_unknown_outcome_is_resent_by_a_new_run_only(store: ImageStore, caplog) -> None:
    """The run that knows nothing of its send does not send again; a new one does, says so, and the record names it."""
    with claim_of(ledger_of(store)) as claim:
        claim.before_sending()
        claim.mark_unknown("read timed out", Outcome.UNKNOWN)
    for _ in range(2):
        with pytest.raises(UnknownOutcomeError, match=r"unknown: read timed out; run run-a.*start a new run"):
            ledger_of(store).acquire(HASH)
    assert ledger_of(store).look_up(HASH) is None
    record = pay(store, ledger_of(store, "run-b"))
    assert "may already have been paid for by run run-a" in caplog.text
    assert [note.run_id for note in record.maybe_paid] == ["run-a"]
    assert ledger_of(store).acquire(HASH) == record


def test_an_unknown_outcome_is_resent_in_the_same_run_when_asked_for(folder_store: ImageStore) -> None:
    """`retry_unknown_outcome` is the opt-in inside a run; the first send stays on record."""
    with claim_of(ledger_of(folder_store)) as claim:
        claim.before_sending()
        claim.mark_unknown("HTTP 504")
    record = pay(folder_store, ledger_of(folder_store, retry_unknown_outcome=True))
    assert [note.run_id for note in record.maybe_paid] == ["run-a"]


def test_a_run_remembers_its_unknown_outcome_past_others_failures(folder_store: ImageStore) -> None:
    """Another run that gave its claim back does not wipe out what this run doesn't know."""
    with claim_of(ledger_of(folder_store)) as claim:
        claim.before_sending()
        claim.mark_unknown("HTTP 504")
    with claim_of(ledger_of(folder_store, "run-b")) as claim:
        claim.release()
    with pytest.raises(UnknownOutcomeError):
        ledger_of(folder_store).acquire(HASH)


# Claims whose holder is gone, silent or slow


def test_a_silent_holder_is_taken_over_after_a_ttl(folder_store: ImageStore, caplog) -> None:
    """A claim unchanged for its TTL on the waiter's own clock is taken over, not before, and noted."""
    clock, store = Clock(), folder_store
    silent = claim_of(ledger_of(store, "run-a", ttl=60, clock=clock))
    waiter = ledger_of(store, "run-b", ttl=60, clock=clock)
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
    with pytest.raises(ClaimLostError):
        silent.before_sending()


def test_a_renewed_claim_is_never_taken_over(folder_store: ImageStore) -> None:
    """However slow the holder is, while it renews its claim others wait."""
    clock, store = Clock(), folder_store
    slow = claim_of(ledger_of(store, ttl=60, clock=clock))
    waiter = ledger_of(store, "run-b", ttl=60, clock=clock)
    waiting = waiter.try_acquire(HASH)
    for _ in range(20):
        clock.now += 45
        slow.renew()
        waiting = waiter.try_acquire(HASH, waiting=waiting)
        assert isinstance(waiting, Waiting)
    slow.before_sending()
    assert slow.record(answer(store)) == waiter.try_acquire(HASH, waiting=waiting)


def test_nothing_is_sent_on_a_lease_that_can_not_be_proven(folder_store: ImageStore) -> None:
    """Before sending, a lease older than half a TTL is renewed first; one that was lost or late sends nothing."""
    clock, store = Clock(), folder_store
    ledger = ledger_of(store, ttl=60, clock=clock)
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
    store.objects._path(ledger.key(HASH)).unlink()
    clock.now += 31
    with pytest.raises(ClaimLostError, match="nothing was sent"):
        claim.before_sending()


def test_a_renewal_that_takes_too_long_sends_nothing(folder_store: ImageStore) -> None:
    """If proving the lease itself takes 0.9 of a TTL, the proof is worth nothing."""
    clock = Clock()
    claim = claim_of(ledger_of(Slow(folder_store, clock), ttl=60, clock=clock))
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


def test_a_late_answer_beats_a_claim(folder_store: ImageStore) -> None:
    """A holder that was taken over while it waited for the API still records: an answer in hand beats a claim.

    Both return the same record, and the other payment, or what may be one, is on it.
    """
    clock, store = Clock(), folder_store
    late, quick = taken_over(store, clock)
    record = late.record(answer(store, b"late"))
    assert record.run_id == "run-a"
    assert [note.run_id for note in record.maybe_paid] == ["run-b"]
    second = quick.record(answer(store, b"quick"))
    assert (second.run_id, second.maybe_paid) == ("run-a", ())
    assert [note.run_id for note in second.also_paid] == ["run-b"]
    assert second.generation == record.generation


def test_a_late_loser_is_told_the_standing_record(folder_store: ImageStore) -> None:
    """Where the second payer recorded first, the late one gets that record, and its own payment is noted."""
    clock, store = Clock(), folder_store
    late, quick = taken_over(store, clock)
    first = quick.record(answer(store, b"quick"))
    assert [note.run_id for note in first.maybe_paid] == ["run-a"]
    record = late.record(answer(store, b"late"))
    assert record.generation == first.generation
    assert (record.maybe_paid, [note.run_id for note in record.also_paid]) == ((), ["run-a"])


def test_one_that_surely_did_not_pay_is_struck_off(folder_store: ImageStore) -> None:
    """A claim that was lost to a recorded answer and then failed for free leaves no trace of a payment."""
    clock, store = Clock(), folder_store
    late, quick = taken_over(store, clock)
    late.record(answer(store, b"late"))
    quick.release()
    record = ledger_of(store).look_up(HASH)
    assert (record.maybe_paid, record.also_paid) == ((), ())


def test_a_late_failure_leaves_the_new_claim_alone(folder_store: ImageStore) -> None:
    """A holder that was taken over and then fails changes nothing of the new holder's claim."""
    clock, store = Clock(), folder_store
    late, quick = taken_over(store, clock)
    before = document(store)
    late.mark_unknown("HTTP 504")
    assert document(store) == before
    assert [note.run_id for note in quick.record(answer(store)).maybe_paid] == ["run-a"]


def taken_over(store: ImageStore, clock: Clock) -> tuple[Claim, Claim]:
    """A claim of run-a that was sent and then silent, and the claim of run-b that took it over and was sent."""
    late = claim_of(ledger_of(store, "run-a", ttl=60, clock=clock))
    late.before_sending()
    waiter = ledger_of(store, "run-b", ttl=60, clock=clock)
    waiting = waiter.try_acquire(HASH)
    clock.now += 61
    quick = waiter.try_acquire(HASH, waiting=waiting)
    quick.before_sending()
    return late, quick


def test_a_dead_claim_may_be_left_to_a_new_run(folder_store: ImageStore) -> None:
    """With on_dead_claim="unknown" the run that finds a dead claim notes it and sends nothing; a new run may."""
    clock, store = Clock(), folder_store
    options = {"ttl": 60, "clock": clock, "on_dead_claim": "unknown"}
    dead = claim_of(ledger_of(store, "run-a", **options))
    finder = ledger_of(store, "run-b", **options)
    waiting = finder.try_acquire(HASH)
    clock.now += 61
    with pytest.raises(UnknownOutcomeError, match="its holder died"):
        finder.try_acquire(HASH, waiting=waiting)
    assert document(store)["state"] == "unknown"
    with pytest.raises(UnknownOutcomeError):
        finder.acquire(HASH)
    with pytest.raises(ClaimLostError):
        dead.before_sending()
    record = pay(store, ledger_of(store, "run-c", **options))
    assert [note.run_id for note in record.maybe_paid] == ["run-a"]


def test_a_runs_own_dead_claim_is_an_unknown_outcome(folder_store: ImageStore) -> None:
    """A retry of the run whose process died in flight does not send again by itself, and leaves that on record."""
    clock, store = Clock(), folder_store
    ledger = ledger_of(store, ttl=60, clock=clock)
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


# Refreshing


def test_a_refresh_counts_nothing_older(store: ImageStore) -> None:
    """With `not_before` an older record does not count; a retry within the run finds what it paid for."""
    old = pay(store, ledger_of(store))
    start = datetime.now(UTC)
    refreshing = ledger_of(store, "run-b")
    assert refreshing.look_up(HASH, start) is None
    new = pay(store, refreshing, b"new", not_before=start)
    assert new.generation != old.generation
    assert refreshing.acquire(HASH, not_before=start) == new
    assert ledger_of(store, "run-c").acquire(HASH) == new
    with pytest.raises(ValueError, match="time zone"):
        refreshing.acquire(HASH, not_before=datetime(2031, 1, 1))


def test_a_runs_own_record_counts_whatever_the_clocks_say(folder_store: ImageStore) -> None:
    """A retry on a machine whose clock is ahead does not pay again for what its own run has paid for."""
    record = pay(folder_store, ledger_of(folder_store, "run-b"))
    ahead = datetime.now(UTC) + timedelta(minutes=5)
    assert ledger_of(folder_store, "run-b").acquire(HASH, not_before=ahead) == record


def test_others_use_the_old_record_while_one_refreshes(store: ImageStore) -> None:
    """A refresh under way blocks nobody who is content with the old record, and its failure restores it."""
    old = pay(store, ledger_of(store))
    failures: list[Callable[[Claim], None]] = [Claim.release, lambda claim: claim.mark_unknown("HTTP 504")]
    for number, fail in enumerate(failures):
        refreshing = ledger_of(store, f"refresh-{number}")
        with claim_of(refreshing, not_before=datetime.now(UTC)) as claim:
            found = ledger_of(store, "run-c").acquire(HASH)
            assert (found.generation, found.state) == (old.generation, State.CLAIMED)
            assert isinstance(
                ledger_of(store, "run-d").try_acquire(HASH, not_before=datetime.now(UTC)), Waiting
            )
            claim.before_sending()
            fail(claim)
        again = ledger_of(store, "run-e").acquire(HASH)
        assert (again.generation, again.state) == (old.generation, State.GENERATED)
        assert [note.run_id for note in again.maybe_paid] == ["refresh-1"] * number
    with pytest.raises(UnknownOutcomeError):
        ledger_of(store, "refresh-1").acquire(HASH, not_before=datetime.now(UTC))


def test_a_refresh_whose_holder_died_keeps_the_old_record(folder_store: ImageStore) -> None:
    """The old record is a hit during and after the claim of a refresh that died."""
    clock, store = Clock(), folder_store
    old = pay(store, ledger_of(store))
    start = datetime.now(UTC)
    dead = claim_of(ledger_of(store, "run-b", ttl=60, clock=clock), not_before=start)
    clock.now += 3600
    assert ledger_of(store, "run-c", clock=clock).acquire(HASH).generation == old.generation
    del dead
    new = pay(store, ledger_of(store, "run-d"), b"new", not_before=start)
    assert [note.run_id for note in new.maybe_paid] == ["run-b"]


# A store that lies, fails or holds nonsense


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "written by a newer version"),
        ({"state": "finished"}, "is no ledger record"),
        ({"request_hash": "0" * 64}, "another request or API"),
        ({"api_origin": "sandbox"}, "another request or API"),
        ({"ttl": 1e9}, "is no ledger record"),
        ({"state": "claimed"}, "a claim without a holder"),
        ({"state": "generated", "answer": None}, "names no images"),
        ({"maybe_paid": [{"token": "t"}]}, "is no ledger record"),
        ({"answer": {"token": "t", "run_id": "r", "generation": {}}}, "holds no generation"),
        ({"answer": {"token": "t", "run_id": "r", "generation": {"images": 3}}}, "holds no generation"),
    ],
)
def test_senseless_documents_fail_closed(folder_store: ImageStore, changes: dict, why: str) -> None:
    """A document that makes no sense is named by key; nothing is sent for it, and it is not overwritten."""
    pay(folder_store, ledger_of(folder_store))
    rewrite(folder_store, **changes)
    before = document(folder_store)
    for ask in (ledger_of(folder_store).look_up, ledger_of(folder_store, "run-b").acquire):
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
        ledger_of(folder_store).key(other.request_hash), json.dumps(doc).encode(), "application/json"
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
    folder_store.write(ledger.key(HASH), data, "application/json")
    with pytest.raises(StoreError, match="is no ledger record"):
        ledger.acquire(HASH)


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
        ledger_of(store).acquire(HASH)


# Renewal


def test_claims_are_renewed_in_the_background(folder_store: ImageStore) -> None:
    """Within its block a claim is renewed again and again, and can still be recorded."""
    with claim_of(ledger_of(folder_store, ttl=3.0)) as claim:
        first, deadline = document(folder_store)["sequence"], time.monotonic() + 60
        while document(folder_store)["sequence"] < first + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        claim.before_sending()
        record = claim.record(answer(folder_store))
    assert document(folder_store)["sequence"] >= first + 3
    assert record.maybe_paid == ()


def test_one_thread_renews_all_claims_and_ends_with_the_last(folder_store: ImageStore) -> None:
    """Many claims at once share one renewing thread; when none is left, it is gone."""

    def renewing() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "ttapi-renewals"]

    ledger = ledger_of(folder_store)
    hashes = [request_of(f"prompt {number}").request_hash for number in range(20)]
    claims = [ledger.acquire(request_hash).__enter__() for request_hash in hashes]
    (thread,) = renewing()
    for claim in claims:
        claim.__exit__(None, None, None)
    thread.join(10)
    assert renewing() == []
