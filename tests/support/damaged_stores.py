"""Stores for the tests of verify, with one thing wrong at a time or all of it."""

from __future__ import annotations

import os
import time

from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import Generation
from prefect_ttapi.storage.layout import answer_key
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import API, fresh_image, generation_of, request_of
from tests.support.ledgers import acquire, recorded, unreadable
from tests.support.rows import manifest_of


def claimed(store: ImageStore, prompt: str, ttl: float = 60.0) -> Claim:
    claim = acquire(Ledger(store, API, f"run of {prompt}", ttl=ttl), request_of(prompt).request_hash)
    assert isinstance(claim, Claim)
    return claim


def paid(store: ImageStore, prompt: str, *more: str) -> Generation:
    """A request that was paid for; its images' bytes are the prompt and what is more."""
    request = request_of(prompt)
    with claimed(store, prompt) as claim:
        claim.before_sending()
        said = {"request-hash": request.request_hash}
        images = [store.put_image(fresh_image(data.encode()), said) for data in (prompt, *more)]
        return recorded(claim, generation_of(request, *images)).generation


def image_key(generation: Generation, index: int = 0) -> str:
    image = generation.images[index]
    return f"images/{image.sha256}.png"


def record_key(prompt: str) -> str:
    return f"ledger/api.ttapi.io/{request_of(prompt).request_hash}.json"


def unknown(store: ImageStore, prompt: str) -> None:
    with claimed(store, prompt) as claim:
        claim.before_sending()
        claim.mark_unknown("read timeout")


def kept(store: ImageStore, prompt: str, body: bytes = b"<html>") -> str:
    """An answer that nobody can read; the key of its body."""
    request = request_of(prompt)
    with claimed(store, prompt) as claim:
        claim.before_sending()
        key = answer_key("api.ttapi.io", request.request_hash, claim.token)
        store.write(key, body, "application/octet-stream")
        assert claim.keep(unreadable(claim, request, body))
    return key


def manifest(store: ImageStore, *generations: Generation) -> str:
    rows = [Row.of(number, generation) for number, generation in enumerate(generations)]
    key = "batches/run-1/manifest.jsonl"
    store.write(key, manifest_of(rows), "application/x-ndjson")
    return key


def age(store: ImageStore, key: str, seconds: float = 7200.0) -> None:
    """Make a folder's file look older."""
    when = time.time() - seconds
    os.utime(os.path.join(store.url, key), (when, when))  # noqa: PTH118
