"""Reading a whole store, in an order in which nothing that others do meanwhile looks wrong.

First images are listed, then the ledger and the manifests are read: an image that these name was stored before, or is
looked for once more. One that neither names is an orphan, or younger than all of them. Claims are looked at again in
the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Final

from prefect_ttapi.cli.findings import SETTLED, Finding, Kind
from prefect_ttapi.cli.inventory import Inventory
from prefect_ttapi.cli.reporting import Progress, side_by_side
from prefect_ttapi.errors import StoreError
from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.documents import Document, Record, State, decode, record_of
from prefect_ttapi.ledger.shelf import Seen, shelf_of
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import Listed, NoAnswerError
from prefect_ttapi.storage.store import ImageStore

#: The kinds of work whose counts are totals.
LISTING: Final = "listing images"
LEDGER: Final = "reading the ledger"
MANIFESTS: Final = "reading manifests"
IMAGES: Final = "reading images"

#: Rows that a finding quotes.
_EXAMPLES: Final = 5

#: Seconds between looks at a claim: a holder renews it four times in its life, which is a minute.
_PAUSE: Final = 5.0


def verify(store: ImageStore, *, quick: bool = False, progress: Progress | None = None) -> Iterator[Finding]:
    """Return what there is to say of a store, as it is found; nothing is written to it.

    What is read is noted in a temporary file, some 200 bytes an image. Claims without a holder on this machine are
    watched for their time to live, a minute as a rule.

    Args:
        quick: compare lengths only, without reading the images.
        progress: told of each step.

    Raises:
        StoreError: the store can't be reached or listed, or there is none.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     store = ImageStore(url=folder)
    ...     _ = store.write("images/" + 64 * "0" + ".png", b"other bytes", "image/png")
    ...     print(*(finding.kind for finding in verify(store)))
    orphan damaged
    """
    return _Check(store, progress or Progress()).findings(quick)


@dataclass(frozen=True)
class _Claim:
    """A claim as it was seen: its document's key, and when, on `leases.clock`."""

    key: str
    seen: Seen
    since: float


