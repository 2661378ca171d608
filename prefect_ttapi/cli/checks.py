"""Reading a whole store, in an order in which nothing that others do meanwhile looks wrong.

First images are listed, then the ledger and the manifests are read: an image that these name was stored before, or is
looked for once more. One that neither names is an orphan, or younger than all of them. Answers that nobody can read are
few: each one's record is read anew. Claims are looked at again in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, TypeVar

from prefect_ttapi.cli.findings import SETTLED, Finding, Inventory, Kind
from prefect_ttapi.cli.reporting import Progress, side_by_side, utc
from prefect_ttapi.cli.stores import passing_over_nonsense
from prefect_ttapi.errors import StoreError
from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.documents import (
    Documents,
    Kept,
    Record,
    Seen,
    State,
    decode,
    documents_at,
    record_of,
)
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.lineage.report import Unchanged
from prefect_ttapi.lineage.shown import places
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import Listed, NoAnswerError
from prefect_ttapi.storage.store import ImageStore

Result = TypeVar("Result")

#: The kinds of work whose counts are totals.
LISTING: Final = "listing images"
LEDGER: Final = "reading the ledger"
MANIFESTS: Final = "reading manifests"
IMAGES: Final = "reading images"
COPIES: Final = "reading delivered copies"

#: What may name images, and can't be read.
_UNREAD: Final = (Kind.SENSELESS, Kind.UNREADABLE)

#: Seconds between looks at a claim: a holder renews it four times in its life, which is a minute.
_PAUSE: Final = 5.0


def verify(
    store: ImageStore,
    *,
    quick: bool = False,
    delivered: ImageStore | None = None,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """Read a store and return findings as they are made; nothing is written to it.

    What is read is noted in a temporary file, some 200 bytes an image. Claims without a holder on this machine are
    watched for their time to live, a minute as a rule.

    Args:
        quick: compare lengths only, without reading the images.
        delivered: a place whose copies are read, too, as far as manifests name them.
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
    return _Check(store, progress or Progress(), delivered).findings(quick)


def unneeded(store: ImageStore, progress: Progress) -> Iterator[Finding]:
    """Return the findings of `verify` that only take room: orphans, and half-written files.

    Raises:
        StoreError: the store can't be reached or listed.
    """
    return _Check(store, progress).unneeded()


@dataclass(frozen=True)
class _Claim:
    """A claim as it was seen: its document's key, and when, on `leases.clock`."""

    key: str
    seen: Seen
    since: float


