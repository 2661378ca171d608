"""Thumbnails: small pictures of images, for artifacts and galleries."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import BinaryIO, Final

from PIL.Image import Image, Resampling
from PIL.ImageFile import ImageFile

from prefect_ttapi.errors import PictureError, StoreError
from prefect_ttapi.images.pixels import from_pixels

log: Final = logging.getLogger(__name__)

#: Side of the square, in pixels, that a thumbnail fits into.
ARTIFACT_BOX: Final = 128
GALLERY_BOX: Final = 256


def thumbnail(file: BinaryIO, box: int = ARTIFACT_BOX) -> bytes:
    """Return a WebP of the image in `file` that fits into `box` x `box` pixels; transparency is kept.

    Args:
        file: a PNG, JPEG or WebP, read from where it stands; it is left open.
        box: side in pixels; a smaller image keeps its size.

    Raises:
        PictureError: the bytes are no such image, are damaged, or unfold to more than `MAX_PIXELS`.
        OSError: the file can't be read.
    """
    return from_pixels(lambda: nullcontext(file), lambda image: _webp(_small(image, box), box))


def thumbnail_or_none(opener: Callable[[], BinaryIO], box: int = ARTIFACT_BOX) -> bytes | None:
    """Return the thumbnail of what `opener` opens; None, and a warning in the log, where there can be none."""
    try:
        with opener() as file:
            return thumbnail(file, box)
    except (PictureError, StoreError, OSError) as error:
        log.warning("no thumbnail: %s", error)
        return None


def as_data_uri(webp: bytes) -> str:
    """Return a `data:` address that holds the picture itself.

    >>> as_data_uri(b"RIFF")
    'data:image/webp;base64,UklGRg=='
    """
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _small(image: ImageFile, box: int) -> Image:
    image.draft("RGB", (box, box))  # a JPEG is decoded at a fraction of its size, at least this large
    mode = "RGBA" if image.has_transparency_data else "RGB"
    small = image if image.mode == mode else image.convert(mode)
    # whole multiples are averaged away first: a fifth of the time, and no difference that one could see
    small.thumbnail((box, box), Resampling.LANCZOS, reducing_gap=1.0)
    return small


def _webp(image: Image, box: int) -> bytes:
    # the quickest method: two thirds of the time for a third more bytes
    options = {
        "method": 0,
        "icc_profile": b"",
        "exif": b"",
    }  # a thumbnail of 3 KB must not carry 10 KB of profile
    for quality in (70, 40, 10):
        out = io.BytesIO()
        image.save(out, "WEBP", quality=quality, alpha_quality=quality, **options)
        if out.tell() <= box * box // 3:  # 5 KB at 128 pixels, 21 KB at 256: only noise needs more
            break
    return out.getvalue()
