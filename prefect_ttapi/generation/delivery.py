"""How a generation's files are delivered: each is put at its key once, and nothing of anybody else's is replaced."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

from prefect_ttapi.errors import KeyTakenError, StoreError
from prefect_ttapi.generation.files import (
    SAYS_SO,
    Files,
    Original,
    Place,
    is_signed_copy,
    marked,
    marks_in,
    marks_of,
    metadata_of,
    signed,
    without_its_mark,
)
from prefect_ttapi.images.labels import Mark
from prefect_ttapi.images.renditions import Marking, Rendered, Rendition, Version, render
from prefect_ttapi.images.signing import Signer
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.results import DeliveredImage, Generation, StoredImage
from prefect_ttapi.storage.keys import Keys, of_any_size
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

logger = logging.getLogger(__name__)

#: What is put where deliveries go, to see whether it can be, and how often a second one is tried.
TRIED: Final = "prefect-ttapi-write-test.png"
_TRIED_BYTES: Final = b"written by prefect-ttapi, to see whether images can be delivered here"
_TIMES: Final = 3

#: Places that this process has found to have no conditional writes.
_unconditional: set[ObjectStore] = set()

#: Width and height, as metadata has them.
_PIXELS: Final = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", re.ASCII)


@dataclass(frozen=True)
class Delivery(Files):
    """Puts files where their consumers look.

    Attributes:
        overwrite: replace whatever is at a key.
    """

    _: KW_ONLY
    overwrite: bool = False

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
        target, tried = self.to.objects, Spool.of([_TRIED_BYTES])
        facts = self.to.delivered_facts("image/png", tried.sha256, {}, TRIED)
        if self.signer is not None:
            self.signer.check()
        with self.to.before_paying():
            target.read(TRIED)  # who may not read may not look, and this refusal has words
            if not self._creates(tried, facts):  # there is one from another time
                self._write(TRIED, tried, facts, Condition.ANYTHING)
            try:
                target.put_tags(TRIED, facts)
                # others may be at it, and remove theirs
                known = self.overwrite or target in _unconditional
                if not known and all(self._creates(tried, facts) for _ in range(_TIMES)):
                    self._has_no_conditions("it creates an object twice")
            finally:
                try:
                    target.delete(TRIED)
                except StoreError as error:
                    logger.info("%s stays: %s", TRIED, error)

    def _creates(self, tried: Spool, facts: Facts) -> bool:
        try:
            patience().ask(partial(self._put, TRIED, tried, facts))
        except ConflictError:
            return False
        return True

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

    def taken(self, key: str, request_hash: str) -> KeyTakenError:
        """Return why a request is not paid for, at whose key there is something."""
        found = self.to.objects.look(key)
        said = found.metadata if found else {}
        name = said.get("request-hash", "")
        what = f"an image of the request {name[:12]}" if name else "something else"
        if name == request_hash:
            source = split_at(said.get("source-uri", ""), IMAGES)
            what = "an earlier image of this request" + (f", from the store {source[0]}" if source else "")
        return KeyTakenError(f"nothing is sent: {self._refusal(key, what)}")

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
        """Put versions of one image at their keys; what is there already is left as it is.

        A copy is the image byte for byte, or has a mark where that is asked for. Either of them stands where it was
        put before: nobody's public file changes because an option did.

        Args:
            metadata: kept beside each, with its SHA-256; what is not ASCII is percent-encoded, what is too long is cut.
        """
        found: dict[str, Found] = {}
        to_render: list[tuple[Place, Rendition, Found | None]] = []
        for place in places:
            standing = self._standing(place.key)
            if standing and (known := self._known(original, place, standing)):
                found[place.key] = known
            elif place.version is None:
                made = self._finished(original, None, None)
                found[place.key] = self._placed(
                    original, place, standing, made, metadata, original.image.sha256
                )
            else:
                to_render.append((place, place.version, standing))
        versions = [version for _, version, _ in to_render]
        rendered = render(original.fetch(), versions) if versions else []
        for (place, version, standing), small in zip(to_render, rendered, strict=True):
            made = self._finished(original, version, small.spool)
            said = {**metadata, **_said_of(version, small)}
            found[place.key] = self._placed(original, place, standing, made, said, small.spool.sha256)
        return [self._delivered(original, place, found[place.key]) for place in places]

    @property
    def _marking(self) -> Marking:
        return self.provenance.mark if self.provenance else False

    def _finished(self, original: Original, version: Version, rendered: Spool | None) -> Spool | None:
        """Return a version of an image with its mark and signature; None: the image as it is."""
        marking = version.mark if version else self._marking
        needs_mark = marking and (version is not None or not SAYS_SO & {*original.marks})
        made = marked(original, marking, rendered) if needs_mark else rendered
        return signed(original, made, version, marking, self.signer) if self.signer else made

    def _placed(
        self,
        original: Original,
        place: Place,
        standing: Found | None,
        made: Spool | None,
        metadata: Mapping[str, str],
        plain: str,
    ) -> Found:
        """Put at its place what was made for it; return what is there then: that, or what stood there and counts as it.

        Args:
            standing: what was there before.
            made: what to put there; None: the image as it is.
            plain: the SHA-256 of that without a mark.
        """
        image, version = original.image, place.version
        if made is not None:
            signer = {"signer": self.signer.identity} if self.signer else {}
            metadata = {**metadata, "source-sha256": image.sha256, **marks_of(made.open), **signer}
        media_type = version.media_type if version else image.media_type
        sha256 = made.sha256 if made else image.sha256
        facts = self.to.delivered_facts(media_type, sha256, metadata, place.key)
        if standing is None:
            standing = self._written(place.key, made or original, facts)
            if known := self._known(original, place, standing):
                return known
        return self._as_made(place.key, standing, facts, plain)

    def _known(self, original: Original, place: Place, found: Found) -> Found | None:
        """Return what is at a place, and what it says of itself, if it is the place's version of the image.

        A copy may have a mark or not. A rendition counts if its metadata says that it was made in the same way of the
        same image: another version of Pillow makes other bytes.
        """
        image, version, said = original.image, place.version, found.metadata
        of_image = said.get("source-sha256") == image.sha256 and "sha256" in said
        if of_image and said.get("recipe") == (version and version.recipe):
            # metadata is anybody's to write
            return found if version is None or _PIXELS.fullmatch(said.get("pixels", "")) else None
        is_image = version is None and found.size == image.size_bytes
        if is_image and self._sha256_at(place.key, found) == image.sha256:
            return replace(found, metadata={"sha256": image.sha256})
        return None

    def _as_made(self, key: str, found: Found, facts: Facts, plain: str) -> Found:
        """Return what is at a key, and says nothing of itself, as the file that was made for it now.

        It is known by its bytes, with any mark or none; a signed one, which is never made twice, by what is signed in
        it.

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
            raise KeyTakenError(self._refusal(key, "something else"))
        kept = {
            name: value for name, value in said.items() if name != "marks" and (is_signed or name != "signer")
        }
        return replace(found, metadata={**kept, "sha256": sha256, **marks_of(body)})

    def _checked_copy(self, image: StoredImage, key: str) -> Found:
        """Return what a service put at a key when it copied an image by itself, or what another has put there since.

        Raises:
            StoreError: the image was cut short, and its copy is removed.
            NoAnswerError: there is nothing any more.
        """
        found = self.to.objects.look(key)
        if found is None:
            raise NoAnswerError("it was removed at once")
        if found.metadata.get("sha256") == image.sha256 and found.size != image.size_bytes:
            self.to.objects.delete(key)
            raise StoreError(f"{image.uri} is damaged: it has {found.size:,} bytes, not {image.size_bytes:,}")
        return found

    def _standing(self, key: str) -> Found | None:
        return None if self.overwrite else self.to.objects.look(key)

    def _written(self, key: str, content: Spool | Original, facts: Facts) -> Found:
        """Return what was put at `key` now, or what somebody else had put there before (unless `overwrite` is on)."""

        def attempt() -> Found:
            try:
                return self._put(key, content, facts)
            except (ConflictError, NoAnswerError) as error:
                if found := self._standing(key):
                    return found
                raise NoAnswerError(f"can't write {self.to.uri(key)}: {error}; try again") from error

        return patience().ask(attempt)

    def _put(self, key: str, content: Spool | Original, facts: Facts) -> Found:
        """Return what was put at `key`; where a place has no conditions, the look before it has to do."""
        if self.overwrite or self.to.objects in _unconditional:
            return self._write(key, content, facts, Condition.ANYTHING)
        try:
            return self._write(key, content, facts, Condition.NOTHING)
        except NoConditionsError as error:
            found = self._write(key, content, facts, Condition.ANYTHING)  # or is something else refused?
            self._has_no_conditions(str(error))
            return found

    def _write(self, key: str, content: Spool | Original, facts: Facts, expected: Condition) -> Found:
        """Write a file that was made here, or an image as it is, which a service may copy by itself."""
        target = self.to.objects
        if isinstance(content, Spool):
            body, size = content.open, content.size_bytes
        elif target.copy(content.place, content.key, key, facts, expected):
            return self._checked_copy(content.image, key)
        else:
            body, size = content.fetch(), content.image.size_bytes
        return Found(size, facts.metadata, target.write(key, body, facts, expected))

    def _has_no_conditions(self, why: str) -> None:
        if self.to.objects not in _unconditional:
            logger.warning(
                "%s: no conditional writes there (%s): a look before each delivery does instead, which misses what "
                "others write at the same moment",
                self.to.identity,
                why,
            )
            _unconditional.add(self.to.objects)

    def _refusal(self, key: str, what: str) -> str:
        return f"{self.to.uri(key)} holds {what}: deliver to another key, or replace it (overwrite=True, --overwrite)"

    def _sha256_at(self, key: str, found: Found) -> str:
        return found.metadata.get("sha256") or sha256_of(self.to.objects.fetch(key))

    def _delivered(self, original: Original, place: Place, found: Found) -> DeliveredImage:
        image, version, said = original.image, place.version, found.metadata
        is_plain = version is None and said["sha256"] == image.sha256
        marks: tuple[Mark, ...] | None = marks_in(said)
        if is_plain:  # an image of an earlier version's record is looked into where marks are asked for
            marks = original.marks if self._marking else image.marks
        width, height = said["pixels"].split("x") if version else (image.width, image.height)
        uri = self.to.uri(place.key)
        return DeliveredImage(
            uri=uri,
            url=self.to.public_url(uri),
            sha256=said["sha256"],
            source_uri=image.uri,
            source_sha256=image.sha256,
            size_bytes=found.size,
            media_type=version.media_type if version else image.media_type,
            width=int(width),
            height=int(height),
            rendition=version and version.name,
            recipe=version and version.recipe,
            marks=marks,
            signer=None if is_plain else said.get("signer"),
            etag=found.tag,
        )


def _said_of(version: Rendition, rendered: Rendered) -> dict[str, str]:
    """Return what a rendition's metadata says of how it was made."""
    pixels = f"{rendered.width}x{rendered.height}"
    return {"rendition": version.name, "recipe": version.recipe, "pixels": pixels}
