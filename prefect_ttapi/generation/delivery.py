"""Copies and renditions of a generation's images where their consumers look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from prefect_ttapi.errors import KeyTemplateError
from prefect_ttapi.images.renditions import Version
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import VERSION, DeliveredImage, GeneratedImage, Generation, StoredImage
from prefect_ttapi.storage.copying import Original
from prefect_ttapi.storage.keys import KeyTemplate
from prefect_ttapi.storage.store import ImageStore


@lru_cache(maxsize=256)
def key_template(template: str, names: tuple[str, ...]) -> KeyTemplate:
    """Return the template, parsed once for all requests that come with the same names of values."""
    return KeyTemplate(template, names)


@dataclass(frozen=True)
class Place:
    """One version of an image, and its key."""

    image: StoredImage
    version: Version
    key: str

    def is_of(self, copy: DeliveredImage) -> bool:
        """Return whether `copy`, which was delivered to this key before, is what would be delivered now."""
        if self.version is None:
            return copy.sha256 == self.image.sha256
        return (copy.source_uri, copy.recipe) == (self.image.uri, self.version.recipe)


@dataclass(frozen=True)
class Delivery:
    """Where, under which keys and in which versions images go: the same for all requests of a task or a batch.

    Attributes:
        to: the store to deliver to.
        key: a key template.
        batch, date: what these names stand for in it.
        source: the store that the images come from, where the settings of `to` can't read it.
        versions: renditions, and None for a copy of the image itself.
        overwrite: replace whatever is at a key.
        run_id: the flow run that delivers, which need not be the one that paid.
    """

    to: ImageStore
    key: str
    batch: str
    date: datetime
    source: ImageStore | None = None
    versions: Sequence[Version] = (None,)
    overwrite: bool = False
    run_id: str | None = None

    def planned_keys(self, request: ImageRequest, values: Mapping[str, Any], prompt: str) -> list[str]:
        """Return the keys that the request's images will have, as far as they can be known before.

        Args:
            prompt: what a key's slug is made of.

        Raises:
            KeyTemplateError: the template is illegal, or two would get one key.
        """
        return self._template(values).planned_keys(
            request, values, date=self.date, batch=self.batch, versions=self.versions, prompt=prompt
        )

    def places(
        self,
        request: ImageRequest,
        images: Sequence[StoredImage],
        values: Mapping[str, Any],
        prompt: str,
    ) -> list[Place]:
        """Return where each version of each image goes, in order.

        Args:
            prompt: what a key's slug is made of.

        Raises:
            KeyTemplateError: the template is illegal, or two would get one key.
        """
        if len(self.versions) > 1:
            self.planned_keys(request, values, prompt)
        template = self._template(values)
        places = [
            Place(
                image,
                version,
                template.key(
                    request,
                    image,
                    values=values,
                    date=self.date,
                    batch=self.batch,
                    version=version,
                    prompt=prompt,
                ),
            )
            for image in images
            for version in self.versions
        ]
        if len({place.key.lower() for place in places}) < len(places):
            raise KeyTemplateError(
                f"the key template {self.key!r} gives {len(images)} images the same key: add {{index}}"
            )
        return places

    def originals(self, generation: Generation, fresh: Sequence[GeneratedImage] = ()) -> list[Original]:
        """Return the generation's images as they are delivered: the bytes of each are fetched at most once.

        Args:
            fresh: the images with their bytes at hand, if they are.
        """
        at_hand = [image.open for image in fresh] if fresh else [None] * len(generation.images)
        return [
            self.to.original(image, self.source, opener)
            for image, opener in zip(generation.images, at_hand, strict=True)
        ]

    def deliver(
        self,
        generation: Generation,
        values: Mapping[str, Any],
        prompt: str | None = None,
        originals: Sequence[Original] = (),
    ) -> list[DeliveredImage]:
        """Put each version of each image at its key; one that is there already is left as it is.

        Args:
            prompt: what may be shown as the prompt, in keys and metadata; by default the prompt itself.
            originals: what `originals` gave for the generation, to be used besides.

        Raises:
            KeyTemplateError: the template is illegal, or two would get one key; nothing was delivered.
            StoreError: a store failed, or another object has the key (and `overwrite` is off).
            PictureError: an image can't be decoded, so that it has no renditions.
        """
        told = generation.request.prompt if prompt is None else prompt
        places = self.places(generation.request, generation.images, values, told)
        asked_for = {"prompt": told} if self.to.upload.prompt_in_metadata else {}
        asked_for |= {"delivered-in": self.run_id} if self.run_id else {}
        delivered: list[DeliveredImage] = []
        for original in originals or self.originals(generation):
            image = original.image
            metadata = metadata_of(generation, image) | asked_for
            mine = [(place.version, place.key) for place in places if place.image is image]
            delivered += self.to.deliver(original, mine, metadata, overwrite=self.overwrite)
        return delivered

    def _template(self, values: Mapping[str, Any]) -> KeyTemplate:
        return key_template(self.key, tuple(sorted(values)))


def metadata_of(generation: Generation, image: StoredImage) -> dict[str, str]:
    """Return what a delivered object says of itself: who made it, where the image and the ledger's record of it are.

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
