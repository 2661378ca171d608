"""What follows a batch that lacks images: a failed run that names them. The event of the batch's end starts it."""

import json
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from prefect_ttapi import ImageStore

#: Rows that one message names.
SHOWN = 20


@flow(name="review", persist_result=False)
def review(manifest: str, store: ImageStore | None = None) -> State[None]:
    """Fail, with the reasons, where requests of a batch have no images.

    Args:
        manifest: its address, as the event `ttapi.batch.completed` tells it.
        store: the block of the store that it is in, where the usual settings can't read it.
    """
    store = store or ImageStore(url=manifest.rpartition("/batches/")[0])
    with store.open(manifest) as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    missing = [row for row in rows if row["status"] in ("failed", "skipped")]
    reasons = [f"request {row['row']}: {row['error_type']}: {row['error']}" for row in missing[:SHOWN]]
    if reasons:
        return Failed(message="\n".join([f"{len(rows)} requests, of which these lack images:", *reasons]))
    return Completed(message=f"All {len(rows)} requests have their images.")
