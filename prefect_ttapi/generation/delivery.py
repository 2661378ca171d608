"""Copies and renditions of a generation's images where their consumers look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from prefect_ttapi.errors import KeyTemplateError
from prefect_ttapi.images.renditions import Version
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import DeliveredImage, Generation, StoredImage
from prefect_ttapi.storage.keys import KeyTemplate
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.version import VERSION


@lru_cache(maxsize=256)
def key_template(template: str, names: tuple[str, ...]) -> KeyTemplate:
    """The template, parsed once for all requests that come with the same names of values."""
    return KeyTemplate(template, names)


@dataclass(frozen=True)
class Place:
    """One version of an image, and its key."""

    image: StoredImage
    version: Version
    key: str

    def is_of(self, copy: DeliveredImage) -> bool:
        """Whether `copy`, which was delivered to this key before, is what would be delivered now."""
        if self.version is None:
            return copy.sha256 == self.image.sha256
        return (copy.source_uri, copy.recipe) == (self.image.uri, self.version.recipe)


def deliver(
    generation: Generation,
    to: ImageStore,
    key: str,
    *,
    values: Mapping[str, Any],
    date: datetime,
    batch: str,
    prompt: str | None = None,
    source: ImageStore | None = None,
    versions: Sequence[Version] = (None,),
    overwrite: bool = False,
    run_id: str | None = None,
) -> list[DeliveredImage]:
    """Put each version of each image at its key in `to`; one that is there already is left as it is.

    Args:
        prompt: what may be shown as the prompt, in keys and metadata; by default the prompt itself.
        versions: renditions, and None for a copy of the image itself.
        overwrite: replace whatever is at a key.
        run_id: the flow run that delivers, which need not be the one that paid.

    Raises:
        KeyTemplateError: the template is illegal, or two of the objects would get one key; nothing was delivered.
        StoreError: a store failed, or another object has the key (and `overwrite` is off).
        PictureError: an image can't be decoded, so that it has no renditions.
    """
    places = places_of(
        generation.request,
        generation.images,
        key,
        values=values,
        date=date,
        batch=batch,
        versions=versions,
        prompt=prompt,
    )
    told = generation.request.prompt if prompt is None else prompt
    asked_for = {"prompt": told} if to.upload.prompt_in_metadata else {}
    asked_for |= {"delivered-in": run_id} if run_id else {}
    delivered: list[DeliveredImage] = []
    for image in generation.images:
        metadata = metadata_of(generation, image) | asked_for
        mine = [place for place in places if place.image is image]
        delivered += [
            to.deliver(image, place.key, source, metadata, overwrite=overwrite)
            for place in mine
            if not place.version
        ]
        made = [(place.version, place.key) for place in mine if place.version]
        delivered += to.deliver_renditions(image, made, source, metadata, overwrite=overwrite) if made else []
    return delivered


def places_of(
    request: ImageRequest,
    images: Sequence[StoredImage],
    key: str,
    *,
    values: Mapping[str, Any],
    date: datetime,
    batch: str,
    versions: Sequence[Version] = (None,),
    prompt: str | None = None,
) -> list[Place]:
    """Where each version of each image goes, in order.

    Args:
        prompt: what a key's slug is made of; by default the request's prompt.

    Raises:
        KeyTemplateError: the template is illegal, or two would get one key.
    """
    template = key_template(key, tuple(sorted(values)))
    if len(versions) > 1:
        template.planned_keys(request, values, date=date, batch=batch, versions=versions, prompt=prompt)
    key_of = partial(template.key, request, values=values, date=date, batch=batch, prompt=prompt)
    places = [
        Place(image, version, key_of(image, version=version)) for image in images for version in versions
    ]
    if len({place.key.lower() for place in places}) < len(places):
        raise KeyTemplateError(
            f"the key template {key!r} gives {len(images)} images the same key: add {{index}}"
        )
    return places


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
