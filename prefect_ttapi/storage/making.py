"""Renditions under the names their consumers know, made where they aren't there yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from prefect_ttapi.images.renditions import Rendered, Rendition, render
from prefect_ttapi.responses import StoredImage
from prefect_ttapi.storage.copying import checked_bytes, write_once
from prefect_ttapi.storage.objects import Facts, Found, ObjectStore

#: Media type, SHA-256, metadata and key to what is kept beside an object.
MakeFacts = Callable[[str, str, Mapping[str, str], str], Facts]

#: Width and height, as `_says` writes them.
_PIXELS: Final = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", re.ASCII)


def put_renditions(
    image: StoredImage,
    places: Sequence[tuple[Rendition, str]],
    origin: ObjectStore,
    target: ObjectStore,
    metadata: Mapping[str, str],
    make_facts: MakeFacts,
    *,
    overwrite: bool = False,
) -> list[Found]:
    """Make sure that each rendition of `image` is at its key of `target`; what is there, in order.

    An object counts as the rendition if its bytes are the same, or if its metadata says that it was made in the same
    way of the same image: another version of Pillow makes other bytes.

    Raises:
        StoreError: another object is there (and `overwrite` is off), a store failed, or the image's bytes have changed.
        ImageMissingError: the image is gone.
        PictureError: the image can't be decoded, or is too large for the format.
    """
    standing = {key: None if overwrite else target.look(key) for _, key in places}
    missing = [place for place in places if not _is_made(image, place[0], standing[place[1]])]
    if missing:
        made = render(checked_bytes(image, origin), [rendition for rendition, _ in missing])
        for (rendition, key), rendered in zip(missing, made, strict=True):
            said = {**metadata, **_says(image, rendition, rendered)}
            facts = make_facts(rendition.media_type, rendered.spool.sha256, said, key)
            is_it = partial(_is_made, image, rendition)
            standing[key] = write_once(rendered.spool, target, key, facts, is_it, overwrite=overwrite)
    return [found for _, key in places if (found := standing[key])]


def pixels_of(found: Found) -> tuple[int, int]:
    """Width and height of an object that `put_renditions` found or made."""
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
