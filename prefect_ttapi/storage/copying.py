"""Copying an image from where it is kept to where its consumers look, once."""

from __future__ import annotations

import hashlib
import time
from typing import BinaryIO, Final

from prefect_ttapi.errors import StoreError
from prefect_ttapi.responses import StoredImage
from prefect_ttapi.storage.objects import Condition, ConflictError, Facts, NoAnswerError, ObjectStore

#: Seconds to wait after each attempt that got no answer.
_PAUSES: Final = (0.2, 1.0, 3.0)


def copy_image(
    image: StoredImage, origin: ObjectStore, target: ObjectStore, key: str, facts: Facts, *, overwrite: bool
) -> str:
    """Put a copy of `image` at `key` of `target`, unless it is there already; the tag of what is there now.

    Raises:
        StoreError: another object is there (and `overwrite` is off), or the image's bytes have changed.
        ImageMissingError: the image is gone.
    """
    for pause in _PAUSES:
        if not overwrite and (tag := _tag_if_there(target, key, image)):
            return tag
        try:
            return _copy(
                image, origin, target, key, facts, Condition.ANYTHING if overwrite else Condition.NOTHING
            )
        except ConflictError:
            continue  # somebody else was faster: look at what is there now
        except NoAnswerError:
            time.sleep(pause)
    raise NoAnswerError(f"can't write {target.uri(key)}: the store gives no answer; try again")


def _tag_if_there(target: ObjectStore, key: str, image: StoredImage) -> str | None:
    """The object's tag if the image is at `key` already. StoreError: something else is."""
    found = target.look(key)
    if found is None:
        return None
    if found.size == image.size_bytes:
        sha256 = found.metadata.get("sha256") or _sha256(target.fetch(key)())
        if sha256 == image.sha256:
            return found.tag
    raise StoreError(
        f"{target.uri(key)} holds something else: deliver to another key, or pass overwrite=True"
    )


def _copy(
    image: StoredImage,
    origin: ObjectStore,
    target: ObjectStore,
    key: str,
    facts: Facts,
    expected: Condition,
) -> str:
    source_key = origin.key(image.uri)
    if tag := target.copy(origin, source_key, key, facts, expected):
        return tag
    body = origin.fetch(source_key)
    if _sha256(body()) != image.sha256:
        raise StoreError(f"{image.uri} is damaged: its bytes don't have the recorded SHA-256")
    return target.write(key, body, facts, expected)


def _sha256(reader: BinaryIO) -> str:
    digest = hashlib.sha256()
    with reader:
        while chunk := reader.read(1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()
