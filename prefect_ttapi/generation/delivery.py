"""Copies and renditions of a generation's images where their consumers look, each put there once."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, Final

from prefect_ttapi.errors import KeyTakenError, KeyTemplateError, StoreError
from prefect_ttapi.generation.provenance import (
    SAYS_SO,
    Original,
    Provenance,
    is_signed_copy,
    marked_copy,
    marked_rendition,
    marks_in,
    marks_of,
    signed,
    signed_rendition,
    statement_of,
    without_its_mark,
)
from prefect_ttapi.images.renditions import Marking, Rendered, Rendition, Version, render
from prefect_ttapi.images.signing import Signer
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import VERSION, DeliveredImage, GeneratedImage, Generation, StoredImage
from prefect_ttapi.storage.keys import Keys, KeyTemplate, beginning_of, of_any_size
from prefect_ttapi.storage.layout import IMAGES, split_at
from prefect_ttapi.storage.objects import (
    Condition,
    ConflictError,
    Facts,
    Found,
    NoAnswerError,
    NoConditionsError,
    ObjectStore,
    patience,
    sha256_of,
)
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: What is put where deliveries go, to see whether it can be, and how often a second one is tried.
TRIED: Final = "prefect-ttapi-write-test.png"
_TRIED_BYTES: Final = b"written by prefect-ttapi, to see whether images can be delivered here"
_TIMES: Final = 3

#: Places that this process has found to have no conditional writes.
_unconditional: set[ObjectStore] = set()

#: Puts something at its key if what is there now is as expected.
Write = Callable[[Condition], Found]

#: What a copy has of the image that it is of.
_COPIED: Final = {"sha256", "size_bytes", "media_type", "width", "height", "marks"}

#: A template is parsed once for all requests that come with the same names of values.
_parsed: Final = lru_cache(maxsize=256)(KeyTemplate)

#: Width and height, as `_says` writes them.
_PIXELS: Final = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", re.ASCII)


@dataclass(frozen=True)
class Place:
    """One version of an image, and its key."""

    image: StoredImage
    version: Version
    key: str

    def is_of(self, copy: DeliveredImage, provenance: Provenance | None = None) -> bool:
        """Return whether `copy`, which was delivered to this key before, would stand now, with or without a mark.

        Where a mark is asked for, and nobody knows whether it has one, it has to be looked at.
        """
        if self.version is None:
            looked = copy.marks is not None or provenance is None
            return (
                looked and copy.rendition is None and self.image.sha256 in (copy.sha256, copy.source_sha256)
            )
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
        provenance: what delivered files get.
    """

    to: ImageStore
    key: str
    batch: str
    date: datetime
    source: ImageStore | None = None
    versions: Sequence[Version] = (None,)
    overwrite: bool = False
    run_id: str | None = None
    provenance: Provenance | None = None

    @cached_property
    def signer(self) -> Signer | None:
        """What signs files; None where nothing is signed.

        Raises:
            SigningError: the block's certificates or its key are of no use any more.
        """
        return self.provenance.signer() if self.provenance else None

    def check(self) -> None:
        """Make sure that images can be delivered, by putting an object as deliveries do and removing it.

        Where it may not be removed it stays, and the next one replaces it.

        Raises:
            StoreError: what is wrong, and what to do, in one line.
            SigningError: nothing can be signed, and why.
        """
        target = self.to.objects
        facts = self.to.delivered_facts("image/png", hashlib.sha256(_TRIED_BYTES).hexdigest(), {}, TRIED)

        def write(expected: Condition) -> Found:
            tag = patience().ask(
                lambda: target.write(TRIED, lambda: io.BytesIO(_TRIED_BYTES), facts, expected)
            )
            return Found(len(_TRIED_BYTES), facts.metadata, tag)

        if self.signer is not None:
            self.signer.check()
        with self.to.before_paying():
            target.read(TRIED)  # who may not read may not look, and this refusal has words
            try:
                self._put(write)
            except ConflictError:
                write(Condition.ANYTHING)  # one from another time
            try:
                target.put_tags(TRIED, facts)
                # others may be at it, and remove theirs
                known = self.overwrite or target in _unconditional
                if not known and all(self._puts_twice(write) for _ in range(_TIMES)):
                    self._has_no_conditions("it creates an object twice")
            finally:
                self._remove_tried()

    def _puts_twice(self, write: Write) -> bool:
        try:
            self._put(write)
        except ConflictError:
            return False
        return True

    def _remove_tried(self) -> None:
        try:
            self.to.objects.delete(TRIED)
        except StoreError as error:
            logger.info("%s stays: %s", TRIED, error)

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
                raise self.taken(found, keys.request)
        for key, size in zip(exact, place.sizes(exact), strict=True):
            if size is not None:
                raise self.taken(key, keys.request)

    def taken(self, key: str, request: ImageRequest) -> KeyTakenError:
        """Return why a request is not paid for, at whose key there is something."""
        found = self.to.objects.look(key)
        said = found.metadata if found else {}
        name = said.get("request-hash", "")
        what = f"an image of the request {name[:12]}" if name else "something else"
        if name == request.request_hash:
            source = split_at(said.get("source-uri", ""), IMAGES)
            what = "an earlier image of this request" + (f", from the store {source[0]}" if source else "")
        return KeyTakenError(f"nothing is sent: {self._refusal(key, what)}")

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
        return [
            Original(
                image,
                (self.source or self.to.beside(image.uri)).objects,
                statement_of(generation, image),
                opener,
            )
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

    def put(
        self, original: Original, places: Sequence[Place], metadata: Mapping[str, str]
    ) -> list[DeliveredImage]:
        """Put versions of one image at their keys: copies, then renditions; what is there already is left as it is.

        Args:
            metadata: kept beside each, with its SHA-256; what is not ASCII is percent-encoded, what is too long is cut.
        """
        copies = [self._copied(original, place.key, metadata) for place in places if place.version is None]
        renditions = [(place.version, place.key) for place in places if place.version]
        return copies + self._rendered(original, renditions, metadata)

    def _copied(self, original: Original, key: str, metadata: Mapping[str, str]) -> DeliveredImage:
        """Make sure that a copy of an image is at its key: byte for byte, or with a mark where that is asked for.

        Either of them stands where it was put before: nobody's public file changes because an option did.
        """
        found = self._standing(key)
        if found and (copy := self._known_copy(original, key, found)):
            return copy
        if made := self._marked(original):
            return self._marked_copy(original, made, key, found, metadata)
        image, target = original.image, self.to.objects
        facts = self.to.delivered_facts(image.media_type, image.sha256, metadata, key)
        if found:
            said = self._as_made(key, found, facts, image.sha256)
            return self._delivered_copy(original, key, said, marked=True)

        def write(expected: Condition) -> Found:
            if target.copy(original.place, original.key, key, facts, expected):
                return self._checked_copy(image, key)
            tag = target.write(key, original.fetch(), facts, expected)
            return Found(image.size_bytes, facts.metadata, tag)

        if copy := self._known_copy(original, key, self._written(key, write)):
            return copy
        raise self._something_else(key)

    def _marked_copy(
        self, original: Original, made: Spool, key: str, found: Found | None, metadata: Mapping[str, str]
    ) -> DeliveredImage:
        """Make sure that a marked copy is at its key; one whose metadata got lost counts by its bytes."""
        image, target = original.image, self.to.objects
        said = {**metadata, "source-sha256": image.sha256, **self._told_of(made)}
        facts = self.to.delivered_facts(image.media_type, made.sha256, said, key)

        def write(expected: Condition) -> Found:
            return Found(made.size_bytes, facts.metadata, target.write(key, made.open, facts, expected))

        found = found or self._written(key, write)
        if copy := self._known_copy(original, key, found):
            return copy
        return self._delivered_copy(
            original, key, self._as_made(key, found, facts, image.sha256), marked=True
        )

    def _known_copy(self, original: Original, key: str, found: Found) -> DeliveredImage | None:
        """Return what is at a key as a copy of the image, with a mark or without; None where it is something else."""
        image, said = original.image, found.metadata
        if said.get("source-sha256") == image.sha256 and "sha256" in said and "recipe" not in said:
            return self._delivered_copy(original, key, found, marked=True)
        if found.size == image.size_bytes and self._sha256_at(key, found) == image.sha256:
            return self._delivered_copy(original, key, found, marked=False)
        return None

    def _delivered_copy(self, original: Original, key: str, found: Found, *, marked: bool) -> DeliveredImage:
        facts = original.image.model_dump(include=_COPIED) | {"size_bytes": found.size}
        if marked:
            said = found.metadata
            facts |= {"sha256": said["sha256"], "marks": marks_in(said), "signer": said.get("signer")}
        elif self._marking:  # an earlier version did not look
            facts |= {"marks": original.marks}
        return self._delivered(original.image, key, found, **facts)

    @property
    def _marking(self) -> Marking:
        return self.provenance.mark if self.provenance else False

    def _marked(self, original: Original) -> Spool | None:
        """Return a copy of an image with a mark, and signed; None where neither is asked for, or needed."""
        needs_mark = self._marking and not SAYS_SO & {*original.marks}
        made = marked_copy(original, self._marking) if needs_mark else None
        return signed(original, made, self.signer, self._marking) if self.signer else made

    def _told_of(self, made: Spool) -> dict[str, str]:
        """Return what the metadata of a file says of its mark, and of who signed it."""
        return marks_of(made.open) | ({"signer": self.signer.identity} if self.signer else {})

    def _as_made(self, key: str, found: Found, facts: Facts, plain: str) -> Found:
        """Return what is at a key, and says nothing of itself, as the file that was made for it now.

        It is known by its bytes, with any mark or none; a signed one, which is never made twice, by what is signed in
        it.

        Args:
            plain: the SHA-256 of the file without a mark.

        Raises:
            KeyTakenError: it is something else.
        """
        said, sha256 = facts.metadata, self._sha256_at(key, found)
        if sha256 == facts.sha256:
            return replace(found, metadata=said)
        body = self.to.objects.fetch(key)
        source, recipe = said.get("source-sha256", plain), said.get("recipe")
        is_signed = is_signed_copy(body, facts.media_type, source, recipe)
        if not is_signed and ("sha256" in found.metadata or without_its_mark(body) != plain):
            raise self._something_else(key)
        kept = {
            name: value for name, value in said.items() if name != "marks" and (is_signed or name != "signer")
        }
        return replace(found, metadata={**kept, "sha256": sha256, **marks_of(body)})

    def _checked_copy(self, image: StoredImage, key: str) -> Found:
        """Return a service's own copy: not all services heed conditions there, and none knows the SHA-256.

        Raises:
            StoreError: another's object is there by now, or the image was cut short, and its copy is removed.
        """
        found = self.to.objects.look(key)
        said = found.metadata.get("sha256") if found else None
        if found and said == image.sha256 and found.size != image.size_bytes:
            self.to.objects.delete(key)
            raise StoreError(f"{image.uri} is damaged: it has {found.size:,} bytes, not {image.size_bytes:,}")
        if found is None or self._sha256_at(key, found) != image.sha256:
            raise self._something_else(key)
        return found

    def _rendered(
        self, original: Original, places: Sequence[tuple[Rendition, str]], metadata: Mapping[str, str]
    ) -> list[DeliveredImage]:
        """Make sure that each rendition of an image is at its key.

        An object counts as the rendition if its bytes are the same, or if its metadata says that it was made in the
        same way of the same image: another version of Pillow makes other bytes.
        """
        image = original.image
        standing = {key: self._standing(key) for _, key in places}
        missing = [place for place in places if not _is_made(image, place[0], standing[place[1]])]
        made = render(original.fetch(), [rendition for rendition, _ in missing]) if missing else []
        for (rendition, key), rendered in zip(missing, made, strict=True):
            standing[key] = self._rendition(original, rendition, rendered, key, metadata)
        delivered = []
        for rendition, key in places:
            if found := standing[key]:
                width, _, height = found.metadata["pixels"].partition("x")
                described = {
                    "sha256": found.metadata["sha256"],
                    "size_bytes": found.size,
                    "media_type": rendition.media_type,
                    "width": int(width),
                    "height": int(height),
                    "rendition": rendition.name,
                    "recipe": rendition.recipe,
                    "marks": marks_in(found.metadata),
                    "signer": found.metadata.get("signer"),
                }
                delivered.append(self._delivered(image, key, found, **described))
        return delivered

    def _rendition(
        self,
        original: Original,
        rendition: Rendition,
        rendered: Rendered,
        key: str,
        metadata: Mapping[str, str],
    ) -> Found:
        image, target, spool = original.image, self.to.objects, rendered.spool
        if rendition.mark:
            spool = marked_rendition(original, spool, rendition.mark)
        if self.signer:
            spool = signed_rendition(original, rendition, rendered, spool, self.signer)
        said = {
            **metadata,
            "source-sha256": image.sha256,
            "rendition": rendition.name,
            "recipe": rendition.recipe,
            "pixels": f"{rendered.width}x{rendered.height}",
            **self._told_of(spool),
        }
        facts = self.to.delivered_facts(rendition.media_type, spool.sha256, said, key)

        def write(expected: Condition) -> Found:
            return Found(spool.size_bytes, facts.metadata, target.write(key, spool.open, facts, expected))

        found = self._written(key, write)
        if _is_made(image, rendition, found):
            return found
        return self._as_made(key, found, facts, rendered.spool.sha256)

    def _standing(self, key: str) -> Found | None:
        return None if self.overwrite else self.to.objects.look(key)

    def _written(self, key: str, write: Write) -> Found:
        """Return what `write` put at `key`, or what somebody else had put there before (unless `overwrite` is on)."""

        def attempt() -> Found:
            try:
                return self._put(write)
            except (ConflictError, NoAnswerError) as error:
                if found := self._standing(key):
                    return found
                raise NoAnswerError(f"can't write {self.to.uri(key)}: {error}; try again") from error

        return patience().ask(attempt)

    def _put(self, write: Write) -> Found:
        """Return what `write` put; where a place has no conditions, the look before it has to do."""
        if self.overwrite or self.to.objects in _unconditional:
            return write(Condition.ANYTHING)
        try:
            return write(Condition.NOTHING)
        except NoConditionsError as error:
            found = write(Condition.ANYTHING)  # or is something else refused?
            self._has_no_conditions(str(error))
            return found

    def _has_no_conditions(self, why: str) -> None:
        if self.to.objects not in _unconditional:
            logger.warning(
                "%s: no conditional writes there (%s): a look before each delivery does instead, which misses what "
                "others write at the same moment",
                self.to.identity,
                why,
            )
            _unconditional.add(self.to.objects)

    def _something_else(self, key: str) -> KeyTakenError:
        return KeyTakenError(self._refusal(key, "something else"))

    def _refusal(self, key: str, what: str) -> str:
        return f"{self.to.uri(key)} holds {what}: deliver to another key, or replace it (overwrite=True, --overwrite)"

    def _sha256_at(self, key: str, found: Found) -> str:
        return found.metadata.get("sha256") or sha256_of(self.to.objects.fetch(key))

    def _delivered(self, image: StoredImage, key: str, found: Found, **facts: Any) -> DeliveredImage:
        uri = self.to.uri(key)
        return DeliveredImage(
            uri=uri,
            url=self.to.public_url(uri),
            source_uri=image.uri,
            source_sha256=image.sha256,
            etag=found.tag,
            **facts,
        )


def _is_made(image: StoredImage, rendition: Rendition, found: Found | None) -> bool:
    said = found.metadata if found else {}
    same = (said.get("source-sha256"), said.get("recipe")) == (image.sha256, rendition.recipe)
    # metadata is anybody's to write
    return same and "sha256" in said and _PIXELS.fullmatch(said.get("pixels", "")) is not None


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
