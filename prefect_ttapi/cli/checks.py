"""Reading a whole store, in an order in which nothing that others do meanwhile looks wrong.

First images are listed, then the ledger and the manifests are read: what these name was stored before, or is looked for
once more; what neither names is nobody's, or younger than all of them. Claims are looked at again in the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Final

from prefect_ttapi.cli.dead_claims import Claimed, dead_claims
from prefect_ttapi.cli.findings import SETTLED, Finding, Kind
from prefect_ttapi.cli.listed_images import Images
from prefect_ttapi.cli.manifests import check_manifest
from prefect_ttapi.cli.records import Read, address_of, names, read_document
from prefect_ttapi.cli.reporting import Step, Tell
from prefect_ttapi.cli.side_by_side import side_by_side
from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.documents import State
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import Listed, NoAnswerError
from prefect_ttapi.storage.store import ImageStore

#: What the steps are called.
LISTING: Final = "listing images"
LEDGER: Final = "reading the ledger"
MANIFESTS: Final = "reading manifests"
IMAGES: Final = "reading images"


def verify(store: ImageStore, *, quick: bool = False, tell: Tell = lambda _step: None) -> Iterator[Finding]:
    """What there is to say of a store, as it is found; nothing is written.

    Reading takes memory for the listing, some 200 bytes an image, whatever the images' size. Claims without a holder on
    this machine are watched for their time to live, a minute as a rule.

    Args:
        quick: look at lengths only, not at the images' bytes.
        tell: told of each step.

    Raises:
        StoreError: the store can't be reached or listed, or there is none.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     store = ImageStore(url=folder)
    ...     _ = store.write("images/" + 64 * "0" + ".png", b"other bytes", "image/png")
    ...     print(*(finding.kind for finding in verify(store)))
    orphan damaged
    """
    return _Check(store, tell).findings(quick)


class _Check:
    """One reading of one store."""

    def __init__(self, store: ImageStore, tell: Tell) -> None:
        self._store = store
        self._tell = tell
        self._started = time.time()
        self._images = Images()
        self._claims: list[Claimed] = []
        self._unsettled = False  # somebody may yet record images that are stored
        self._unread = False
        self._seen = 0
        self._rows = 0

    def findings(self, quick: bool) -> Iterator[Finding]:
        yield from self._list_images()
        for finding in chain(self._read_ledger(), self._read_manifests()):
            self._unread |= finding.kind in (Kind.SENSELESS, Kind.UNREADABLE)
            yield finding
        if not self._seen:
            raise StoreError(
                f"{self._store.identity} holds no images, no ledger, no manifests: is it a store?"
            )
        yield from self._orphans()
        yield from self._half_written()
        if not quick:
            yield from self._read_images()
        yield from dead_claims(self._store, self._claims, self._tell)

    def _list(self, prefix: str) -> Iterator[Listed]:
        for listed in self._store.list(prefix):
            self._seen += 1
            yield listed

    def _list_images(self) -> Iterator[Finding]:
        for listed in self._list(layout.IMAGES):
            if not self._images.add(listed):
                uri = address_of(self._store, listed.key)
                yield Finding(Kind.STRAY, uri, "it is not named like an image")
            self._tell(Step(LISTING, len(self._images)))

    def _read_ledger(self) -> Iterator[Finding]:
        documents = (listed for listed in self._list(layout.LEDGER) if listed.key != layout.PROBE)
        read = side_by_side(partial(read_document, self._store, self._images), documents)
        for number, document in enumerate(read, start=1):
            self._note(document)
            yield from document.findings
            self._tell(Step(LEDGER, number))

    def _note(self, document: Read) -> None:
        """Remember claims, and whose images these are."""
        for key in document.images:
            self._images.name(key, document.place)
        if document.seen is None or document.place is None:
            return
        claimed = document.seen.document
        self._unsettled |= claimed.state in (State.CLAIMED, State.UNKNOWN)
        if claimed.state is State.CLAIMED and claimed.holder:
            self._claims.append(
                Claimed(
                    document.key,
                    document.seen.tag,
                    claimed.token,
                    claimed.holder,
                    claimed.ttl,
                    since=leases.clock(),  # later than it was read: nobody is taken for dead too soon
                )
            )

    def _read_manifests(self) -> Iterator[Finding]:
        for listed in self._list(layout.BATCHES):
            if layout.is_manifest(listed.key):
                yield from check_manifest(self._store, self._images, listed, self._count_row)

    def _count_row(self) -> None:
        self._rows += 1
        self._tell(Step(MANIFESTS, self._rows))

    def _orphans(self) -> Iterator[Finding]:
        if self._unread:
            return  # what could not be read may name them
        for key in self._images.unnamed():
            modified = self._images.modified(key)
            if self._started - modified >= SETTLED or not self._unsettled:
                uri, size = self._store.uri(key), self._images.size(key)
                yield Finding(Kind.ORPHAN, uri, f"{size:,} bytes", images=(key,), modified=modified)

    def _half_written(self) -> Iterator[Finding]:
        for listed in self._store.objects.half_written():
            if self._started - listed.modified >= SETTLED:
                uri, what = address_of(self._store, listed.key), f"{listed.size:,} bytes"
                yield Finding(Kind.HALF_WRITTEN, uri, what, images=(listed.key,), modified=listed.modified)

    def _read_images(self) -> Iterator[Finding]:
        total, total_bytes = len(self._images), self._images.total_bytes
        done_bytes = 0
        read = side_by_side(partial(_wrong_bytes, self._store), self._images.keys())
        for number, (key, wrong) in enumerate(read, start=1):
            done_bytes += self._images.size(key) or 0
            self._tell(Step(IMAGES, number, total, done_bytes, total_bytes))
            if wrong is None:
                continue
            kind, reason = wrong
            owners = tuple(owner for owner in self._images.owners(key) if names(self._store, owner, key))
            # what nobody names may go, and goes in a repair
            if owners or kind is not Kind.MISSING:
                yield Finding(kind, self._store.uri(key), reason, images=(key,), records=owners)


def _wrong_bytes(store: ImageStore, key: str) -> tuple[str, tuple[Kind, str] | None]:
    """An image's key, and what is wrong with its bytes. NoAnswerError: the store gives no answer."""
    try:
        found = store.objects.digest(key)
    except NoAnswerError:
        raise
    except StoreError as error:
        return key, (Kind.UNREADABLE, str(error))
    if found is None:
        return key, (Kind.MISSING, "it was there when this began, and is gone")
    size, sha256 = found
    is_right = f"/{sha256}." in key
    return key, None if is_right else (Kind.DAMAGED, f"its {size:,} bytes have the SHA-256 {sha256}")
