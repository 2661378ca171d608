"""What follows a batch that lacks images: a failed run that names them. The event of the batch's end starts it."""

from __future__ import annotations

from itertools import islice

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.lineage.manifest import Rows

#: Rows that one message names.
SHOWN = 20


@flow(name="review", persist_result=False)
def review(manifest: str, store: str | None = None) -> State[None]:
    """Fail, with the reasons, where requests of a batch have no images.

    Args:
        manifest: its address, as the event `ttapi.batch.completed` tells it.
        store: `block:NAME` of the store it is in, where the usual settings can't read it.
    """
    place = store_at(store or manifest.rpartition("/batches/")[0])
    rows = Rows(lambda: place.open(manifest))
    missing = (row for row in rows if row.status in ("failed", "skipped"))
    reasons = [f"request {row.row}: {row.error_type}: {row.error}" for row in islice(missing, SHOWN)]
    if reasons:
        return Failed(message="\n".join([f"{len(rows)} requests, of which these lack images:", *reasons]))
    return Completed(message=f"All {len(rows)} requests have their images.")
