"""A process that is stopped for longer than its claim stands, in the middle of a generation."""

from __future__ import annotations

import os
import signal
from multiprocessing.queues import Queue

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.clocks import until
from tests.support.engines import engine_of
from tests.support.processes import context, start

pytestmark = pytest.mark.integration

SHORT = ImageRequest(prompt="[[sandbox:latency=2]] a siesta", model="gpt-image-1")
LONG = ImageRequest(prompt="[[sandbox:latency=6]] a long night", model="gpt-image-1")


def pay(request: ImageRequest, ttl: float, store: ImageStore, base_url: str, run: str) -> dict:
    with TTAPIClient("sandbox-key", base_url) as client:
        paid = engine_of(store, client, Ledger(store, client.api_origin, run, ttl=ttl)).generate(request)
    return paid.generation.model_dump(mode="json")


def pay_elsewhere(
    request: ImageRequest, ttl: float, settings: dict, base_url: str, run: str, results: Queue
) -> None:
    results.put(pay(request, ttl, ImageStore(**settings), base_url, run))


@pytest.mark.parametrize("resumed", ["before the other's answer", "after the other's answer"])
def test_paused_for_longer_than_its_claim_stands(store: ImageStore, sandbox: Sandbox, resumed: str):
    """At most one more call; both have the same answer, and both payments are on its record."""
    settings = store.model_dump(mode="json")
    results = context.Queue()
    paused = start(pay_elsewhere, SHORT, 1.0, settings, sandbox.base_url, "paused", results)
    until(lambda: sandbox.calls >= 1)
    os.kill(paused.pid, signal.SIGSTOP)
    try:
        other = start(pay_elsewhere, SHORT, 1.0, settings, sandbox.base_url, "other", results)
        until(lambda: sandbox.calls >= 2)
        first = [results.get(timeout=60)] if resumed.startswith("after") else []
    finally:
        os.kill(paused.pid, signal.SIGCONT)
    answers = [*first, *(results.get(timeout=60) for _ in range(2 - len(first)))]
    paused.join(60)
    other.join(60)
    assert answers[0] == answers[1]
    assert sandbox.calls == 2
    record = Ledger(store, "sandbox", "reader").look_up(SHORT.request_hash)
    assert record is not None
    assert record.generation.model_dump(mode="json") == answers[0]
    named = [record.run_id, *(note.run_id for note in (*record.maybe_paid, *record.also_paid))]
    assert sorted(named) == ["other", "paused"]
    assert not first or record.run_id == "other"


def test_a_generation_that_outlasts_its_claim_many_times_is_one_call(store: ImageStore, sandbox: Sandbox):
    """A holder that is only slow renews its claim: whoever else asks waits for its record."""
    results = context.Queue()
    slow = start(pay_elsewhere, LONG, 2.0, store.model_dump(mode="json"), sandbox.base_url, "slow", results)
    until(lambda: sandbox.calls >= 1)
    assert pay(LONG, 2.0, store, sandbox.base_url, "other") == results.get(timeout=60)
    slow.join(60)
    assert sandbox.calls == 1
