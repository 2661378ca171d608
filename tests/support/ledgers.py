"""What the tests of the ledger share: a request, its ledgers, and a clock that the test moves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest

from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import Kept, Record, facts_of_generation
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Generation
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import API, generation_of, request_of, sha256, stored

REQUEST = request_of()
HASH = REQUEST.request_hash


class Clock:
    """The clock of all leases of the process, whose seconds pass when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(leases, "clock", lambda: self.now)

    @contextmanager
    def ahead(self, seconds: float) -> Iterator[None]:
        """What is done meanwhile is done on a machine whose clock is so many seconds ahead."""
        self.now += seconds
        try:
            yield
        finally:
            self.now -= seconds


def ledger_of(store: ImageStore, run_id: str = "run-a", **options: object) -> Ledger:
    return Ledger(store, API, run_id, **options)


def answer(store: ImageStore, data: bytes = b"pixels", created_at: datetime | None = None) -> Generation:
    return generation_of(REQUEST, stored(store, data), created_at=created_at)


def acquire(
    ledger: Ledger, request_hash: str = HASH, not_before: datetime | None = None, **options: bool
) -> Record | Claim:
    """Ask for the request's images, or the right to send it, and wait while somebody else has that right."""
    found = ledger.try_acquire(request_hash, not_before, **options)
    while isinstance(found, Waiting):
        time.sleep(found.pause)
        found = ledger.try_acquire(request_hash, not_before, found)
    return found


def recorded(claim: Claim, generation: Generation, result_key: str | None = None) -> Record:
    """Record a claim's own answer, whose images are stored."""
    return claim.record_answer(claim.answer(generation, result_key))


def unreadable(
    claim: Claim,
    request: ImageRequest = REQUEST,
    body: bytes = b"<html>",
    *,
    whole: bool = True,
    when: datetime | None = None,
) -> Kept:
    """What is noted of an answer to a claimed request that nobody can read."""
    made = generation_of(request, created_at=when)
    return Kept(
        token=claim.token,
        run_id=claim.run_id,
        generation=facts_of_generation(made),
        when=made.created_at,
        why="the body is not JSON",
        whole=whole,
        media_type="text/html",
        size_bytes=len(body),
        sha256=sha256(body),
    )


def claim_of(ledger: Ledger, **options: object) -> Claim:
    claim = acquire(ledger, HASH, **options)
    assert isinstance(claim, Claim)
    return claim


def pay(store: ImageStore, ledger: Ledger, data: bytes = b"pixels", **options: object) -> Record:
    """Claim, send, record."""
    with claim_of(ledger, **options) as claim:
        claim.before_sending()
        return recorded(claim, answer(store, data))


def document(store: ImageStore) -> dict:
    return json.loads(store.read(Ledger(store, API, "reader").documents.key(HASH)))


def rewrite(store: ImageStore, **changes: object) -> None:
    store.write(
        Ledger(store, API, "x").documents.key(HASH),
        json.dumps(document(store) | changes).encode(),
        "application/json",
    )
