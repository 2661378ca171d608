"""Reading the ledger's documents, and what is wrong with each."""

from __future__ import annotations

from dataclasses import dataclass

from prefect_ttapi.cli.findings import Finding, Kind
from prefect_ttapi.cli.listed_images import Images
from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger.documents import Document, State, decode, record_of
from prefect_ttapi.ledger.shelf import Seen, shelf_of
from prefect_ttapi.responses import StoredImage
from prefect_ttapi.storage.layout import document_in, image_key, origin_of_slug
from prefect_ttapi.storage.objects import Listed, NoAnswerError
from prefect_ttapi.storage.store import ImageStore


@dataclass(frozen=True)
class Read:
    """What came of reading one document.

    Attributes:
        key: where it is.
        place: its folder in the ledger and its request hash, as the key says them.
        seen: the document, where there is one that makes sense.
        images: keys of the images it names.
        findings: what there is to say of it.
    """

    key: str
    place: tuple[str, str] | None = None
    seen: Seen | None = None
    images: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def address_of(store: ImageStore, key: str) -> str:
    """An object's address to show, also where its key is none that this package would use.

    >>> address_of(ImageStore(url="s3://pictures"), "images/a\\nb")
    's3://pictures/images/a\\\\nb'
    """
    return store.uri("x").removesuffix("x") + (key if key.isprintable() else ascii(key)[1:-1])


def read_document(store: ImageStore, images: Images, listed: Listed) -> Read:
    """One document of the listing, and what is wrong with it.

    Raises:
        NoAnswerError: the store gives no answer.
    """
    key, uri, place = listed.key, address_of(store, listed.key), document_in(listed.key)
    if place is None:
        return Read(key, findings=(Finding(Kind.STRAY, uri, "it is not named like a record"),))
    try:
        found = store.read_document(key)
        if found is None:
            return Read(key)
        folder, request_hash = place
        document = decode(found[0], request_hash, origin_of_slug(folder))
        record = record_of(document, store)
        named = record.generation.images if record else ()
        broken = broken_images(store, images, named)
    except NoAnswerError:
        raise
    except StoreError as error:
        return Read(key, place, findings=(Finding(Kind.UNREADABLE, uri, str(error)),))
    except ValueError as error:
        return Read(key, place, findings=(Finding(Kind.SENSELESS, uri, f"it {error}", records=(key,)),))
    findings = [_incomplete(store, key, broken)] if broken else []
    if document.state is State.UNKNOWN:
        findings.append(Finding(Kind.UNKNOWN_OUTCOME, uri, _what_is_known(document), records=(key,)))
    keys = tuple(_key(image) for image in named)
    return Read(key, place, Seen(document, found[1], len(found[0])), keys, tuple(findings))


def names(store: ImageStore, record: str, image: str) -> bool:
    """Whether the ledger's document still names the image of this key."""
    shelf, request_hash = shelf_of(store, record)
    seen = shelf.read(request_hash)
    found = shelf.record(seen.document) if seen else None
    return found is not None and image in (_key(each) for each in found.generation.images)


def broken_images(
    store: ImageStore, images: Images, named: tuple[StoredImage, ...]
) -> list[tuple[StoredImage, int | None]]:
    """Those that are gone (None) or have another length than recorded (that length)."""
    listed = [(image, images.size(_key(image))) for image in named]
    late = [image for image, size in listed if size != image.size_bytes]
    if not late:
        return []
    # written, or written anew, since the listing
    sizes = store.objects.sizes([_key(image) for image in late])
    return [(image, size) for image, size in zip(late, sizes, strict=True) if size != image.size_bytes]


def _key(image: StoredImage) -> str:
    return image_key(image.sha256, image.media_type)


def _incomplete(store: ImageStore, key: str, broken: list[tuple[StoredImage, int | None]]) -> Finding:
    reasons = [
        f"{_key(image)} is gone"
        if size is None
        else f"{_key(image)} has {size:,} bytes, not {image.size_bytes:,}"
        for image, size in broken
    ]
    gone = any(size is None for _, size in broken)
    return Finding(
        Kind.MISSING if gone else Kind.WRONG_SIZE,
        store.uri(key),
        "; ".join(reasons),
        images=tuple(_key(image) for image, _ in broken),
        records=(key,),
    )


def _what_is_known(document: Document) -> str:
    if not document.maybe_paid:
        return "nothing is known of who sent it"
    last = document.maybe_paid[-1]
    return f"sent by run {last.run_id}, noted {last.when:%Y-%m-%d %H:%M:%S} UTC: {last.what}"
