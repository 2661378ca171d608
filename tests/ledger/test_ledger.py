"""What is remembered of a request, who may pay for it, and what a refresh does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_ttapi.errors import Outcome, UnknownOutcomeError
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import Record, State
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.storage.layout import slug_of
from prefect_ttapi.storage.store import ImageStore
from tests.support.ledgers import HASH, Clock, acquire, answer, claim_of, document, ledger_of, pay, recorded


def test_an_answer_is_remembered(store: ImageStore) -> None:
    """What one run records, every later run finds, word for word, and with images that are there."""
    ledger = ledger_of(store)
    assert ledger.look_up(HASH) is None
    with claim_of(ledger) as claim:
        claim.before_sending()
        generation = answer(store)
        record = recorded(claim, generation, result_key="opaque")
    assert (record.generation, record.state, record.run_id) == (generation, State.GENERATED, "run-a")
    assert (record.result_key, record.maybe_paid, record.also_paid) == ("opaque", (), ())
    for later in (ledger, ledger_of(store, "run-b")):
        assert (
            later.look_up(HASH) == acquire(later, HASH) == acquire(later, HASH, known_absent=True) == record
        )


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
        store.objects.delete(key)
    later = ledger_of(store, "run-b")
    assert later.look_up(HASH) is None
    assert f"request {HASH[:12]} was paid for, but {image.uri} is gone or cut short" in caplog.text
    record = pay(store, later)
    assert (record.run_id, record.maybe_paid) == ("run-b", ())
    assert later.look_up(HASH) == record


def test_one_pays_the_others_wait(store: ImageStore, caplog) -> None:
    """Of 8 threads that ask for the same at once one pays; the others wait, say so once, and get its record."""
    caplog.set_level(logging.INFO, "prefect_ttapi")
    sends = []

    def ask(number: int) -> Record:
        found = acquire(ledger_of(store, f"run-{number}"), HASH)
        if isinstance(found, Record):
            return found
        with found as claim:
            claim.before_sending()
            sends.append(number)
            time.sleep(0.3)
            return recorded(claim, answer(store, b"image %d" % number))

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
            acquire(ledger_of(store), HASH)
    assert ledger_of(store).look_up(HASH) is None
    record = pay(store, ledger_of(store, "run-b"))
    assert "may already have been paid for by run run-a" in caplog.text
    assert [note.run_id for note in record.maybe_paid] == ["run-a"]
    assert acquire(ledger_of(store), HASH) == record


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
    assert document(folder_store)["state"] == "unknown"
    with pytest.raises(UnknownOutcomeError):
        acquire(ledger_of(folder_store), HASH)


def test_a_refresh_counts_nothing_older(store: ImageStore) -> None:
    """With `not_before` an older record does not count; a retry within the run finds what it paid for."""
    old = pay(store, ledger_of(store))
    start = datetime.now(UTC)
    refreshing = ledger_of(store, "run-b")
    assert refreshing.look_up(HASH, start) is None
    new = pay(store, refreshing, b"new", not_before=start)
    assert new.generation != old.generation
    assert acquire(refreshing, HASH, not_before=start) == new
    assert acquire(ledger_of(store, "run-c"), HASH) == new
    with pytest.raises(ValueError, match="time zone"):
        acquire(refreshing, HASH, not_before=datetime(2031, 1, 1))


def test_a_runs_own_record_counts_whatever_the_clocks_say(folder_store: ImageStore) -> None:
    """A retry on a machine whose clock is ahead does not pay again for what its own run has paid for."""
    record = pay(folder_store, ledger_of(folder_store, "run-b"))
    ahead = datetime.now(UTC) + timedelta(minutes=5)
    assert acquire(ledger_of(folder_store, "run-b"), HASH, not_before=ahead) == record


def test_others_use_the_old_record_while_one_refreshes(store: ImageStore) -> None:
    """A refresh under way blocks nobody who is content with the old record, and its failure restores it."""
    old = pay(store, ledger_of(store))
    failures: list[Callable[[Claim], None]] = [Claim.release, lambda claim: claim.mark_unknown("HTTP 504")]
    for number, fail in enumerate(failures):
        refreshing = ledger_of(store, f"refresh-{number}")
        with claim_of(refreshing, not_before=datetime.now(UTC)) as claim:
            found = acquire(ledger_of(store, "run-c"), HASH)
            assert (found.generation, found.state) == (old.generation, State.CLAIMED)
            assert isinstance(
                ledger_of(store, "run-d").try_acquire(HASH, not_before=datetime.now(UTC)), Waiting
            )
            claim.before_sending()
            fail(claim)
        again = acquire(ledger_of(store, "run-e"), HASH)
        assert (again.generation, again.state) == (old.generation, State.GENERATED)
        assert [note.run_id for note in again.maybe_paid] == ["refresh-1"] * number
    with pytest.raises(UnknownOutcomeError):
        acquire(ledger_of(store, "refresh-1"), HASH, not_before=datetime.now(UTC))


def test_a_refresh_whose_holder_died_keeps_the_old_record(clock: Clock, folder_store: ImageStore) -> None:
    """The old record is a hit during and after the claim of a refresh that died."""
    store = folder_store
    old = pay(store, ledger_of(store))
    start = datetime.now(UTC)
    dead = claim_of(ledger_of(store, "run-b", ttl=60), not_before=start)
    clock.now += 3600
    assert acquire(ledger_of(store, "run-c"), HASH).generation == old.generation
    del dead
    new = pay(store, ledger_of(store, "run-d"), b"new", not_before=start)
    assert [note.run_id for note in new.maybe_paid] == ["run-b"]
