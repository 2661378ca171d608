"""Processes that pay for all of some requests, whatever else goes on; kept apart, so that they start at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.errors import UnknownOutcomeError
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of

#: Requests that each has in flight.
THREADS = 2


def pay_for_all(settings: dict, base_url: str, requests: int, seed: int) -> None:
    """Each request, in an order of one's own; a new run asks again where the outcome is unknown."""
    store = ImageStore(**settings)
    order = [ImageRequest(prompt=f"ship {number}", model="gpt-image-1") for number in range(requests)]
    random.Random(seed).shuffle(order)  # noqa: S311 - chance, not secrecy
    with TTAPIClient("sandbox-key", base_url) as client, ThreadPoolExecutor(THREADS) as threads:

        def pay(request: ImageRequest) -> None:
            for attempt in range(9):
                ledger = Ledger(store, client.api_origin, f"run-{seed}-{attempt}")
                try:
                    engine_of(store, client, ledger).generate(request)
                except UnknownOutcomeError:
                    continue
                return
            raise AssertionError(f"no answer: {request.prompt}")

        list(threads.map(pay, order))
