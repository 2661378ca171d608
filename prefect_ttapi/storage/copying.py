"""Copying an image from where it is kept to where its consumers look, once."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Final

from prefect_ttapi.errors import StoreError
from prefect_ttapi.images.renditions import Rendered, Rendition, render
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.results import StoredImage
from prefect_ttapi.stopping import backoff
from prefect_ttapi.storage.objects import (
    Body,
    Condition,
    ConflictError,
    Facts,
    Found,
    NoAnswerError,
    ObjectStore,
)

#: Attempts at a write that gets no answer; after each, seconds as `backoff` takes them: first, longest, factor.
_ATTEMPTS: Final = 3
_PAUSES: Final = (0.2, 3.0, 5.0)

#: Media type, SHA-256, metadata and key to what is kept beside an object.
MakeFacts = Callable[[str, str, Mapping[str, str], str], Facts]

#: Puts something at its key if what is there now is as expected.
Write = Callable[[Condition], Found]

#: Width and height, as `_says` writes them.
_PIXELS: Final = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", re.ASCII)


@dataclass(eq=False)
class Original:
    """A stored image, whose bytes are fetched and checked once, when they are first needed.

    Attributes:
        image: what is recorded of it.
        place: the store that holds it.
        at_hand: opens the bytes, where this process has them already.
    """

    image: StoredImage
    place: ObjectStore
    at_hand: Body | None = None

    @property
    def key(self) -> str:
        """Return its key in the store that holds it."""
        return self.place.key(self.image.uri)

    def fetch(self) -> Body:
        """Return what opens the bytes, on this machine.

        Raises:
            StoreError: they have changed.
            ImageMissingError: the image is gone.
        """
        if self.at_hand is None:
            body = self.place.fetch(self.key)
            if _sha256(body) != self.image.sha256:
                raise StoreError(f"{self.image.uri} is damaged: its bytes don't have the recorded SHA-256")
            self.at_hand = body
        return self.at_hand


def copy_image(original: Original, target: ObjectStore, key: str, facts: Facts, *, overwrite: bool) -> str:
    """Put a copy of an image at `key` of `target`, unless it is there already; return the tag of what is there now.

    Raises:
        StoreError: another object is there (and `overwrite` is off), or the image's bytes have changed.
        ImageMissingError: the image is gone.
    """
    image = original.image
    found = None if overwrite else target.look(key)
    if found is None:
        found = _written(target, key, partial(_copy, original, target, key, facts), overwrite=overwrite)
    if found.size != image.size_bytes or _sha256_at(target, key, found) != image.sha256:
        raise StoreError(_something_else(target, key))
    return found.tag


def _written(target: ObjectStore, key: str, write: Write, *, overwrite: bool) -> Found:
    """Return what `write` put at `key`, or what somebody else had put there before (unless `overwrite` is on)."""
    for pause in islice(backoff(*_PAUSES), _ATTEMPTS):
        try:
            return write(Condition.ANYTHING if overwrite else Condition.NOTHING)
        except ConflictError:
            pass  # somebody else was faster
        except NoAnswerError:
            time.sleep(pause)
        if not overwrite and (found := target.look(key)):
            return found
    raise NoAnswerError(f"can't write {target.uri(key)}: the store gives no answer; try again")


def _something_else(target: ObjectStore, key: str) -> str:
    return f"{target.uri(key)} holds something else: deliver to another key, or pass overwrite=True"


def _copy(original: Original, target: ObjectStore, key: str, facts: Facts, expected: Condition) -> Found:
    if target.copy(original.place, original.key, key, facts, expected):
        return _checked_copy(original.image, target, key)
    tag = target.write(key, original.fetch(), facts, expected)
    return Found(original.image.size_bytes, facts.metadata, tag)


def _checked_copy(image: StoredImage, target: ObjectStore, key: str) -> Found:
    """Return a service's own copy: not all services heed conditions there, and none knows the SHA-256.

    Raises:
        StoreError: another's object is there by now, or the image was cut short, and its copy is removed.
    """
    found = target.look(key)
    if found is None or found.metadata.get("sha256") != image.sha256:
        raise StoreError(_something_else(target, key))
    if found.size != image.size_bytes:
        target.delete(key)
        raise StoreError(f"{image.uri} is damaged: it has {found.size:,} bytes, not {image.size_bytes:,}")
    return found


def _sha256_at(target: ObjectStore, key: str, found: Found) -> str:
    return found.metadata.get("sha256") or _sha256(target.fetch(key))


def _sha256(body: Body) -> str:
    with body() as reader:
        return hashlib.file_digest(reader, hashlib.sha256).hexdigest()  # type: ignore[arg-type]


def put_renditions(
    original: Original,
    places: Sequence[tuple[Rendition, str]],
    target: ObjectStore,
    metadata: Mapping[str, str],
    make_facts: MakeFacts,
    *,
    overwrite: bool = False,
) -> list[Found]:
    """Make sure that each rendition of an image is at its key of `target`; return what is there, in order.

    An object counts as the rendition if its bytes are the same, or if its metadata says that it was made in the same
    way of the same image: another version of Pillow makes other bytes.

    Raises:
        StoreError: another object is there (and `overwrite` is off), a store failed, or the image's bytes have changed.
        ImageMissingError: the image is gone.
        PictureError: the image can't be decoded, or is too large for the format.
    """
    image = original.image
    standing = {key: None if overwrite else target.look(key) for _, key in places}
    missing = [place for place in places if not _is_made(image, place[0], standing[place[1]])]
    if missing:
        made = render(original.fetch(), [rendition for rendition, _ in missing])
        for (rendition, key), rendered in zip(missing, made, strict=True):
            said = {**metadata, **_says(image, rendition, rendered)}
            facts = make_facts(rendition.media_type, rendered.spool.sha256, said, key)
            write = partial(_write, rendered.spool, target, key, facts)
            found = _written(target, key, write, overwrite=overwrite)
            if not _is_made(image, rendition, found):
                if _sha256_at(target, key, found) != rendered.spool.sha256:
                    raise StoreError(_something_else(target, key))
                found = replace(found, metadata=facts.metadata)
            standing[key] = found
    return [there for _, key in places if (there := standing[key])]


def _write(spool: Spool, target: ObjectStore, key: str, facts: Facts, expected: Condition) -> Found:
    return Found(spool.size_bytes, facts.metadata, target.write(key, spool.open, facts, expected))


def pixels_of(found: Found) -> tuple[int, int]:
    """Return width and height of an object that `put_renditions` found or made."""
    width, _, height = found.metadata["pixels"].partition("x")
    return int(width), int(height)


def _says(image: StoredImage, rendition: Rendition, rendered: Rendered) -> dict[str, str]:
    return {
        "source-sha256": image.sha256,
        "rendition": rendition.name,
        "recipe": rendition.recipe,
        "pixels": f"{rendered.width}x{rendered.height}",
    }


def _is_made(image: StoredImage, rendition: Rendition, found: Found | None) -> bool:
    said = found.metadata if found else {}
    same = (said.get("source-sha256"), said.get("recipe")) == (image.sha256, rendition.recipe)
    # metadata is anybody's to write
    return same and "sha256" in said and _PIXELS.fullmatch(said.get("pixels", "")) is not None
