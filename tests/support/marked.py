"""Pictures as files, and their deliveries with marks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from PIL import Image

from prefect_ttapi import Provenance, Rendition
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.images.renditions import versions_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, Generation
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import fresh_image, generation_of
from tests.support.pictures import saved

WHEN = datetime(2031, 5, 4, tzinfo=UTC)
REQUEST = ImageRequest(prompt="a <secret> lighthouse", model="gpt-image-2")


def encoded(form: str = "PNG", **options: Any) -> bytes:
    return saved(Image.linear_gradient("L").convert("RGB").resize((64, 48)), form, **options)


def made_in(store: ImageStore, data: bytes, media_type: str = "image/png") -> Generation:
    return generation_of(REQUEST, store.put_image(fresh_image(data, media_type), {}))


def delivery_of(
    store: ImageStore,
    renditions: list[Rendition] | None = None,
    provenance: Provenance | None = None,
    *,
    overwrite: bool = False,
) -> Delivery:
    versions = versions_of(renditions or [])
    return Delivery(
        store, "{rendition}", "b", WHEN, versions=versions, provenance=provenance, overwrite=overwrite
    )


def forget_metadata(store: ImageStore, copy: DeliveredImage) -> None:
    """Leave the bytes alone, as a transfer by other tools does."""
    key = store.objects.key(copy.uri)
    store.write(key, store.read_bytes(copy.uri), copy.media_type or "")