class _Check:
    """One reading of one store."""

    def __init__(self, store: ImageStore, progress: Progress) -> None:
        self._store = store
        self._progress = progress
        self._started = time.time()
        self._inventory = Inventory()
        self._claims: list[_Claim] = []
        self._unsettled = False  # somebody may yet record images that are stored
        self._empty = True

    def findings(self, quick: bool) -> Iterator[Finding]:
        yield from self._list_images()
        unread = False
        for finding in chain(self._read_ledger(), self._read_manifests(), self._look_again()):
            unread |= finding.kind in (Kind.SENSELESS, Kind.UNREADABLE)
            yield finding
        if self._empty:
            raise StoreError(
                f"{self._store.identity} holds no images, no ledger, no manifests: is it a store?"
            )
        yield from self._broken()
        if not unread:  # what could not be read may name them
            yield from self._orphans()
        yield from self._half_written()
        if not quick:
            yield from self._read_images()
        yield from self._dead_claims()

    def _list(self, prefix: str) -> Iterator[Listed]:
        for listed in self._store.list(prefix):
            self._empty = False
            yield listed

    def _list_images(self) -> Iterator[Finding]:
        for listed in self._list(layout.IMAGES):
            sha256_and_extension = layout.image_in(listed.key)
            if sha256_and_extension and sha256_and_extension[1] in EXTENSIONS.values():
                self._inventory.add(listed)
                self._progress.tell(LISTING, self._progress.done.get(LISTING, 0) + 1)
            else:
                yield _finding(self._store, Kind.STRAY, listed.key, "it is not named like an image")

    def _read_ledger(self) -> Iterator[Finding]:
        documents = (listed.key for listed in self._list(layout.LEDGER) if listed.key != layout.PROBE)
        read = side_by_side(partial(_read_document, self._store), documents)
        for key, found in self._progress.count(LEDGER, read):
            if isinstance(found, Finding):
                yield found
            elif found:
                yield from self._note(key, *found)

    def _note(self, key: str, seen: Seen, record: Record | None) -> Iterator[Finding]:
        for image in record.generation.images if record else ():
            self._inventory.name_by_record(key, self._store.objects.key(image.uri), image.size_bytes)
        state = seen.document.state
        self._unsettled |= state in (State.CLAIMED, State.UNKNOWN)
        if state is State.CLAIMED:
            # later than it was read: nobody is taken for dead too soon
            self._claims.append(_Claim(key, seen, leases.clock()))
        if state is State.UNKNOWN:
            yield _finding(self._store, Kind.UNKNOWN_OUTCOME, key, _what_is_known(seen.document), key)

    def _read_manifests(self) -> Iterator[Finding]:
        for listed in self._list(layout.BATCHES):
            if not layout.is_manifest(listed.key):
                continue
            senseless, first, uri = 0, list[int](), address_of(self._store, listed.key)
            try:
                with self._store.objects.fetch(listed.key)() as lines:
                    for number, line in enumerate(self._progress.count(MANIFESTS, lines)):
                        try:
                            keys = [key for row in read_manifest([line]) for key in _images_of(row)]
                        except ValueError:
                            senseless, first = senseless + 1, [*first, number + 1][:_EXAMPLES]
                            continue
                        for key in keys:
                            self._inventory.name_by_row(uri, number, key)
            except NoAnswerError:
                raise
            except StoreError as error:
                yield Finding(Kind.UNREADABLE, uri, str(error))
            if senseless:
                what = f"{senseless:,} lines are no rows: line {_some(first, senseless)}"
                yield Finding(Kind.SENSELESS, uri, what)

    def _look_again(self) -> Iterator[Finding]:
        """Look for images that were written, or written anew, since the listing."""
        for key, found in side_by_side(partial(_size, self._store), self._inventory.suspects()):
            if isinstance(found, Finding):
                self._inventory.forget_names(key)
                yield found
            else:
                self._inventory.correct(key, found)

    def _broken(self) -> Iterator[Finding]:
        for record, images in self._inventory.broken():
            reasons = [
                f"{key} is gone" if size is None else f"{key} has {size:,} bytes, not {recorded:,}"
                for key, recorded, size in images
            ]
            kind = Kind.MISSING if any(size is None for _, _, size in images) else Kind.WRONG_SIZE
            keys = tuple(key for key, _, _ in images)
            yield _finding(self._store, kind, record, "; ".join(reasons), record, images=keys)
        for uri, rows in self._inventory.past():
            first = [*islice(rows, _EXAMPLES)]
            count = len(first) + sum(1 for _ in rows)
            yield Finding(Kind.PAST, uri, f"images of {count:,} rows are gone: row {_some(first, count)}")

    def _orphans(self) -> Iterator[Finding]:
        for key, size, modified in self._inventory.unnamed():
            if self._started - modified >= SETTLED or not self._unsettled:
                yield Finding(
                    Kind.ORPHAN, self._store.uri(key), f"{size:,} bytes", images=(key,), modified=modified
                )

    def _half_written(self) -> Iterator[Finding]:
        for listed in self._store.objects.half_written():
            if self._started - listed.modified >= SETTLED:
                uri, what = address_of(self._store, listed.key), f"{listed.size:,} bytes"
                yield Finding(Kind.HALF_WRITTEN, uri, what, images=(listed.key,), modified=listed.modified)

    def _read_images(self) -> Iterator[Finding]:
        total, total_bytes = self._inventory.totals()
        done_bytes = 0
        read = side_by_side(partial(_read_image, self._store), self._inventory.owned())
        for number, (key, size, owners, wrong) in enumerate(read, start=1):
            done_bytes += size
            self._progress.tell(IMAGES, number, total, done_bytes, total_bytes)
            if wrong is None:
                continue
            kind, reason = wrong
            owners = [owner for owner in owners if names(self._store, owner, key)]
            # an image that nobody names may go, and goes in a repair
            if owners or kind is not Kind.MISSING:
                yield _finding(self._store, kind, key, reason, *owners, images=(key,))

    def _dead_claims(self) -> Iterator[Finding]:
        """Return the claims whose holder is gone, or let the claim's life pass unchanged while this process watched."""
        standing = self._claims
        while standing:
            looked = side_by_side(partial(_look_at_claim, self._store), standing)
            standing = []
            for claim, why, stands in looked:
                holder = claim.seen.document.holder
                if why and holder:
                    held = f"held by run {holder.run_id} on {holder.host}: {why}"
                    yield _finding(
                        self._store, Kind.DEAD_CLAIM, claim.key, held, claim.key, tag=claim.seen.tag
                    )
                elif stands:
                    standing.append(claim)
            if standing:
                left = [claim.since + claim.seen.document.ttl - leases.clock() for claim in standing]
                doing = f"watching claims, {max(0.0, *left):.0f} s to go"
                self._progress.tell(doing, len(self._claims) - len(standing), len(self._claims))
                time.sleep(min(max(min(left), 0.0), _PAUSE))


