"""Which files a generation's images become for their consumers, and under which keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from prefect_ttapi.errors import KeyTemplateError
from prefect_ttapi.generation.destination import Destination, Place
from prefect_ttapi.generation.provenance import Original
from prefect_ttapi.images.renditions import Version
from prefect_ttapi.images.xmp import Statement
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import VERSION, DeliveredImage, GeneratedImage, Generation, StoredImage
from prefect_ttapi.storage.keys import Keys, KeyTemplate, beginning_of, of_any_size
from prefect_ttapi.storage.store import ImageStore

#: A template is parsed once for all requests that come with the same names of values.
_parsed: Final = lru_cache(maxsize=256)(KeyTemplate)


@dataclass(frozen=True)
class Delivery(Destination):
    """A destination with keys and versions: the same for all requests of a task or a batch.

    Attributes:
        key: a key template.
        batch, date: what these names stand for in it.
        source: the store that the images come from, where the settings of `to` can't read it.
        versions: renditions, and None for a copy of the image itself.
        run_id: the flow run that delivers, which need not be the one that paid.
    """

    key: str
    batch: str
    date: datetime
    source: ImageStore | None = None
    versions: Sequence[Version] = (None,)
    run_id: str | None = None

    def keys(self, request: ImageRequest, values: Mapping[str, Any], prompt: str | None = None) -> Keys:
        """Return the keys of a request's images.

        Args:
            prompt: what may be shown as the prompt in them; by default the prompt itself.

        Raises:
            KeyTemplateError: the template is illegal.
        """
        template = _parsed(self.key, tuple(sorted(values)))
        return Keys(template, request, self.date, values, self.batch, self.versions, prompt)

    @property
    def beginning(self) -> str:
        """What all keys begin with, whatever the values are."""
        return beginning_of(self.key, date=self.date, batch=self.batch)

    def check_free(self, keys: Keys) -> None:
        """Make sure, before a request is paid for, that its images can have their keys.

        Raises:
            KeyTakenError: something is at one of them.
            StoreError: the place can't be asked.
        """
        place, exact = self.to.objects, list[str]()
        for key in keys.likely():
            if (sizes := of_any_size(key)) is None:
                exact.append(key)
            elif found := next((at.key for at in place.list(sizes[0]) if sizes[1].fullmatch(at.key)), None):
                raise self.taken(found, keys.request.request_hash)
        for key, size in zip(exact, place.sizes(exact), strict=True):
            if size is not None:
                raise self.taken(key, keys.request.request_hash)

    def places(self, keys: Keys, images: Sequence[StoredImage]) -> list[Place]:
        """Return where each version of each image goes, in order.

        Raises:
            KeyTemplateError: two would get one key.
        """
        if len(self.versions) > 1:
            keys.planned()
        places = [
            Place(image, version, keys.of(image, version)) for image in images for version in self.versions
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
        originals = []
        for image, opener in zip(generation.images, at_hand, strict=True):
            place = (self.source or self.to.beside(image.uri)).objects
            asked = generation.request
            told = Statement(asked.model, generation.request_hash, image.sha256, asked.prompt)
            originals.append(Original(image, place, told, opener))
        return originals

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
            KeyTakenError: another object has the key (and `overwrite` is off).
            StoreError: a store failed.
            SigningError: a file can't be signed.
            PictureError: an image can't be decoded, so that it has no renditions, or can't be marked.
        """
        told = generation.request.prompt if prompt is None else prompt
        places = self.places(self.keys(generation.request, values, told), generation.images)
        asked_for = {"prompt": told} if self.to.upload.prompt_in_metadata else {}
        asked_for |= {"delivered-in": self.run_id} if self.run_id else {}
        delivered: list[DeliveredImage] = []
        for original in originals or self.originals(generation):
            image = original.image
            metadata = metadata_of(generation, image) | asked_for
            delivered += self.put(original, [place for place in places if place.image is image], metadata)
        return delivered


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
