"""Which files a generation's images become for their consumers, under which keys, and what they say of themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, Final, get_args

from pydantic import ConfigDict

from prefect_ttapi.capabilities import Strict
from prefect_ttapi.credentials import ContentCredentialsSigner
from prefect_ttapi.errors import KeyTemplateError, PictureError, SigningError, StoreError
from prefect_ttapi.images.labels import Labels, Mark, mark, read_labels, unmark
from prefect_ttapi.images.renditions import Marking, Version
from prefect_ttapi.images.signing import UNCHANGED, Change, Signer, read_signature
from prefect_ttapi.images.spool import Body, Spool
from prefect_ttapi.images.xmp import Statement
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import VERSION, DeliveredImage, GeneratedImage, Generation, StoredImage
from prefect_ttapi.storage.keys import Keys, KeyTemplate, beginning_of
from prefect_ttapi.storage.objects import ObjectStore, sha256_of
from prefect_ttapi.storage.store import ImageStore

logger: Final = logging.getLogger(__name__)

#: Any of them says that a model made the picture.
SAYS_SO: Final[frozenset[Mark]] = frozenset({"credentials", "xmp"})

#: A template is parsed once for all requests that come with the same names of values.
_parsed: Final = lru_cache(maxsize=256)(KeyTemplate)


class Provenance(Strict):
    """What is added to delivered files, so that they say themselves that a model made them.

    The images in the store stay as they are. Where nothing is signed, so do copies of images that have Content
    Credentials or such an XMP packet: any other byte would end the validity of a signature.

    Attributes:
        mark: copies of images that say nothing get an XMP packet that says that a model made the image, which one, in
            answer to which request, and what the SHA-256 of the stored image is; `"prompt"` adds the prompt, too.
        sign: copies and renditions get Content Credentials that say the same, signed by this block. Where the image has
            credentials of its own, the new ones build on them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    mark: Marking = True
    sign: ContentCredentialsSigner | None = None

    def signer(self) -> Signer | None:
        """Return what signs, with certificates and key as they are now; None where nothing is signed.

        Raises:
            SigningError: they are of no use.
        """
        try:
            return self.sign.get_signer() if self.sign else None
        except ValueError as error:
            raise SigningError(f"can't sign: {error}") from None