class _Check:
    """One reading of one store."""

    def __init__(self, store: ImageStore, progress: Progress, delivered: ImageStore | None = None) -> None:
        self._store = store
        self._delivered = delivered
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
            unread |= finding.kind in _UNREAD
            yield finding
        if self._empty:
            where = self._store.identity
            raise StoreError(f"{where} holds no images, no ledger, no manifests: is it a store?")
        yield from self._broken()
        yield from self._unneeded(unread=unread)
        if not quick:
            yield from self._read_images()
        if self._delivered:
            read = self._delivered.size if quick else self._delivered.objects.digest
            yield from self._read_copies(_Check(self._delivered, self._progress), read)
        yield from self._dead_claims()

    def unneeded(self) -> Iterator[Finding]:
        found = [*self._list_images(), *self._read_ledger(), *self._read_manifests(), *self._look_again()]
        yield from self._unneeded(unread=any(each.kind in _UNREAD for each in found))

    def _unneeded(self, *, unread: bool) -> Iterator[Finding]:
        # what could not be read may name some of them
        for image in map(self._dated, () if unread else self._inventory.unnamed()):
            if self._is_settled(image) or not self._unsettled:
                yield self._file(Kind.ORPHAN, image)
        for answer in map(self._dated, self._list(layout.ANSWERS)):
            if layout.answer_in(answer.key) is None:
                yield self._finding(Kind.STRAY, answer.key, "it is not named like an answer")
            elif self._is_settled(answer) and not keeps(self._store, answer.key):
                yield self._file(Kind.ORPHAN, answer)
        for file in self._store.objects.half_written():
            if self._is_settled(file):
                yield self._file(Kind.HALF_WRITTEN, file)

    def _list(self, prefix: str) -> Iterator[Listed]:
        for listed in self._store.list(prefix):
            self._empty = False
            yield listed

    def _list_images(self) -> Iterator[Finding]:
        for listed in self._list(layout.IMAGES):
            _, extension = layout.image_in(listed.key) or ("", "")
            if extension in EXTENSIONS.values():
                self._inventory.add(listed)
                self._progress.tell(LISTING, self._progress.done.get(LISTING, 0) + 1)
            else:
                yield self._finding(Kind.STRAY, listed.key, "it is not named like an image")

    def _read_ledger(self) -> Iterator[Finding]:
        documents = (listed.key for listed in self._list(layout.LEDGER) if listed.key != layout.PROBE)
        for key, read in self._progress.count(LEDGER, self._each(self._document, documents)):
            if isinstance(read, Finding):
                yield read if read.kind is Kind.STRAY else replace(read, records=(key,))
            elif read:
                yield from self._note(key, *read)

    def _document(self, key: str) -> tuple[Seen, Record | None] | Finding | None:
        """Return a document of the ledger, unless it is gone, and what it records. ValueError: it makes no sense."""
        place = layout.document_in(key)
        if place is None:
            return self._finding(Kind.STRAY, key, "it is not named like a record")
        found = self._store.read_document(key)
        if found is None:
            return None
        document = decode(found[0], place[1], layout.origin_of_slug(place[0]))
        return Seen(document, found[1], len(found[0])), record_of(document, self._store)

    def _note(self, key: str, seen: Seen, record: Record | None) -> Iterator[Finding]:
        for image in record.generation.images if record else ():
            named = layout.image_key(image.sha256, image.media_type)
            self._inventory.name_by_record(key, named, image.size_bytes)
        state, notes, kept = seen.document.state, seen.document.maybe_paid, seen.document.kept
        self._unsettled |= state in (State.CLAIMED, State.UNKNOWN)
        if state is State.CLAIMED:
            # later than it was read: nobody is taken for dead too soon
            self._claims.append(_Claim(key, seen, leases.clock()))
        elif kept:
            yield from self._unread(key, kept)
        if not kept and state is State.UNKNOWN:
            what = "nothing is known of who sent it"
            if notes:
                what = f"sent by run {notes[-1].run_id}, noted {utc(notes[-1].when)}: {notes[-1].what}"
            yield self._finding(Kind.UNKNOWN_OUTCOME, key, what, records=(key,))

    def _unread(self, key: str, answers: Sequence[Kept]) -> Iterator[Finding]:
        place = layout.document_in(key) or ("", "")
        bodies = [layout.answer_key(*place, answer.token) for answer in answers]
        for answer, (body, size) in zip(answers, self._each(self._store.size, bodies), strict=True):
            is_there = size == answer.size_bytes or isinstance(size, Finding)
            lost = "" if is_there else ", and gone or cut short by now"
            paid = f"paid for by run {answer.run_id}, {utc(answer.when)}: {answer.why}"
            yield self._finding(Kind.KEPT, key, f"{paid}; kept at {body}{lost}", records=(key,))

    def _read_manifests(self) -> Iterator[Finding]:
        for listed in self._list(layout.BATCHES):
            if layout.is_manifest(listed.key):
                yield from self._read_manifest(self._dated(listed) if self._delivered else listed)
            elif folder := layout.unchanged_in(listed.key):
                yield from self._read_reference(folder, listed.key)

    def _read_reference(self, folder: str, key: str) -> Iterator[Finding]:
        left = Unchanged.read(self._store, folder)
        if left is None:
            yield self._finding(Kind.SENSELESS, key, "it refers to no batch")
        elif self._store.size(f"{left.same_as}/{layout.MANIFEST}") is None:
            yield self._finding(Kind.ROWLESS, key, f"the batch {left.id} is gone")

    def _read_manifest(self, manifest: Listed) -> Iterator[Finding]:
        key = manifest.key
        uri, senseless = address_of(self._store, key), list[int]()
        try:
            with self._store.objects.fetch(key)() as lines:
                for number, line in enumerate(self._progress.count(MANIFESTS, lines)):
                    try:
                        (row,) = read_manifest([line])
                    except ValueError:
                        senseless.append(number + 1)
                    else:
                        for image in _images_of(row):
                            self._inventory.name_by_row(uri, number, image)
                        self._name_copies(row, manifest)
        except NoAnswerError:
            raise
        except StoreError as error:
            yield self._finding(Kind.UNREADABLE, key, str(error))
        if senseless:
            yield self._finding(Kind.SENSELESS, key, f"there is no row in {places('line', senseless)}")

    def _name_copies(self, row: Row, manifest: Listed) -> None:
        if self._delivered is None:
            return
        for copy in row.delivered:
            with suppress(StoreError):  # it was delivered to another place
                self._inventory.name_copy(self._delivered.objects.key(copy.uri), copy, manifest)

    def _read_copies(
        self, place: _Check, read: Callable[[str], int | tuple[int, str] | None]
    ) -> Iterator[Finding]:
        for key, found in self._progress.count(COPIES, place._each(read, self._inventory.copies())):
            size, sha256, manifest = self._inventory.copy(key)
            by = f"{address_of(self._store, manifest)} says that it was delivered"
            if isinstance(found, Finding):
                yield found
            elif found is None:
                yield place._finding(Kind.COPY_GONE, key, by)
            elif isinstance(found, tuple) and found[1] != sha256:
                yield place._finding(Kind.COPY_CHANGED, key, f"its SHA-256 is {found[1]}; {by} with {sha256}")
            elif isinstance(found, int) and found != size is not None:
                yield place._finding(Kind.COPY_CHANGED, key, f"it has {found:,} bytes; {by} with {size:,}")

    def _look_again(self) -> Iterator[Finding]:
        """Look for images that were written, or written anew, since the listing."""
        for key, size in self._each(self._store.size, self._inventory.suspects()):
            if isinstance(size, Finding):
                self._inventory.forget_names(key)
                yield size
            else:
                self._inventory.correct(key, size)

    def _broken(self) -> Iterator[Finding]:
        for record, images in self._inventory.broken():
            reasons = [
                f"{key} is gone" if size is None else f"{key} has {size:,} bytes, not {recorded:,}"
                for key, recorded, size in images
            ]
            kind = Kind.MISSING if any(size is None for _, _, size in images) else Kind.WRONG_SIZE
            keys = tuple(key for key, _, _ in images)
            yield self._finding(kind, record, "; ".join(reasons), images=keys, records=(record,))
        for uri, rows in self._inventory.past():
            yield Finding(Kind.PAST, uri, f"images of {places('row', [*rows])} are gone")

    def _dated(self, file: Listed) -> Listed:
        """Return it with the time of its last write, which not all listings have."""
        found = self._store.objects.look(file.key) if file.modified is None else None
        return replace(file, modified=found.modified) if found else file

    def _is_settled(self, file: Listed) -> bool:
        """Return whether it is surely too old for somebody to be at work on it."""
        return file.modified is not None and self._started - file.modified >= SETTLED

    def _read_images(self) -> Iterator[Finding]:
        total, total_bytes = self._inventory.totals()
        done_bytes = 0
        read = self._each(self._store.objects.digest, self._inventory.keys())
        for number, (key, found) in enumerate(read, start=1):
            wrong = found if isinstance(found, Finding) else self._wrong_bytes(key, found)
            done_bytes += found[0] if isinstance(found, tuple) else 0
            self._progress.tell(IMAGES, number, total, done_bytes, total_bytes)
            if wrong:
                owners = tuple(each for each in self._inventory.owners(key) if names(self._store, each, key))
                # an image that nobody names may go, and goes in a repair
                if owners or wrong.kind is not Kind.MISSING:
                    yield replace(wrong, images=(key,), records=owners)

    def _wrong_bytes(self, key: str, found: tuple[int, str] | None) -> Finding | None:
        if found is None:
            return self._finding(Kind.MISSING, key, "it was there when this began, and is gone")
        size, sha256 = found
        if f"/{sha256}." in key:
            return None
        return self._finding(Kind.DAMAGED, key, f"its {size:,} bytes have the SHA-256 {sha256}")

    def _dead_claims(self) -> Iterator[Finding]:
        """Return the claims whose holder is gone, or let the claim's life pass unchanged while this process watched."""
        standing = self._claims
        while standing:
            looked = [*side_by_side(self._look_at, standing)]
            for claim, why in looked:
                if why and (holder := claim.seen.document.holder):
                    held = f"held by run {holder.run_id} on {holder.host}: {why}"
                    found = self._finding(Kind.DEAD_CLAIM, claim.key, held, records=(claim.key,))
                    yield replace(found, tag=claim.seen.tag)
            standing = [claim for claim, why in looked if why == ""]
            if standing:
                left = [claim.since + claim.seen.document.ttl - leases.clock() for claim in standing]
                doing = f"watching claims, {max(0.0, *left):.0f} s to go"
                self._progress.tell(doing, len(self._claims) - len(standing), len(self._claims))
                time.sleep(min(max(min(left), 0.0), _PAUSE))

    def _look_at(self, claim: _Claim) -> tuple[_Claim, str | None]:
        """Return why the claim is dead: empty where that can't be told yet, None where it has changed."""
        document = claim.seen.document
        # asked first: whoever ends writes what became of the request before its lease goes
        gone = document.holder is not None and leases.is_gone(document.holder, document.token)
        unchanged_for = leases.clock() - claim.since
        _, seen, _ = standing(self._store, claim.key)
        if seen is None or seen.tag != claim.seen.tag:
            return claim, None
        late = f"not renewed for {unchanged_for:.0f} seconds" if unchanged_for >= document.ttl else ""
        return claim, "that process is gone" if gone else late

    def _each(
        self, read: Callable[[str], Result], keys: Iterable[str]
    ) -> Iterator[tuple[str, Result | Finding]]:
        """Read each key; return the results, or that one can't be read or makes no sense.

        Raises:
            NoAnswerError: the store gives no answer.
        """

        def attempt(key: str) -> tuple[str, Result | Finding]:
            try:
                return key, read(key)
            except NoAnswerError:
                raise
            except StoreError as error:
                return key, self._finding(Kind.UNREADABLE, key, str(error))
            except ValueError as error:
                return key, self._finding(Kind.SENSELESS, key, f"it {error}")

        return side_by_side(attempt, keys)

    def _file(self, kind: Kind, file: Listed) -> Finding:
        found = self._finding(kind, file.key, f"{file.size:,} bytes", images=(file.key,))
        return replace(found, modified=file.modified, size_bytes=file.size)

    def _finding(
        self, kind: Kind, key: str, message: str, images: tuple[str, ...] = (), records: tuple[str, ...] = ()
    ) -> Finding:
        return Finding(kind, address_of(self._store, key), message, images, records)


