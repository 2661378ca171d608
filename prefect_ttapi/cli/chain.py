"""The chain from an image to the row that asked for it, and from a run to its images and copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from prefect_ttapi.cli.batches import Batch, batches_of, lines_of
from prefect_ttapi.cli.reporting import Progress, side_by_side
from prefect_ttapi.cli.stores import document_keys, object_at, passing_over_nonsense, store_at
from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.headers import media_type_of
from prefect_ttapi.images.labels import Labels, read_labels
from prefect_ttapi.images.signing import Signature, is_installed, read_signature
from prefect_ttapi.ledger.documents import Documents, Payment, documents_at
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.origins import DEFAULT_BASE_URL, SANDBOX_ORIGIN
from prefect_ttapi.results import Generation, StoredImage
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import read_metadata
from prefect_ttapi.storage.store import ImageStore


class _Link(BaseModel):
    model_config = ConfigDict(frozen=True)


class Copy(_Link):
    """A delivered copy that was asked about, and its own metadata.

    Attributes:
        uri: its address.
        size_bytes: its length.
        metadata: decoded; nobody vouches for it.
    """

    uri: str
    size_bytes: int
    metadata: dict[str, str]


class KeptAnswer(_Link):
    """An answer that was paid for and gave none of its images, or not all.

    Attributes:
        uri: where its body is, as it came.
        run_id: the run that paid.
        when: when it came, UTC.
        why: why not all of its images could be had.
        size_bytes: of the body.
    """

    uri: str
    run_id: str
    when: datetime
    why: str
    size_bytes: int


class Entry(_Link):
    """A request's document in the ledger.

    Attributes:
        uri: address of its document.
        state: `claimed`, `generated`, `released` or `unknown`.
        run_id: the run that paid, where there is an answer.
        generation: the answer: request, images, usage, runs.
        maybe_paid, also_paid: other payments for it.
        kept: answers of which not all images could be had: the next run reads them again.
    """

    uri: str
    state: str
    run_id: str | None = None
    generation: Generation | None = None
    maybe_paid: tuple[Payment, ...] = ()
    also_paid: tuple[Payment, ...] = ()
    kept: tuple[KeptAnswer, ...] = ()


class SourceRow(_Link):
    """A row of a manifest, which says what was asked for and where its images were delivered."""

    manifest_uri: str
    row: Row


class Origin(_Link):
    """Who made an image, or what became of a request.

    Attributes:
        address: what was asked about.
        request_hash: the request's name, where it could be found.
        found_by: what it was found by, in words.
        delivered: the delivered copy that was asked about, where it is one.
        image: the stored image that was asked about.
        image_is_there: whether the store has it with the recorded length.
        signature: who signed the file that was asked about, where it has Content Credentials that can be read here.
        is_unread: it has some, and the extra `provenance` is not installed.
        entries: what the ledger says of the request; several where more than one API was asked.
        rows: manifest rows of the request, that of the delivered copy first.
        gaps: what could not be found, a line each.
    """

    address: str
    request_hash: str | None = None
    found_by: str | None = None
    delivered: Copy | None = None
    image: StoredImage | None = None
    image_is_there: bool | None = None
    signature: Signature | None = None
    is_unread: bool = False
    entries: tuple[Entry, ...] = ()
    rows: tuple[SourceRow, ...] = ()
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """All images that a run made.

    Attributes:
        run_id: the flow run.
        manifests: addresses of its batches' manifests; none for a run without a batch.
        rows: a row for each request, read as they are asked for, once.
    """

    run_id: str
    manifests: tuple[str, ...]
    rows: Iterable[SourceRow]


class _Claim(NamedTuple):
    """What something says of an object: which request it answers, at which API, and which image it is made of."""

    source: str
    request_hash: str | None = None
    api_origin: str | None = None
    sha256: str | None = None


class Search:
    """A search through one store.

    Args:
        progress: told of each step of a long search.
        everywhere: look through the manifests of all runs, not only of those that paid.
    """

    def __init__(
        self, store: ImageStore, progress: Progress | None = None, *, everywhere: bool = False
    ) -> None:
        self.store = store
        self._progress = progress or Progress()
        self._everywhere = everywhere

    def request(self, request_hash: str, origin: str | None = None) -> Origin:
        """Tell what became of a request: the ledger's word, the images, and the rows that asked for it.

        Args:
            origin: whose answer, e.g. `https://api.ttapi.io`; else each API's.

        Raises:
            StoreError: the store has no record of it, or can't be read.
        """
        entries = tuple(self.entries_of(request_hash, origin))
        if not entries:
            raise StoreError(f"{self.store.identity} has no record of the request {request_hash}")
        rows = tuple(self.rows_of(request_hash, entries))
        return Origin(address=request_hash, request_hash=request_hash, entries=entries, rows=rows)

    def run(self, run_id: str) -> Made:
        """Tell what a flow run made: its manifests' rows; without a batch, what the ledger says that it paid for.

        Raises:
            StoreError: the store knows nothing of the run, or can't be read.
            ValueError: that is no run's id.
        """
        if not layout.is_run_id(run_id):
            raise ValueError(f"{run_id[:80]!a} is no run's id")
        if batches := self._batches_of(run_id):
            left = (batch.manifest or f"{batch.folder}/{layout.UNCHANGED}" for batch in batches)
            return Made(run_id, tuple(map(self.store.uri, left)), self._rows_that_say(batches, ""))
        paid = tuple(
            SourceRow(manifest_uri=entry.uri, row=Row.of(number, entry.generation))
            for number, entry in enumerate(self._entries_that_say(run_id))
            if entry.generation and run_id in (entry.run_id, entry.generation.flow_run_id)
        )
        if not paid:
            raise StoreError(
                f"{self.store.identity} knows nothing of the run {run_id}: no manifest, no record"
            )
        return Made(run_id, (), paid)

    def entries_claimed(self, claim: _Claim) -> list[Entry]:
        """Return the ledger's entries of the request that is named; else of all requests with this image."""
        request_hash, sha256 = claim.request_hash or "", claim.sha256 or ""
        if layout.is_sha256(request_hash) and (found := self.entries_of(request_hash, claim.api_origin)):
            return found
        naming = self._entries_that_say(sha256) if layout.is_sha256(sha256) else ()
        return [entry for entry in naming if sha256 in {image.sha256 for image in _images(entry)}]

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

    def _entries_that_say(self, text: str) -> Iterator[Entry]:
        """Return the documents of the ledger that hold `text`."""
        wanted = text.encode()

        def holds(key: str) -> str | None:
            found = self.store.read_document(key)
            return key if found and wanted in found[0] else None

        for key in self._progress.count("searching the ledger", side_by_side(holds, self._keys())):
            if key is not None:
                yield from self._entries_at(key)

    def _batches_of(self, run_id: str | None) -> list[Batch]:
        """Return the batches of a run that came to an end; or all that have a manifest of their own."""
        batches = sorted(batches_of(self.store, run_id), key=lambda batch: batch.folder)
        return [batch for batch in batches if batch.manifest or (run_id and batch.unchanged)]

    def _rows_that_say(self, batches: Iterable[Batch], text: str) -> Iterator[SourceRow]:
        """Return the batches' rows that hold `text`; all where it is empty. Other lines are left out."""
        wanted = text.encode()
        for batch in batches:
            uri = self.store.uri(batch.rows_at)
            for line in self._progress.count("searching manifests", lines_of(self.store, batch)):
                if wanted in line:
                    with suppress(ValueError):
                        yield from (SourceRow(manifest_uri=uri, row=row) for row in read_manifest([line]))

    def rows_of(
        self, request_hash: str, entries: Sequence[Entry], runs: Sequence[str | None] = ()
    ) -> list[SourceRow]:
        """Return the manifests' rows of a request: of these runs and those that paid, or of all."""
        paid = (entry.generation.flow_run_id for entry in entries if entry.generation)
        known = [run for run in dict.fromkeys([*runs, *paid]) if run and layout.is_run_id(run)]
        asked = [None] if self._everywhere else known
        batches = [batch for run in asked for batch in self._batches_of(run)]
        found = self._rows_that_say(batches, request_hash)
        return [source for source in found if source.row.request_hash == request_hash]

    def _keys(self) -> Iterator[str]:
        return self._progress.count("listing the ledger", document_keys(self.store))

    def _entry_of(self, request_hash: str, origin: str) -> Iterator[Entry]:
        with suppress(ValueError):  # a copy's metadata may say anything
            yield from _entry(Documents(self.store, origin), request_hash)

    def _entries_at(self, key: str) -> Iterator[Entry]:
        """Return the document of this key, unless it makes no sense: that is for `verify` to tell."""
        with passing_over_nonsense():
            yield from _entry(*documents_at(self.store, key))