def address_of(store: ImageStore, key: str) -> str:
    r"""Return an object's address to show, also where its key is none that this package would use.

    >>> address_of(ImageStore(url="s3://pictures"), "images/a\nb")
    's3://pictures/images/a\\nb'
    """
    return store.uri("x").removesuffix("x") + (key if key.isprintable() else ascii(key)[1:-1])


def names(store: ImageStore, record: str, image: str) -> bool:
    """Return whether the ledger's document still names the image of this key."""
    shelf, request_hash = shelf_of(store, record)
    seen = shelf.read(request_hash)
    found = shelf.record(seen.document) if seen else None
    return found is not None and store.uri(image) in (each.uri for each in found.generation.images)


def _finding(
    store: ImageStore,
    kind: Kind,
    key: str,
    message: str,
    *records: str,
    images: tuple[str, ...] = (),
    tag: str | None = None,
) -> Finding:
    return Finding(kind, address_of(store, key), message, images=images, records=records, tag=tag)


def _read_document(store: ImageStore, key: str) -> tuple[str, tuple[Seen, Record | None] | Finding | None]:
    """Return a document of the ledger, or what is wrong with it; None where it is gone."""
    place = layout.document_in(key)
    if place is None:
        return key, _finding(store, Kind.STRAY, key, "it is not named like a record")
    try:
        found = store.read_document(key)
        if found is None:
            return key, None
        folder, request_hash = place
        document = decode(found[0], request_hash, layout.origin_of_slug(folder))
        return key, (Seen(document, found[1], len(found[0])), record_of(document, store))
    except NoAnswerError:
        raise
    except StoreError as error:
        return key, _finding(store, Kind.UNREADABLE, key, str(error))
    except ValueError as error:
        return key, _finding(store, Kind.SENSELESS, key, f"it {error}", key)


def _size(store: ImageStore, key: str) -> tuple[str, int | Finding | None]:
    try:
        return key, store.size(key)
    except NoAnswerError:
        raise
    except StoreError as error:
        return key, _finding(store, Kind.UNREADABLE, key, str(error))


def _read_image(
    store: ImageStore, image: tuple[str, int, list[str]]
) -> tuple[str, int, list[str], tuple[Kind, str] | None]:
    """Return the image, and what is wrong with its bytes."""
    key = image[0]
    try:
        found = store.objects.digest(key)
    except NoAnswerError:
        raise
    except StoreError as error:
        return *image, (Kind.UNREADABLE, str(error))
    if found is None:
        return *image, (Kind.MISSING, "it was there when this began, and is gone")
    size, sha256 = found
    is_right = f"/{sha256}." in key
    return *image, None if is_right else (Kind.DAMAGED, f"its {size:,} bytes have the SHA-256 {sha256}")


def _look_at_claim(store: ImageStore, claim: _Claim) -> tuple[_Claim, str | None, bool]:
    """Return the claim, why it is dead if it is, and whether it stands unchanged."""
    document = claim.seen.document
    # asked first: whoever ends writes what became of the request before its lease goes
    gone = document.holder is not None and leases.is_gone(document.holder, document.token)
    unchanged_for = leases.clock() - claim.since
    shelf, request_hash = shelf_of(store, claim.key)
    seen = shelf.read(request_hash)
    if seen is None or seen.tag != claim.seen.tag:
        return claim, None, False
    late = f"not renewed for {unchanged_for:.0f} seconds" if unchanged_for >= document.ttl else None
    return claim, "that process is gone" if gone else late, True


def _images_of(row: Row) -> Iterator[str]:
    """Return the keys of the row's images that are, or once were, in this store."""
    for image in row.images:
        # a store that was moved still knows its images by their content
        _, key = layout.split_at(image.uri, layout.IMAGES) or ("", "")
        if (layout.image_in(key) or ("", ""))[0] == image.sha256:
            yield key


def _some(first: list[int], count: int) -> str:
    rest = count - len(first)
    return ", ".join(map(str, first)) + (f" and {rest:,} more" if rest else "")


def _what_is_known(document: Document) -> str:
    if not document.maybe_paid:
        return "nothing is known of who sent it"
    last = document.maybe_paid[-1]
    return f"sent by run {last.run_id}, noted {last.when:%Y-%m-%d %H:%M:%S} UTC: {last.what}"
