"""Images, requests and generations for the tests of storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.files import Place
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, GeneratedImage, Generation, StoredImage
from prefect_ttapi.storage.store import ImageStore

API = "https://api.ttapi.io"


def fresh_image(data: bytes, media_type: str = "image/png", index: int = 0) -> GeneratedImage:
    """Bytes as if fresh from the wire. The store doesn't look into them."""
    spool = Spool()
    spool.write(data)
    return GeneratedImage(spool, media_type, width=64, height=48, index=index)


def stored(store: ImageStore, data: bytes = b"pixels", media_type: str = "image/png") -> StoredImage:
    """An image in the store."""
    return store.put_image(fresh_image(data, media_type), {})


def deliver(
    target: ImageStore,
    image: StoredImage,
    key: str,
    source: ImageStore | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> DeliveredImage:
    """Copy one stored image to a key of another store."""
    delivery = replace(delivery_to(target, overwrite=overwrite), source=source)
    (original,) = delivery.originals(generation_of(request_of(), image))
    (delivered,) = delivery.put(original, [Place(image, None, key)], metadata or {})
    return delivered


def delivery_to(target: ImageStore, *, overwrite: bool = False) -> Delivery:
    """A delivery there, of whatever it is given."""
    return Delivery(target, "{hash}.{ext}", "batch", datetime.now(UTC), overwrite=overwrite)


def request_of(prompt: str = "a lighthouse") -> ImageRequest:
    return ImageRequest(prompt=prompt)


def generation_of(
    request: ImageRequest, *images: StoredImage, created_at: datetime | None = None
) -> Generation:
    return Generation(
        request=request,
        request_hash=request.request_hash,
        api_origin=API,
        created_at=created_at or datetime.now(UTC),
        images=images,
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
