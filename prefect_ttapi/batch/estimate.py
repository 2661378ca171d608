"""What a batch would cost: a look into the ledger, and nothing sent."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prefect_ttapi.batch.intake import Intake
from prefect_ttapi.batch.shards import Item
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.storage.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore

#: Look-ups side by side.
LOOK_UPS = 16


@dataclass(frozen=True)
class Estimate:
    """What a batch would do: requests in all, those already paid for, those to send, and their images."""

    requests: int
    paid: int
    to_send: int
    images: int

    def __str__(self) -> str:
        return (
            f"{self.requests} requests: {self.paid} already paid for, {self.requests - self.paid - self.to_send} "
            f"duplicates, {self.to_send} to send for {self.images} images"
        )


def estimate_batch(intake: Intake, credentials: TTAPICredentials, store: ImageStore) -> Estimate:
    """Ask the ledger about each distinct request of a checked batch; nothing is sent to the API."""
    requests = [item.request for item in intake.items if isinstance(item, Item)]
    distinct = list({request.request_hash: request for request in requests}.values())
    ledger = Ledger(store, credentials.api_origin, run_id=uuid.uuid4().hex)
    with ThreadPoolExecutor(LOOK_UPS) as threads:
        found = list(threads.map(lambda request: ledger.look_up(request.request_hash), distinct))
    unpaid = [request for request, record in zip(distinct, found, strict=True) if record is None]
    unpaid_hashes = {request.request_hash for request in unpaid}
    paid = sum(request.request_hash not in unpaid_hashes for request in requests)
    return Estimate(len(requests), paid, len(unpaid), sum(request.n for request in unpaid))
