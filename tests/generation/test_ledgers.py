"""The ledger that tasks and batches use has the settings of credentials and store."""

from __future__ import annotations

import gc

import pytest

from prefect_ttapi.errors import UnknownOutcomeError
from prefect_ttapi.generation.engine import ledger_for
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from tests.support.engines import engine_of
from tests.support.ledgers import acquire


def test_a_wary_user_decides_about_dead_claims(store, credentials, sandbox: Sandbox):
    """With `on_dead_claim="unknown"` a request whose sender died is not sent by its finder, only by the next run."""
    request = ImageRequest(prompt="a ruin", model="gpt-image-1")
    acquire(ledger_for(credentials, store, "dead"), request.request_hash)
    gc.collect()  # nobody holds the claim any longer
    wary = credentials.model_copy(update={"on_dead_claim": "unknown"})
    with wary.get_client() as client:
        with pytest.raises(UnknownOutcomeError, match="its holder died"):
            engine_of(store, client, ledger_for(wary, store, "finder")).generate(request)
        assert sandbox.calls == 0
        paid = engine_of(store, client, ledger_for(wary, store, "next")).generate(request)
    assert (paid.sent, sandbox.calls, len(paid.record.maybe_paid)) == (True, 1, 1)


def test_a_claim_lives_as_long_as_its_store_says(store, credentials):
    """`claim_ttl` is written into each claim, where every waiter reads it."""
    brief = store.model_copy(update={"claim_ttl": 7.5})
    claim = acquire(ledger_for(credentials, brief, "run"), "ab" * 32)
    document = store.read(ledger_for(credentials, store, "reader").documents.key("ab" * 32))
    assert b'"ttl":7.5' in document
    claim.release()
