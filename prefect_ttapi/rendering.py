"""Making renditions with Pillow: hostile bytes in, checked pixels out, a bounded number at a time."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from PIL import ImageCms, ImageOps
from PIL.Image import Image, Resampling, new

from prefect_ttapi.errors import PictureError
from prefect_ttapi.pixels import at_work, opened
from prefect_ttapi.renditions import LARGEST_SIDE, Rendition
from prefect_ttapi.spool import Spool

log: Final = logging.getLogger(__name__)

#: Bytes of a colour profile that is believed in. Those of displays have 500 to 4,000, of presses some 500,000.
_LONGEST_PROFILE: Final = 1024 * 1024

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "webp": {"method": 4},
    "jpeg": {"optimize": True, "progressive": True},
    "png": {},
}


@dataclass(frozen=True)
class Rendered:
    """A rendition's bytes, in a temporary file, and its size in pixels."""

    spool: Spool
    width: int
    height: int


def render(opener: Callable[[], BinaryIO], renditions: Iterable[Rendition]) -> list[Rendered]:
    """Each of the renditions of the image that `opener` opens, in order; the same bytes from the same Pillow.

    Raises:
        PictureError: the image can't be decoded, unfolds to too many pixels, or is too large for the format.
    """
    try:
        return at_work(lambda: _renditions(opener, renditions))
    except (PictureError, OSError) as error:
        # Pillow tells of a damaged file by an OSError, which has no number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise PictureError(f"no rendition can be made: {error}") from error
    except Exception as error:  # and by whatever else it stumbles over
        raise PictureError(f"the image can't be read: {type(error).__name__}: {error}") from error


def _renditions(opener: Callable[[], BinaryIO], renditions: Iterable[Rendition]) -> list[Rendered]:
    with opener() as file:
        image = _upright(file)
        return [_rendered(image, rendition) for rendition in renditions]


def _upright(file: BinaryIO) -> Image:
    """The decoded image: upright, in sRGB, RGB or RGBA, and without anything but pixels."""
    image: Image = opened(file)
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    elif image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    image = _in_srgb(image, profile)
    image = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
    image.info.clear()
    return image


def _in_srgb(image: Image, profile: bytes | None) -> Image:
    """`image` with its colours as a browser shows them; a profile that can't be used is passed over, as there."""
    if not profile or len(profile) > _LONGEST_PROFILE:
        return image
    try:
        converted = ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.debug("a colour profile is of no use: %s", error)
        return image
    return converted or image


def _rendered(image: Image, rendition: Rendition) -> Rendered:
    size = rendition.size_of(image.width, image.height)
    if max(size) > LARGEST_SIDE:
        raise PictureError(
            f"it would be {size[0]} x {size[1]} pixels; {LARGEST_SIDE:,} a side are the limit: give max_size"
        )
    small = image if size == image.size else image.resize(size, Resampling.LANCZOS, reducing_gap=3.0)
    if rendition.format == "jpeg" and small.mode == "RGBA":
        page = new("RGB", size, "white")
        page.paste(small, mask=small)
        small = page
    quality = {} if rendition.used_quality is None else {"quality": rendition.used_quality}
    encoded = io.BytesIO()
    small.save(encoded, rendition.format, **_OPTIONS[rendition.format], **quality)
    spool = Spool()
    spool.write(encoded.getbuffer())
    return Rendered(spool, *size)
