"""Finding a store's records and manifest rows by what they say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from prefect_ttapi.cli.chain import Entry, SourceRow
from prefect_ttapi.cli.reporting import Step, Tell
from prefect_ttapi.cli.side_by_side import side_by_side
from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger.shelf import Seen, Shelf, shelf_of
from prefect_ttapi.lineage.manifest import read_manifest
from prefect_ttapi.origins import DEFAULT_BASE_URL, SANDBOX_ORIGIN
from prefect_ttapi.storage.layout import BATCHES, LEDGER, document_in, is_manifest, run_folder
from prefect_ttapi.storage.objects import NoAnswerError
from prefect_ttapi.storage.store import ImageStore


def entries_of(store: ImageStore, request_hash: str, origin: str | None, tell: Tell) -> list[Entry]:
    """What the ledger says of a request: under one API's origin, or else under each.

    Raises:
        StoreError: the store can't be read, or its document makes no sense.
    """
    for origins in ((origin,), (DEFAULT_BASE_URL, SANDBOX_ORIGIN)):
        found = [entry for known in origins if known for entry in _entry_of(store, request_hash, known)]
        if found:
            return found
    name = f"/{request_hash}.json"
    return [entry for key in _keys(store, tell) if key.endswith(name) for entry in _entries_at(store, key)]


def _entry_of(store: ImageStore, request_hash: str, origin: str) -> Iterator[Entry]:
    try:
        shelf = Shelf(store, origin)
    except ValueError:  # a copy's metadata may say anything
        return
    seen = shelf.read(request_hash)
    if seen is not None:
        yield _entry(shelf, seen)


def entries_that_say(store: ImageStore, text: str, tell: Tell) -> Iterator[Entry]:
    """Those of all the ledger's documents that hold `text`."""
    wanted = text.encode()

    def holds(key: str) -> str | None:
        found = store.read_document(key)
        return key if found and wanted in found[0] else None

    for number, key in enumerate(side_by_side(holds, _keys(store, tell)), start=1):
        tell(Step("searching the ledger", number))
        if key is not None:
            yield from _entries_at(store, key)


def manifests_of(store: ImageStore, run_id: str | None) -> list[str]:
    """Keys of a run's manifests, or of all."""
    prefix = run_folder(run_id) if run_id else BATCHES
    return sorted(found.key for found in store.list(prefix) if is_manifest(found.key))


def rows_that_say(store: ImageStore, manifests: Iterable[str], text: str, tell: Tell) -> Iterator[SourceRow]:
    """The manifests' rows that hold `text`; all where it is empty. Lines that are no rows are left out."""
    wanted, number = text.encode(), 0
    for key in manifests:
        uri = store.uri(key)
        with store.open(uri) as lines:
            for line in lines:
                number += 1
                tell(Step("searching manifests", number))
                if wanted in line:
                    with suppress(ValueError):
                        yield from (SourceRow(manifest_uri=uri, row=row) for row in read_manifest([line]))


def _keys(store: ImageStore, tell: Tell) -> Iterator[str]:
    for number, found in enumerate(store.list(LEDGER), start=1):
        tell(Step("listing the ledger", number))
        if document_in(found.key):
            yield found.key


def _entries_at(store: ImageStore, key: str) -> Iterator[Entry]:
    """The document of this key, unless it makes no sense: that is for `verify` to tell."""
    try:
        shelf, request_hash = shelf_of(store, key)
        seen = shelf.read(request_hash)
        if seen is not None:
            yield _entry(shelf, seen)
    except NoAnswerError:
        raise
    except (StoreError, ValueError):
        return


def _entry(shelf: Shelf, seen: Seen) -> Entry:
    record = shelf.record(seen.document)
    return Entry(
        uri=shelf.store.uri(shelf.key(seen.document.request_hash)),
        state=seen.document.state,
        run_id=record.run_id if record else None,
        generation=record.generation if record else None,
        maybe_paid=seen.document.maybe_paid,
        also_paid=seen.document.also_paid,
    )