@dataclass(eq=False)
class Original:
    """A stored image, whose bytes are fetched and checked once, when they are first needed.

    Attributes:
        image: what is recorded of it.
        place: the store that holds it.
        statement: what a file of it can say of where it comes from.
        at_hand: opens the bytes, where this process has them already.
    """

    image: StoredImage
    place: ObjectStore
    statement: Statement
    at_hand: Body | None = None

    @property
    def key(self) -> str:
        """Return its key in the store that holds it."""
        return self.place.key(self.image.uri)

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The marks that are recorded of it; else those that its bytes have."""
        return self.labels.marks if self.image.marks is None else self.image.marks

    @cached_property
    def labels(self) -> Labels:
        """What its bytes say of where they come from; nothing, for kinds of files in which nobody looks."""
        with self.fetch()() as file:
            return read_labels(file) or Labels()

    def fetch(self) -> Body:
        """Return what opens the bytes, on this machine.

        Raises:
            StoreError: they have changed.
            ImageMissingError: the image is gone.
        """
        if self.at_hand is None:
            body = self.place.fetch(self.key)
            if sha256_of(body) != self.image.sha256:
                raise StoreError(f"{self.image.uri} is damaged: its bytes don't have the recorded SHA-256")
            self.at_hand = body
        return self.at_hand


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
class Files:
    """The files that are delivered, and where: the same for all requests of a task or a batch.

    Attributes:
        to: the store to deliver to.
        key: a key template.
        batch, date: what these names stand for in it.
        source: the store that the images come from, where the settings of `to` can't read it.
        versions: renditions, and None for a copy of the image itself.
        run_id: the flow run that delivers, which need not be the one that paid.
        provenance: what files get.
    """

    to: ImageStore
    key: str
    batch: str
    date: datetime
    source: ImageStore | None = None
    versions: Sequence[Version] = (None,)
    run_id: str | None = None
    _: KW_ONLY
    provenance: Provenance | None = None

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


def marked(original: Original, marking: Marking, rendered: Spool | None = None) -> Spool:
    """Return a version of an image with a mark.

    Args:
        rendered: a rendition, which also gets what the image's XMP packet says, if that can be added to; None: a copy
            of the image.

    Raises:
        PictureError: the image is of a kind that can't be marked, or its own XMP packet can't be added to.
    """
    told, packet = _told(original.statement, marking), original.labels.xmp if rendered else None
    with (rendered.open if rendered else original.fetch())() as file:
        try:
            return Spool.of(mark(file, told, packet))
        except PictureError as error:
            if packet is None:
                raise
            logger.warning("A rendition of %s has a packet of its own only: %s", original.image.uri, error)
            return Spool.of(mark(file, told))


def signed(
    original: Original, made: Spool | None, version: Version, marking: Marking, signer: Signer
) -> Spool:
    """Return a version of an image with Content Credentials.

    Args:
        made: the version with its mark, if it has one; None: the image as it is.
        marking: what the credentials may tell.

    Raises:
        SigningError: why it can't be done.
    """
    image, body = original.image, original.fetch()
    return signer.sign(
        made.open if made else body,
        version.media_type if version else image.media_type,
        _told(original.statement, marking),
        (body, image.media_type),
        _change(image, version),
    )


def _change(image: StoredImage, version: Version) -> Change:
    """Return what is done to an image to make a version of it."""
    if version is None:
        return UNCHANGED
    size = (image.width, image.height)
    is_true = {
        "c2pa.resized": version.size_of(*size) != size,
        "c2pa.converted": version.media_type != image.media_type,
    }
    actions = tuple(action for action, is_so in is_true.items() if is_so) or ("c2pa.transcoded",)
    return Change(version.recipe, actions)


def is_signed_copy(body: Body, media_type: str, source_sha256: str, recipe: str | None) -> bool:
    """Return whether a file's valid Content Credentials say that it is this version of this image."""
    with body() as file:
        signature = read_signature(file, media_type)
    told = signature and not signature.problem and (signature.source_sha256, signature.recipe)
    return told == (source_sha256, recipe)


def without_its_mark(body: Body) -> str:
    """Return the SHA-256 of a file without a mark of ours."""
    with body() as file:
        return Spool.of(unmark(file)).sha256


def marks_of(body: Body) -> dict[str, str]:
    """Return the marks of a file as an object's metadata names them."""
    with body() as file:
        labels = read_labels(file)
    return {"marks": " ".join(labels.marks)} if labels and labels.marks else {}


def marks_in(metadata: Mapping[str, str]) -> tuple[Mark, ...]:
    """Return the marks that an object's metadata names."""
    words = metadata.get("marks", "").split()
    return tuple(mark for mark in get_args(Mark) if mark in words)


def _told(statement: Statement, marking: Marking) -> Statement:
    return statement if marking == "prompt" else replace(statement, prompt=None)


def without_mark(
    copies: Iterable[DeliveredImage],
    versions: Sequence[Version],
    provenance: Provenance | None,
    signer: Signer | None = None,
) -> int:
    """Return how many of these files lack a mark, or a signature, that is asked for.

    They were there before, and stay as they are.
    """
    wanted = {version.name: version.mark for version in versions if version}
    asked = wanted | {None: provenance.mark if provenance else False}
    return sum(
        bool(asked.get(copy.rendition) and not SAYS_SO & {*(copy.marks or ())})
        or bool(signer and copy.signer != signer.identity)
        for copy in copies
    )


def note_of(count: int) -> str:
    """Return in words that so many files lack a mark."""
    files = "1 delivered file was" if count == 1 else f"{count:,} delivered files were"
    return f"{files} there before, without the mark or signature that is asked for; overwrite replaces what is there"
