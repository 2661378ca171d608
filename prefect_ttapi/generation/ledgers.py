"""The ledger as a run's credentials and store want it."""

from __future__ import annotations

import logging
from typing import Any

from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)


def ledger_for(
    credentials: TTAPICredentials,
    store: ImageStore,
    run_id: str,
    log: logging.Logger | logging.LoggerAdapter[Any] = logger,
) -> Ledger:
    """What is known of the API's answers in the store, to a run: see `Ledger`."""
    return Ledger(
        store,
        credentials.api_origin,
        run_id,
        ttl=store.claim_ttl,
        on_dead_claim=credentials.on_dead_claim,
        retry_unknown_outcome=credentials.retry_unknown_outcome,
        log=log,
    )
