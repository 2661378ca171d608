"""Who made this, and what did this make? From an object to the row that asked for it, from a run to its copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from prefect_ttapi.cli.chain import Copy, Entry, Made, Origin, SourceRow
from prefect_ttapi.cli.reporting import Progress
from prefect_ttapi.cli.searching import Search
from prefect_ttapi.cli.stores import object_at, store_at
from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.responses import StoredImage
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import read_metadata
from prefect_ttapi.storage.store import ImageStore


def trace_object(
    address: str,
    store: ImageStore | None = None,
    *,
    endpoint_url: str | None = None,
    everywhere: bool = False,
    progress: Progress | None = None,
) -> Origin:
    """Tell who made an object: an image of a store, a copy of one, any file with the same bytes, or a record.

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
        made = trace_request(found[1], home, origin=origin, everywhere=everywhere, progress=progress)
        return made.model_copy(update={"address": address})
    place, key = object_at(uri, endpoint_url)
    there = place.objects.look(key)
    said = {name: read_metadata(value) for name, value in there.metadata.items()} if there else {}
    kept = _image_at(uri)
    source = kept or _image_at(said.get("source-uri", ""))
    if there is None and not kept:
        raise ImageMissingError(f"there is no {uri}")
    home = store or (store_at(kept[0], endpoint_url) if kept else _home(uri, source, endpoint_url))
    search = Search(home, progress or Progress())
    # a rendition has other bytes than the image that it was made from
    sha256 = source[1] if source else _digest(place, key)
    entries = _entries(search, said, sha256)
    image = next((image for entry in entries for image in _images(entry) if image.sha256 == sha256), None)
    if there is None and image is None:
        raise ImageMissingError(f"there is no {uri}, and no record of it")
    hashes = (entry.generation.request_hash for entry in entries if entry.generation)
    request_hash = said.get("request-hash") or next(hashes, None)
    runs = [said.get("delivered-in"), said.get("flow-run-id")]
    rows = _rows(search, request_hash, runs, entries, everywhere) if request_hash else []
    return Origin(
        address=address,
        request_hash=request_hash,
        delivered=Copy(uri=uri, size_bytes=there.size, metadata=said) if there and not kept else None,
        image=image,
        image_is_there=image and not home.missing([image]),
        entries=tuple(entries),
        rows=tuple(sorted(rows, key=lambda found: uri not in {copy.uri for copy in found.row.delivered})),
        gaps=tuple(_gaps(home, entries, image, sha256)),
    )


def trace_request(
    request_hash: str,
    store: ImageStore,
    *,
    origin: str | None = None,
    everywhere: bool = False,
    progress: Progress | None = None,
) -> Origin:
    """Tell what became of a request: the ledger's word, the images, and the rows that asked for it.

    Args:
        origin: whose answer, e.g. `https://api.ttapi.io`; else each API's.
        everywhere: look through the manifests of all runs, not only of those that paid.
        progress: told of each step of a long search.

    Raises:
        StoreError: the store has no record of it, or can't be read.
    """
    search = Search(store, progress or Progress())
    entries = search.entries_of(request_hash, origin)
    if not entries:
        raise StoreError(f"{store.identity} has no record of the request {request_hash}")
    rows = _rows(search, request_hash, [], entries, everywhere)
    return Origin(address=request_hash, request_hash=request_hash, entries=tuple(entries), rows=tuple(rows))


def trace_run(run_id: str, store: ImageStore, *, progress: Progress | None = None) -> Made:
    """Tell what a flow run made: its manifests' rows; without a batch, what the ledger says that it paid for.

    Raises:
        StoreError: the store knows nothing of the run, or can't be read.
        ValueError: that is no run's id.
    """
    if not layout.is_run_id(run_id):
        raise ValueError(f"{run_id[:80]!a} is no run's id")
    search = Search(store, progress or Progress())
    if manifests := search.manifests_of(run_id):
        return Made(run_id, tuple(map(store.uri, manifests)), search.rows_that_say(manifests, ""))
    paid = tuple(
        SourceRow(manifest_uri=entry.uri, row=Row.of(number, entry.generation))
        for number, entry in enumerate(search.entries_that_say(run_id))
        if entry.generation and run_id in (entry.run_id, entry.generation.flow_run_id)
    )
    if not paid:
        raise StoreError(f"{store.identity} knows nothing of the run {run_id}: no manifest, no record")
    return Made(run_id, (), paid)


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


def _entries(search: Search, said: Mapping[str, str], sha256: str) -> list[Entry]:
    """Return the ledger's entries of the request that the object names; else of all requests with this image."""
    request_hash = said.get("request-hash", "")
    if layout.is_sha256(request_hash) and (found := search.entries_of(request_hash, said.get("api-origin"))):
        return found
    naming = search.entries_that_say(sha256)
    return [entry for entry in naming if sha256 in {image.sha256 for image in _images(entry)}]


def _rows(
    search: Search, request_hash: str, runs: list[str | None], entries: list[Entry], everywhere: bool
) -> list[SourceRow]:
    """Return the manifests' rows of a request: of these runs and those that paid, or of all."""
    asked = dict.fromkeys([*runs, *(entry.generation.flow_run_id for entry in entries if entry.generation)])
    known = [None] if everywhere else [run for run in asked if run and layout.is_run_id(run)]
    manifests = [key for run in known for key in search.manifests_of(run)]
    found = search.rows_that_say(manifests, request_hash)
    return [source for source in found if source.row.request_hash == request_hash]


def _gaps(home: ImageStore, entries: list[Entry], image: StoredImage | None, sha256: str) -> Iterator[str]:
    if not entries:
        yield f"{home.identity} has no record of it"
    elif image is None:
        yield f"the record names other images by now, none with the SHA-256 {sha256}"


def _images(entry: Entry) -> tuple[StoredImage, ...]:
    return entry.generation.images if entry.generation else ()
