"""What did this make? From a run to its rows, their images and the copies that were delivered."""

from __future__ import annotations

from collections.abc import Iterator

from prefect_ttapi.cli.chain import Made, SourceRow
from prefect_ttapi.cli.reporting import Tell
from prefect_ttapi.cli.searching import entries_that_say, manifests_of, rows_that_say
from prefect_ttapi.errors import StoreError
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.storage.layout import is_run_id
from prefect_ttapi.storage.store import ImageStore


def trace_run(run_id: str, store: ImageStore, *, tell: Tell = lambda _step: None) -> Made:
    """What a flow run made: the rows of its batches' manifests; without a batch, what the ledger says it paid for.

    Raises:
        StoreError: the store knows nothing of the run, or can't be read.
        ValueError: that is no run's id.
    """
    if not is_run_id(run_id):
        raise ValueError(f"{run_id[:80]!a} is no run's id")
    manifests = manifests_of(store, run_id)
    if manifests:
        rows = rows_that_say(store, manifests, "", tell)
        return Made(run_id, tuple(map(store.uri, manifests)), rows)
    paid = tuple(_paid_by(store, run_id, tell))
    if not paid:
        raise StoreError(f"{store.identity} knows nothing of the run {run_id}: no manifest, no record")
    return Made(run_id, (), paid)


def _paid_by(store: ImageStore, run_id: str, tell: Tell) -> Iterator[SourceRow]:
    for number, entry in enumerate(entries_that_say(store, run_id, tell)):
        made = entry.generation
        if made and run_id in (entry.run_id, made.flow_run_id):
            yield SourceRow(manifest_uri=entry.uri, row=Row.of(number, made))
