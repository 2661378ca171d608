"""Who made this? From an object to its request, the answer, the runs, and the row that asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from prefect_ttapi.cli.chain import Copy, Entry, Origin, SourceRow
from prefect_ttapi.cli.reporting import Tell
from prefect_ttapi.cli.searching import entries_of, entries_that_say, manifests_of, rows_that_say
from prefect_ttapi.cli.stores import object_at, store_at
from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.responses import StoredImage
from prefect_ttapi.storage.layout import (
    IMAGES,
    LEDGER,
    document_in,
    image_in,
    is_run_id,
    is_sha256,
    object_uri,
    origin_of_slug,
    split_at,
)
from prefect_ttapi.storage.metadata import read_metadata
from prefect_ttapi.storage.store import ImageStore


def _silent(_step: object) -> None:
    """Nobody is told."""


def trace_object(
    address: str,
    store: ImageStore | None = None,
    *,
    endpoint_url: str | None = None,
    everywhere: bool = False,
    tell: Tell = _silent,
) -> Origin:
    """Who made an object: an image of a store, a delivered copy of one, any file with the same bytes, or a record.

    Args:
        address: `s3://bucket/key`, `file:///...` or a path.
        store: where ledger and manifests are, if the object's metadata doesn't say so.
        endpoint_url: of an S3 service other than AWS.
        everywhere: look through the manifests of all runs, not only of the one that paid.
        tell: told of each step of a long search.

    Raises:
        ImageMissingError: there is no such object.
        StoreError: nothing tells where it came from, or a store can't be read.
        ValueError: that is no address.
    """
    uri = object_uri(address)
    root, document = split_at(uri, LEDGER) or ("", "")
    if place := document_in(document):
        home = store or store_at(root, endpoint_url)
        return trace_request(
            place[1],
            home,
            origin=origin_of_slug(place[0]),
            everywhere=everywhere,
            tell=tell,
            address=address,
        )
    at, key = object_at(uri, endpoint_url)
    found = at.objects.look(key)
    said = {name: read_metadata(value) for name, value in found.metadata.items()} if found else {}
    kept = _image_at(uri)
    if kept:
        home = store or store_at(kept[0], endpoint_url)
        sha256, delivered = kept[1], None
    elif found is None:
        raise ImageMissingError(f"there is no {uri}")
    else:
        home = store or _home(uri, said, endpoint_url)
        sha256, delivered = _sha256(at, key, said), Copy(uri=uri, size_bytes=found.size, metadata=said)
    entries = _entries(home, said, sha256, tell)
    image = next((image for entry in entries for image in _images(entry) if image.sha256 == sha256), None)
    if kept and not found and image is None:
        raise ImageMissingError(f"there is no {uri}, and no record of it")
    request_hash = said.get("request-hash") or next(
        (entry.generation.request_hash for entry in entries if entry.generation), None
    )
    runs = (said.get("delivered-in"), said.get("flow-run-id"))
    rows = _rows(home, request_hash, runs, entries, everywhere, tell)
    return Origin(
        address=address,
        request_hash=request_hash,
        delivered=delivered,
        image=image,
        image_is_there=image and not home.missing([image]),
        entries=tuple(entries),
        rows=tuple(sorted(rows, key=lambda source: uri not in _copies(source))),
        gaps=tuple(_gaps(home, entries, image, sha256)),
    )


def trace_request(
    request_hash: str,
    store: ImageStore,
    *,
    origin: str | None = None,
    everywhere: bool = False,
    tell: Tell = _silent,
    address: str | None = None,
) -> Origin:
    """What became of a request: the ledger's word, the images, and the rows that asked for it.

    Args:
        origin: whose answer, e.g. `https://api.ttapi.io`; else each API's.
        everywhere: look through the manifests of all runs, not only of those that paid.
        tell: told of each step of a long search.
        address: how the request was named, if not by its hash.

    Raises:
        StoreError: the store has no record of it, or can't be read.
    """
    entries = entries_of(store, request_hash, origin, tell)
    if not entries:
        raise StoreError(f"{store.identity} has no record of the request {request_hash}")
    return Origin(
        address=address or request_hash,
        request_hash=request_hash,
        entries=tuple(entries),
        rows=tuple(_rows(store, request_hash, (), entries, everywhere, tell)),
    )


def _image_at(uri: str) -> tuple[str, str] | None:
    """The store and the SHA-256 of an image's address; None where it is none."""
    store, key = split_at(uri, IMAGES) or ("", "")
    found = image_in(key)
    return (store, found[0]) if found else None


def _home(uri: str, said: Mapping[str, str], endpoint_url: str | None) -> ImageStore:
    """The store that a copy says it came from."""
    source = _image_at(said.get("source-uri", ""))
    if source:
        with suppress(ValueError):  # metadata may say anything
            return store_at(source[0], endpoint_url)
    raise StoreError(
        f"{uri} does not say where it came from: name the store (--store) in which to look for its bytes"
    )


def _sha256(place: ImageStore, key: str, said: Mapping[str, str]) -> str:
    """The stored image that the object is of; a rendition has other bytes."""
    if source := _image_at(said.get("source-uri", "")):
        return source[1]
    found = place.objects.digest(key)
    if found is None:
        raise ImageMissingError(f"there is no {place.uri(key)}")
    return found[1]


def _entries(home: ImageStore, said: Mapping[str, str], sha256: str, tell: Tell) -> list[Entry]:
    """What the ledger says of the request that the object names; else of all requests with this image."""
    request_hash = said.get("request-hash", "")
    if is_sha256(request_hash):
        found = entries_of(home, request_hash, said.get("api-origin"), tell)
        if found:
            return found
    naming = entries_that_say(home, sha256, tell)
    return [entry for entry in naming if sha256 in (image.sha256 for image in _images(entry))]


def _rows(
    home: ImageStore,
    request_hash: str | None,
    known: tuple[str | None, ...],
    entries: list[Entry],
    everywhere: bool,
    tell: Tell,
) -> list[SourceRow]:
    """The manifests' rows of a request: of the runs that are known to have asked for it, or of all."""
    if request_hash is None:
        return []
    paid = (entry.generation.flow_run_id for entry in entries if entry.generation)
    runs = [run for run in dict.fromkeys((*known, *paid)) if run and is_run_id(run)]
    manifests = (
        manifests_of(home, None) if everywhere else [key for run in runs for key in manifests_of(home, run)]
    )
    found = rows_that_say(home, manifests, request_hash, tell)
    return [source for source in found if source.row.request_hash == request_hash]


def _gaps(home: ImageStore, entries: list[Entry], image: StoredImage | None, sha256: str) -> Iterator[str]:
    if not entries:
        yield f"{home.identity} has no record of it"
    elif image is None:
        yield f"the record names other images by now, none with the SHA-256 {sha256}"


def _images(entry: Entry) -> tuple[StoredImage, ...]:
    return entry.generation.images if entry.generation else ()


def _copies(source: SourceRow) -> set[str]:
    return {copy.uri for copy in source.row.delivered}
