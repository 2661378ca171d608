"""What a batch would cost: a look into the ledger, and nothing sent."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect_ttapi.batch.intake import Intake
from prefect_ttapi.batch.items import Done
from prefect_ttapi.batch.known import Known
from prefect_ttapi.batch.shards import Plan
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.generation.ledgers import ledger_for
from prefect_ttapi.storage.store import ImageStore


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


def estimate_batch(
    intake: Intake, credentials: TTAPICredentials, store: ImageStore, name: str = "batch"
) -> Estimate:
    """Ask the ledger about each distinct request of a checked batch; nothing is sent to the API."""
    ledger = ledger_for(credentials, store, uuid.uuid4().hex)
    plan = Plan(batch_id="", run_id="", name=name, date=datetime.now(UTC), thumbnails=False)
    requests = paid = images = 0
    to_send: set[str] = set()
    for found in Known(store, ledger, plan, intake.hashes).sort_out(intake.items):
        requests += 1
        if isinstance(found, Done):
            paid += found.row.status == "cached"
        elif found.request.request_hash not in to_send:
            record = None if found.known_absent else ledger.look_up(found.request.request_hash)
            paid += record is not None
            if record is None:
                to_send.add(found.request.request_hash)
                images += found.request.n
    return Estimate(requests, paid, len(to_send), images)
