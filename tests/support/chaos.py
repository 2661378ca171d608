"""What the chaos tests share: what a store holds after a kill, and an account of who may have paid for what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from prefect_ttapi.ledger.documents import Document, Documents, Record, State, decode, record_of
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore

API = "sandbox"


def documents(store: ImageStore) -> Iterator[Document]:
    """All of the ledger's documents, each found to make sense."""
    prefix = Documents(store, API).prefix
    for listed in store.list(prefix):
        request_hash = listed.key.removeprefix(prefix).removesuffix(".json")
        found = store.read_document(listed.key)
        assert found is not None
        yield decode(found[0], request_hash, API)


class Account:
    """Which runs were killed: only for what they may have sent may anybody pay again."""

    def __init__(self, store: ImageStore, sandbox: Sandbox) -> None:
        self._store = store
        self._sandbox = sandbox
        self._killed: list[str] = []
        self.in_flight = 0  # at the kills, at most

    def killed(self, run: str, in_flight: int) -> None:
        """A run, whose id begins like this, was killed while it had so many requests in flight."""
        self._killed.append(run)
        self.in_flight += in_flight

    def check(self, requests: int) -> None:
        """Once all is done: a full read of the store, held against the server's counters."""
        paid = self._sandbox.paid_by_request
        assert len(paid) == requests
        assert sum(paid.values()) <= requests + self.in_flight
        found = {document.request_hash: document for document in documents(self._store)}
        assert set(found) == set(paid)
        for request_hash, document in found.items():
            assert document.state is State.GENERATED, "nobody holds a claim any more"
            record = record_of(document, self._store)
            assert record is not None
            self._check_images(record)
            assert record.also_paid == ()
            dead = [note for note in record.maybe_paid if "its holder died" in note.what]
            alive = [note for note in dead if not note.run_id.startswith(tuple(self._killed))]
            assert not alive, f"these were not killed: {alive}"
            assert paid[request_hash] <= 1 + len(dead), "a duplicate call's earlier payer was killed"

    def _check_images(self, record: Record) -> None:
        assert len(record.generation.images) == record.generation.request.n
        for image in record.generation.images:
            data = self._store.read_bytes(image.uri)
            assert len(data) == image.size_bytes
            assert hashlib.sha256(data).hexdigest() == image.sha256
