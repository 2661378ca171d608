"""Reading and replacing the ledger's documents, whatever becomes of the store's answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger.documents import Document, Record, decode, encode, record_of
from prefect_ttapi.storage.layout import (
    document_in,
    is_sha256,
    ledger_folder,
    ledger_key,
    origin_of_slug,
    slug_of,
)
from prefect_ttapi.storage.objects import ConflictError, NoAnswerError
from prefect_ttapi.storage.store import ImageStore

#: Seconds between attempts to settle a write whose answer was lost.
_PAUSES: Final = (0.0, 0.05, 0.2, 0.8, 2.0)


@dataclass(frozen=True)
class Seen:
    """A document, the tag it had when it was read or written, and its length in bytes."""

    document: Document
    tag: str
    size: int


@dataclass(frozen=True)
class Swap:
    """What became of a write: `seen` is the own document if it was `won`, else what stands instead."""

    won: bool
    seen: Seen | None


class Shelf:
    """The documents of one API origin in a store, at `ledger/<origin>/<request hash>.json`."""

    def __init__(self, store: ImageStore, api_origin: str) -> None:
        self.store = store
        self.api_origin = api_origin
        self.prefix = ledger_folder(api_origin)

    def key(self, request_hash: str) -> str:
        """Where the request's document is. StoreError: that is no request hash."""
        if not is_sha256(request_hash):
            raise StoreError(f"{request_hash[:80]!a} is no request hash: it must be 64 hexadecimal digits")
        return ledger_key(slug_of(self.api_origin), request_hash)

    def read(self, request_hash: str) -> Seen | None:
        """The document as it stands. StoreError: the store fails, or holds something that makes no sense."""
        key = self.key(request_hash)
        found = self.store.read_document(key)
        if found is None:
            return None
        data, tag = found
        try:
            return Seen(decode(data, request_hash, self.api_origin), tag, len(data))
        except ValueError as error:
            raise self._senseless(key, error) from None

    def record(self, document: Document) -> Record | None:
        """What the document says of stored images, if anything. StoreError: it makes no sense."""
        try:
            return record_of(document, self.store)
        except ValueError as error:
            raise self._senseless(self.key(document.request_hash), error) from None

    def record_as_seen(self, seen: Seen) -> Record | None:
        """`record`, with the tag and length by which a listing shows that it still stands."""
        record = self.record(seen.document)
        return record and record.model_copy(update={"tag": seen.tag, "size": seen.size})

    def swap(self, document: Document, tag: str | None) -> Swap:
        """Put `document` in the place of the one with `tag`, or (None) of none.

        A lost answer is settled by reading back: the own token and sequence mean won, an unchanged tag means
        that it is to be sent again, anything else means lost.

        Raises:
            NoAnswerError: the store stays silent; it may hold the document or not.
            StoreError: the store refuses.
        """
        key, data = self.key(document.request_hash), encode(document)
        trouble = ""
        for pause in _PAUSES:
            if pause:  # sleeping for 0 s gives the processor away: 3 ms where others want it
                time.sleep(pause)
            try:
                return Swap(True, Seen(document, self.store.compare_and_swap(key, data, tag), len(data)))
            except (ConflictError, NoAnswerError) as error:
                trouble = str(error)  # the error itself would keep its caller's claim alive
            found = self.read(document.request_hash)
            if found is None:
                if tag is not None:
                    return Swap(False, None)
            elif _write_of(found.document) == _write_of(document):
                return Swap(True, found)
            elif found.tag != tag:
                return Swap(False, found)
        raise NoAnswerError(f"{self.store.uri(key)}: can't be written ({trouble})")

    def _senseless(self, key: str, error: ValueError) -> StoreError:
        return StoreError(
            f"{self.store.uri(key)} {error}; nothing is sent while it stands: look, and delete it to pay anew"
        )


def _write_of(document: Document) -> tuple[str, int]:
    return document.token, document.sequence


def shelf_of(store: ImageStore, key: str) -> tuple[Shelf, str]:
    """Where a ledger document's key is read and written, and its request hash. ValueError: it is no such key."""
    folder, request_hash = document_in(key) or ("", "")
    return Shelf(store, origin_of_slug(folder)), request_hash