def address_of(store: ImageStore, key: str) -> str:
    r"""Return an object's address to show, also where its key is none that this package would use.

    >>> address_of(ImageStore(url="s3://pictures"), "images/a\nb")
    's3://pictures/images/a\\nb'
    """
    return store.uri("x").removesuffix("x") + (key if key.isprintable() else ascii(key)[1:-1])


def standing(store: ImageStore, key: str) -> tuple[Documents, Seen | None, Record | None]:
    """Return the ledger's document of this key as it stands now, what it records, and where that is written."""
    documents, request_hash = documents_at(store, key)
    seen = documents.read(request_hash)
    return documents, seen, documents.record(seen) if seen else None


def names(store: ImageStore, record: str, image: str) -> bool:
    """Return whether the ledger's document still names the image of this key."""
    _, _, found = standing(store, record)
    return found is not None and store.uri(image) in {each.uri for each in found.generation.images}


def keeps(store: ImageStore, answer: str) -> bool:
    """Return whether the ledger still names the answer of this key, which nobody could read, or can't tell."""
    record, token = layout.answer_in(answer) or ("", "")
    with passing_over_nonsense():
        _, seen, _ = standing(store, record)
        return seen is not None and token in {kept.token for kept in seen.document.kept}
    return True


def _images_of(row: Row) -> Iterator[str]:
    """Return the keys of the row's images that are, or once were, in this store."""
    for image in row.images:
        # a store that was moved still knows its images by their content
        _, key = layout.split_at(image.uri, layout.IMAGES) or ("", "")
        if (layout.image_in(key) or ("", ""))[0] == image.sha256:
            yield key