def _entry(documents: Documents, request_hash: str) -> Iterator[Entry]:
    """Yield what a document of the ledger says, if there is one."""
    seen = documents.read(request_hash)
    if seen is None:
        return
    document, record, uri = seen.document, documents.record(seen), documents.store.uri
    slug, facts = layout.slug_of(documents.api_origin), {"run_id", "when", "why", "size_bytes"}
    bodies = [uri(layout.answer_key(slug, request_hash, answer.token)) for answer in document.kept]
    answers = zip(bodies, document.kept, strict=True)
    yield Entry(
        uri=uri(documents.key(request_hash)),
        state=document.state,
        run_id=record and record.run_id,
        generation=record and record.generation,
        maybe_paid=document.maybe_paid,
        also_paid=document.also_paid,
        kept=tuple(KeptAnswer(uri=body, **answer.model_dump(include=facts)) for body, answer in answers),
    )


def trace_object(
    address: str,
    store: ImageStore | None = None,
    *,
    endpoint_url: str | None = None,
    everywhere: bool = False,
    progress: Progress | None = None,
) -> Origin:
    """Tell who made an object: an image of a store, a copy of one, any file that is made of one, or a record.

    What the object's metadata says comes first, then what the file says in valid Content Credentials and in its XMP,
    then whose bytes they are.

    Args:
        address: `s3://bucket/key`, `file:///...` or a path.
        store: where ledger and manifests are, if the object's metadata doesn't say so.
        endpoint_url: of an S3 service other than AWS.
        everywhere: look through the manifests of all runs, not only of the one that paid.
        progress: told of each step of a long search.

    Raises:
        ImageMissingError: there is no such object.
        StoreError: nothing tells where it came from, or a store can't be read.
        ValueError: that is no address.
    """
    uri = layout.object_uri(address)
    root, document = layout.split_at(uri, layout.LEDGER) or ("", "")
    if found := layout.document_in(document):
        home, origin = store or store_at(root, endpoint_url), layout.origin_of_slug(found[0])
        made = Search(home, progress, everywhere=everywhere).request(found[1], origin)
        return made.model_copy(update={"address": address})
    place, key = object_at(uri, endpoint_url)
    there = place.objects.look(key)
    said = {name: read_metadata(value) for name, value in there.metadata.items()} if there else {}
    kept = _image_at(uri)
    source = kept or _image_at(said.get("source-uri", ""))
    if there is None and not kept:
        raise ImageMissingError(f"there is no {uri}")
    home = store or (store_at(kept[0], endpoint_url) if kept else _home(uri, source, endpoint_url))
    search = Search(home, progress, everywhere=everywhere)
    labels, signature = _read(place, key) if there else (Labels(), None)
    claims = _claims(place, key, said, kept, labels, signature)
    first = next(claims)
    found_by, entries = next(
        ((claim, known) for claim in chain([first], claims) if (known := search.entries_claimed(claim))),
        (first, []),
    )
    sha256 = found_by.sha256 or _digest(place, key)
    image = next((image for entry in entries for image in _images(entry) if image.sha256 == sha256), None)
    if there is None and image is None:
        raise ImageMissingError(f"there is no {uri}, and no record of it")
    hashes = (entry.generation.request_hash for entry in entries if entry.generation)
    request_hash = found_by.request_hash or next(hashes, None)
    runs = [said.get("delivered-in"), said.get("flow-run-id")]
    rows = search.rows_of(request_hash, entries, runs) if request_hash else []
    return Origin(
        address=address,
        request_hash=request_hash,
        found_by=found_by.source if entries else None,
        delivered=Copy(uri=uri, size_bytes=there.size, metadata=said) if there and not kept else None,
        image=image,
        image_is_there=image and not home.missing([image]),
        signature=signature,
        is_unread="credentials" in labels.marks and not is_installed(),
        entries=tuple(entries),
        rows=tuple(sorted(rows, key=lambda found: uri not in {copy.uri for copy in found.row.delivered})),
        gaps=tuple(_gaps(home, entries, image, sha256)),
    )


