"""Copies of a generation's images where their consumers look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import DeliveredImage, Generation, StoredImage
from prefect_ttapi.storage.keys import KeyTemplate, KeyTemplateError
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.version import VERSION


@lru_cache(maxsize=256)
def key_template(template: str, names: tuple[str, ...]) -> KeyTemplate:
    """The template, parsed once for all requests that come with the same names of values."""
    return KeyTemplate(template, names)


def deliver(
    generation: Generation,
    to: ImageStore,
    key: str,
    *,
    values: Mapping[str, Any],
    date: datetime,
    batch: str,
    source: ImageStore | None = None,
) -> list[DeliveredImage]:
    """Copy each image to its key in `to`; one that is there already is left as it is.

    Raises:
        KeyTemplateError: the template is illegal, or two of the images would get one key; nothing was copied.
        StoreError: a store failed, or another object has the key.
    """
    keys = keys_of(generation.request, generation.images, key, values=values, date=date, batch=batch)
    asked_for = {"prompt": generation.request.prompt} if to.upload.prompt_in_metadata else {}
    return [
        to.deliver(image, place, source, metadata_of(generation, image) | asked_for)
        for image, place in zip(generation.images, keys, strict=True)
    ]


def keys_of(
    request: ImageRequest,
    images: Sequence[StoredImage],
    key: str,
    *,
    values: Mapping[str, Any],
    date: datetime,
    batch: str,
) -> list[str]:
    """The key of each image. KeyTemplateError: the template is illegal, or two would get one key."""
    template = key_template(key, tuple(sorted(values)))
    keys = [template.key(request, image, values, date=date, batch=batch) for image in images]
    if len({place.lower() for place in keys}) < len(keys):
        raise KeyTemplateError(
            f"the key template {key!r} gives {len(keys)} images the same key: add {{index}}"
        )
    return keys


def metadata_of(generation: Generation, image: StoredImage) -> dict[str, str]:
    """What a delivered object says of itself: who made it, and where the image and the ledger's record of it are.

    `prefect-ttapi` is the version of this package.
    """
    facts = {
        "request-hash": generation.request_hash,
        "api-origin": generation.api_origin,
        "request-id": generation.request_id,
        "model": generation.request.model,
        "flow-run-id": generation.flow_run_id,
        "task-run-id": generation.task_run_id,
        "source-uri": image.uri,
        "prefect-ttapi": VERSION,
    }
    return {name: value for name, value in facts.items() if value}
