"""Finding a store's records and manifest rows: by a request's hash, or by a text in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from prefect_ttapi.cli.chain import Entry, SourceRow
from prefect_ttapi.cli.reporting import Progress, side_by_side
from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger.shelf import Seen, Shelf, shelf_of
from prefect_ttapi.lineage.manifest import read_manifest
from prefect_ttapi.origins import DEFAULT_BASE_URL, SANDBOX_ORIGIN
from prefect_ttapi.storage.layout import BATCHES, LEDGER, document_in, is_manifest, run_folder
from prefect_ttapi.storage.objects import NoAnswerError
from prefect_ttapi.storage.store import ImageStore


class Search:
    """A search through one store.

    Args:
        progress: told of each step.
    """

    def __init__(self, store: ImageStore, progress: Progress) -> None:
        self.store = store
        self._progress = progress

    def entries_of(self, request_hash: str, origin: str | None) -> list[Entry]:
        """Return the ledger's entries of a request: under this API's origin, or else under each.

        Raises:
            StoreError: the store can't be read, or its document makes no sense.
        """
        for origins in ((origin,), (DEFAULT_BASE_URL, SANDBOX_ORIGIN)):
            found = [entry for known in origins if known for entry in self._entry_of(request_hash, known)]
            if found:
                return found
        name = f"/{request_hash}.json"
        return [entry for key in self._keys() if key.endswith(name) for entry in self._entries_at(key)]

    def entries_that_say(self, text: str) -> Iterator[Entry]:
        """Return the documents of the ledger that hold `text`."""
        wanted = text.encode()

        def holds(key: str) -> str | None:
            found = self.store.read_document(key)
            return key if found and wanted in found[0] else None

        for key in self._progress.count("searching the ledger", side_by_side(holds, self._keys())):
            if key is not None:
                yield from self._entries_at(key)

    def manifests_of(self, run_id: str | None) -> list[str]:
        """Return the keys of a run's manifests, or of all."""
        prefix = run_folder(run_id) if run_id else BATCHES
        return sorted(found.key for found in self.store.list(prefix) if is_manifest(found.key))

    def rows_that_say(self, manifests: Iterable[str], text: str) -> Iterator[SourceRow]:
        """Return the manifests' rows that hold `text`; all where it is empty. Other lines are left out."""
        wanted = text.encode()
        for uri in map(self.store.uri, manifests):
            with self.store.open(uri) as lines:
                for line in self._progress.count("searching manifests", lines):
                    if wanted in line:
                        with suppress(ValueError):
                            yield from (SourceRow(manifest_uri=uri, row=row) for row in read_manifest([line]))

    def _keys(self) -> Iterator[str]:
        for found in self._progress.count("listing the ledger", self.store.list(LEDGER)):
            if document_in(found.key):
                yield found.key

    def _entry_of(self, request_hash: str, origin: str) -> Iterator[Entry]:
        try:
            shelf = Shelf(self.store, origin)
        except ValueError:  # a copy's metadata may say anything
            return
        if seen := shelf.read(request_hash):
            yield _entry(shelf, seen)

    def _entries_at(self, key: str) -> Iterator[Entry]:
        """Return the document of this key, unless it makes no sense: that is for `verify` to tell."""
        try:
            shelf, request_hash = shelf_of(self.store, key)
            if seen := shelf.read(request_hash):
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