def _image_at(uri: str) -> tuple[str, str] | None:
    """Return store and SHA-256 of an image's address; None where it is none."""
    store, key = layout.split_at(uri, layout.IMAGES) or ("", "")
    found = layout.image_in(key)
    return (store, found[0]) if found else None


def _home(uri: str, source: tuple[str, str] | None, endpoint_url: str | None) -> ImageStore:
    """Return the store that a copy says it came from."""
    with suppress(ValueError):  # metadata may say anything
        if source:
            return store_at(source[0], endpoint_url)
    raise StoreError(
        f"{uri} does not say where it came from: name the store (--store) in which to look for its bytes"
    )


def _digest(place: ImageStore, key: str) -> str:
    found = place.objects.digest(key)
    if found is None:
        raise ImageMissingError(f"there is no {place.uri(key)}")
    return found[1]


def _read(place: ImageStore, key: str) -> tuple[Labels, Signature | None]:
    """Return what a file says of itself, and who signed it."""
    with place.open(place.uri(key)) as file:
        labels = read_labels(file) or Labels()
        file.seek(0)
        kind = media_type_of(file.read(12))
        return labels, read_signature(file, kind) if kind else None


def _claims(
    place: ImageStore,
    key: str,
    said: Mapping[str, str],
    kept: tuple[str, str] | None,
    labels: Labels,
    signature: Signature | None,
) -> Iterator[_Claim]:
    """Yield what is said of an object, the likeliest first, as far as it is asked for."""
    if kept:
        yield _Claim("its address", said.get("request-hash"), said.get("api-origin"), kept[1])
        return
    # a rendition has other bytes than the image that it was made from
    (_, source) = _image_at(said.get("source-uri", "")) or ("", said.get("source-sha256"))
    if source or "request-hash" in said:
        yield _Claim("its object's metadata", said.get("request-hash"), said.get("api-origin"), source)
    if signature and signature.source_sha256 and not signature.problem:
        yield _Claim("its Content Credentials", signature.request_hash, None, signature.source_sha256)
    if labels.request_hash or labels.source_sha256:
        yield _Claim("the XMP in the file", labels.request_hash, None, labels.source_sha256)
    yield _Claim("the SHA-256 of its bytes", sha256=_digest(place, key))


def _gaps(home: ImageStore, entries: list[Entry], image: StoredImage | None, sha256: str) -> Iterator[str]:
    if not entries:
        yield f"{home.identity} has no record of it"
    elif image is None:
        yield f"the record names other images by now, none with the SHA-256 {sha256}"


def _images(entry: Entry) -> tuple[StoredImage, ...]:
    return entry.generation.images if entry.generation else ()
